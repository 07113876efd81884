"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const color = (expert) => `var(--e${expert % data.colors})`;
  const percent = (share) => (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %";
  const large = (value) => Number(value).toLocaleString("en");
  const named = (experts) => experts.length > 1 ? `experts ${experts.slice(0, -1).join(", ")} and ${experts.at(-1)}` : `expert ${experts[0]}`;

  // Elements are made of text nodes and attributes: nothing that a model or a document says is ever parsed as HTML.
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  function draw(tag, attributes, ...children) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  function picture(width, height, said, ...children) {
    return draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": said }, ...children);
  }

  // ---- what is shown: tokens with, for each routed layer, the experts that made them
  let tokens = [], layer = 0, picked = -1, focus = null, mine = true, own = null, abort = null;
  let experts = data.experts.slice();  // of each routed layer
  let counts = [];                     // of this text: layer -> expert -> tokens
  let state = null;

  function grow(routes) {
    routes.forEach((chosen, at) => {
      const most = Math.max(0, ...chosen) + 1;
      if (experts[at] === undefined || experts[at] < most) { experts[at] = Math.max(experts[at] || 0, most); layersChanged(); }
      counts[at] = counts[at] || [];
      for (const expert of chosen) counts[at][expert] = (counts[at][expert] || 0) + 1;
    });
  }
  function layerName(at) {
    const name = (data.layers && data.layers[at]) || String(at);
    return /^\d+$/.test(name) ? `layer ${name}` : name;
  }
  function layersChanged() {
    const select = $("layer");
    while (select.options.length < experts.length) {
      const at = select.options.length;
      select.append(make("option", { value: at }, layerName(at)));
    }
    select.disabled = experts.length === 0;
    select.value = String(layer);
    legend();
  }
  function legend() {
    const many = experts[layer] || 0;
    $("legend").replaceChildren(...Array.from({ length: many }, (_, expert) => {
      const mark = make("i");
      mark.style.setProperty("--c", color(expert));
      const button = make("button", { type: "button", class: "chip", "aria-pressed": String(focus === expert), "data-expert": expert,
        "aria-label": `only expert ${expert}` }, mark, String(expert));
      button.addEventListener("click", () => { focus = focus === expert ? null : expert; legend(); paint(); });
      return button;
    }));
  }

  function shown(text) {
    if (text === "") return "·";
    return text.replace(/\n/g, "⏎\n");
  }
  function paintOne(span, token) {
    const chosen = (token.routes && token.routes[layer]) || [];
    span.style.setProperty("--a", chosen.length ? color(chosen[0]) : "transparent");
    span.style.setProperty("--b", chosen.length > 1 ? color(chosen[1]) : "transparent");
    span.classList.toggle("dim", focus !== null && !chosen.includes(focus));
    if (chosen.length) span.dataset.n = chosen[0]; else delete span.dataset.n;
    const by = chosen.length ? `${layerName(layer)}, ${named(chosen)}` : "experts not known";
    span.title = `${JSON.stringify(token.text)}: ${by}`;
    span.setAttribute("aria-label", `${token.text.trim() || "space"}, ${by}`);
  }
  function paint() { tokens.forEach((token) => paintOne(token.span, token)); drawLoad(); drawPath(); }
  function add(token, quiet) {
    const at = tokens.length;
    token.span = make("span", { class: token.text === "" ? "t void" : "t", role: "option", id: `t${at}`, "aria-selected": "false" }, shown(token.text));
    token.span.addEventListener("click", () => pick(at));
    tokens.push(token);
    if (token.routes) grow(token.routes);
    paintOne(token.span, token);
    if (!quiet) token.span.classList.add("new");
    $("text").append(token.span);
    $("nothing").hidden = true;
  }
  function clear() {
    tokens = []; counts = []; picked = -1; focus = null;
    $("text").replaceChildren();
    $("text").removeAttribute("aria-activedescendant");
    $("nothing").hidden = false;
    $("count").textContent = "";
    legend(); drawPath(); drawLoad();
  }
  function pick(at) {
    if (!tokens.length) return;
    if (tokens[picked]) { tokens[picked].span.classList.remove("picked"); tokens[picked].span.setAttribute("aria-selected", "false"); }
    picked = Math.max(0, Math.min(at, tokens.length - 1));
    const { span } = tokens[picked];
    span.classList.add("picked");
    span.setAttribute("aria-selected", "true");
    $("text").setAttribute("aria-activedescendant", span.id);
    span.scrollIntoView({ block: "nearest" });
    drawPath();
  }
  function turn(to) {
    if (!experts.length) return;
    layer = Math.max(0, Math.min(to, experts.length - 1));
    $("layer").value = String(layer);
    if (focus !== null && focus >= experts[layer]) focus = null;
    legend(); paint();
  }

  // ---- drawings, in the pixels that there are
  function wide(holder) { return Math.max(200, Math.floor(holder.clientWidth)); }
  function drawPath() {
    const token = tokens[picked], holder = $("path");
    const known = token && token.routes && token.routes.length;
    $("path-none").hidden = Boolean(known);
    $("path-none").textContent = token ? "Its experts are not known." : "Choose a token.";
    $("path-of").replaceChildren(...(token ? [make("span", { class: "token" }, JSON.stringify(token.text)), ` ${picked + 1} of ${tokens.length}`] : []));
    if (!known) { holder.replaceChildren(); return; }
    const left = 58, width = wide(holder), routes = token.routes;
    const high = routes.length > 32 ? 16 : 26, height = routes.length * high + 8;
    const x = (at, expert) => left + (expert + 0.5) * (width - left - 6) / Math.max(experts[at], 1);
    const y = (at) => 4 + (at + 0.5) * high;
    const dots = draw("g", {}), ways = draw("g", {}), marks = draw("g", {});
    routes.forEach((chosen, at) => {
      const label = draw("text", { x: 0, y: y(at) + 4, "data-layer": at, class: at === layer ? "on" : "" }, layerName(at));
      label.addEventListener("click", () => turn(at));
      marks.append(label);
      if (experts[at] <= 160) for (let e = 0; e < experts[at]; e++)
        dots.append(draw("circle", { class: "node", cx: x(at, e), cy: y(at), r: Math.min(2.5, 0.35 * (width - left) / experts[at]) }));
      if (at > 0) for (const [rank, e] of chosen.entries()) for (const [before, b] of routes[at - 1].entries()) {
        const first = rank === 0 && before === 0, middle = (y(at - 1) + y(at)) / 2;
        ways.append(draw("path", { class: "way", "stroke-width": first ? 2 : 1, "stroke-opacity": first ? 0.55 : 0.13,
          d: `M${x(at - 1, b)} ${y(at - 1)}C${x(at - 1, b)} ${middle} ${x(at, e)} ${middle} ${x(at, e)} ${y(at)}` }));
      }
      chosen.forEach((e, rank) => {
        const dot = draw("circle", { cx: x(at, e), cy: y(at), r: rank ? 4.5 : 6 }, draw("title", {}, `${layerName(at)}, expert ${e}`));
        dot.style.fill = color(e);
        marks.append(dot);
      });
    });
    const said = routes.map((chosen, at) => `${layerName(at)}: ${named(chosen)}`).join("; ");
    holder.replaceChildren(picture(width, height, `Token ${picked + 1}. ${said}`, dots, ways, marks));
  }
  function loads() {  // with a number for every expert
    const found = mine ? counts : (state && state.load) || data.load || [];
    return experts.map((many, at) => Array.from({ length: many }, (_, e) => (found[at] && found[at][e]) || 0));
  }
  function drawLoad() {
    const found = loads(), row = found[layer] || [], many = row.length;
    const sum = row.reduce((a, b) => a + b, 0);
    const hint = mine ? `of the tokens of this text` : data.trace ? "of the whole trace" : state && state.live === false
      ? "of everybody, told in steps of many tokens, so that it is nobody's" : "of everybody since the server began";
    $("load-about").textContent = sum ? `${experts.length ? layerName(layer) : ""}: share of each expert, ${hint}` : `No load yet, ${hint}.`;
    const holder = $("load"), all = $("layers");
    if (!sum || !many) { holder.replaceChildren(); all.replaceChildren(); return; }
    const left = 40, width = wide(holder), step = (width - left) / many, most = Math.max(...row) / sum, high = 84;
    const bars = draw("g", {});
    for (let e = 0; e < many; e++) {
      const share = row[e] / sum, tall = Math.max(share ? 1.5 : 0, high * share / most);
      const bar = draw("rect", { x: left + e * step + (step > 4 ? 0.75 : 0), y: high + 6 - tall, width: Math.max(0.8, step - (step > 4 ? 1.5 : 0)), height: tall },
        draw("title", {}, `expert ${e}: ${percent(share)}`));
      bar.style.fill = color(e);
      bar.style.fillOpacity = focus === null || focus === e ? 1 : 0.3;
      bars.append(bar);
      const every = Math.max(1, Math.ceil(22 / step));
      if (e % every === 0) bars.append(draw("text", { x: left + (e + 0.5) * step, y: high + 20, "text-anchor": "middle" }, String(e)));
    }
    const even = high + 6 - high / many / most;
    bars.append(draw("path", { class: "cross", d: `M${left} ${even}H${width}` }), draw("text", { x: left - 5, y: even + 4, "text-anchor": "end" }, "even"));
    const order = row.map((count, e) => [count, e]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    const said = order.map(([count, e]) => `expert ${e} ${percent(count / sum)}`).join(", ");
    holder.replaceChildren(picture(width, high + 26, `${layerName(layer)}, busiest: ${said}`, bars));
    drawLayers(found, all, left);
  }
  function drawLayers(found, holder, left) {
    const width = wide(holder), high = experts.length > 24 ? 10 : 17, rows = draw("g", {});
    experts.forEach((many, at) => {
      const row = found[at] || [], sum = row.reduce((a, b) => a + b, 0), most = Math.max(1, ...row);
      const group = draw("g", { "data-layer": at }), step = (width - left) / many;
      if (at % Math.ceil(14 / high) === 0) group.append(draw("text", { x: left - 5, y: at * high + high / 2 + 4, "text-anchor": "end", class: at === layer ? "on" : "" }, String(at)));
      for (let e = 0; e < many; e++) {
        const cell = draw("rect", { class: "cell", x: left + e * step, y: at * high + 0.5, width: Math.max(0.6, step - (step > 4 ? 1 : 0)), height: high - 1 },
          draw("title", {}, `${layerName(at)}, expert ${e}: ${percent(sum ? row[e] / sum : 0)}`));
        cell.style.fillOpacity = (0.06 + 0.94 * row[e] / most).toFixed(3);
        group.append(cell);
      }
      if (at === layer) group.append(draw("rect", { class: "now", x: left - 1, y: at * high, width: width - left, height: high }));
      group.addEventListener("click", () => turn(at));
      rows.append(group);
    });
    holder.replaceChildren(picture(width, experts.length * high + 2, `Shares of all ${experts.length} layers; darker is busier`, rows));
  }

  // ---- keyboard
  $("text").addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20 };
    if (event.key in moves) pick(picked < 0 ? 0 : picked + moves[event.key]);
    else if (event.key === "Home") pick(0);
    else if (event.key === "End") pick(tokens.length - 1);
    else if (event.key === "ArrowDown") turn(layer + 1);
    else if (event.key === "ArrowUp") turn(layer - 1);
    else return;
    event.preventDefault();
  });
  $("layer").addEventListener("change", () => turn(Number($("layer").value)));
  $("numbers").addEventListener("click", () => {
    $("numbers").setAttribute("aria-pressed", String($("text").classList.toggle("numbers")));
  });
  function whose(value) {
    mine = value;
    $("mine").setAttribute("aria-pressed", String(mine));
    $("all").setAttribute("aria-pressed", String(!mine));
    drawLoad();
  }
  $("mine").addEventListener("click", () => whose(true));
  $("all").addEventListener("click", () => whose(false));
  let resized = 0;
  addEventListener("resize", () => { cancelAnimationFrame(resized); resized = requestAnimationFrame(() => { drawPath(); drawLoad(); }); });

  // ---- a server that answers
  const headers = () => ({ "Content-Type": "application/json", ...($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {}) });
  function trouble(words) { $("status").textContent = words; $("status").classList.add("error"); }
  async function refused(response) {
    if (response.status === 401) { $("key-label").hidden = false; $("key").focus(); }
    try { return (await response.json()).error.message; } catch { return `status ${response.status}`; }
  }
  async function* events(response) {
    const reader = response.body.getReader(), decoder = new TextDecoder();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += decoder.decode(value, { stream: true });
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) for (const line of part.split("\n"))
        if (line.startsWith("data:") && !line.includes("[DONE]")) yield JSON.parse(line.slice(5));
    }
  }
  function live(on) { $("run").disabled = on; $("stop").disabled = !on; }
  async function run() {
    if (abort) return;
    abort = new AbortController();
    clear();
    live(true);
    own = null;
    const prompt = $("prompt").value, began = performance.now();
    let first = 0, said = "";
    $("text").append(make("span", { class: "prompted", "aria-hidden": "true" }, prompt));
    const body = { model: $("name").value || data.model, prompt, max_tokens: Number($("tokens").value), stream: true, routes: true,
      temperature: Number($("temperature").value), seed: Number($("seed").value), stream_options: { include_usage: true } };
    try {
      const response = await fetch("v1/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: abort.signal });
      if (!response.ok) throw new Error(await refused(response));
      own = Number(response.headers.get("X-Turnout-Request"));
      for await (const chunk of events(response)) {
        if (chunk.error) throw new Error(chunk.error.message || String(chunk.error));
        for (const choice of chunk.choices || []) {
          if (choice.routes !== undefined || choice.text) {
            first = first || performance.now();
            add({ text: choice.text, routes: choice.routes });
          }
          said = choice.finish_reason || said;
        }
        schedule();
      }
      const seconds = (performance.now() - first) / 1000;
      const speed = tokens.length > 1 ? `, ${((tokens.length - 1) / seconds).toFixed(1)} tokens/s` : "";
      $("count").textContent = `${tokens.length} tokens, the first after ${((first - began) / 1000).toFixed(2)} s${speed}; ended by ${said || "nothing"}`;
    } catch (error) {
      if (error.name === "AbortError") $("count").textContent = `${tokens.length} tokens; stopped`;
      else { $("count").textContent = `${tokens.length} tokens`; trouble(error.message); }
    } finally {
      abort = null;
      live(false);
      drawLoad();
    }
  }
  let drawn = 0;
  function schedule() { if (!drawn) drawn = requestAnimationFrame(() => { drawn = 0; drawLoad(); $("text").scrollTop = $("text").scrollHeight; }); }

  const CACHE = {
    expert_slots: ["experts in memory", 1, 0, ""], expert_hits: ["asked for, and there", 1, 0, ""],
    expert_misses: ["asked for, and not there", 1, 0, ""], expert_waits_s: ["time waited for experts", 1, 2, " s"],
    expert_fetched_bytes: ["read from files", 1e-6, 1, " MB"], expert_prefetched: ["fetched ahead", 1, 0, ""],
    expert_prefetched_used: ["fetched ahead, and used", 1, 0, ""], expert_evicted: ["let go again", 1, 0, ""],
  };
  function facts(holder, rows) {
    holder.replaceChildren(make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
  }
  function showState() {
    const { running, waiting, slots, together, pages, pages_used: used, pages_kept: kept, counts: others } = state;
    $("status").classList.toggle("error", !state.alive);
    $("status").textContent = state.alive ? `${running} of ${slots} requests running, ${waiting} waiting; ${large(state.tokens_out)} tokens made` : `The engine does not run: ${state.trouble}`;
    $("batch-about").textContent = together.length ? `${together.length} in the last step` : "idle";
    $("batch").replaceChildren(...together.map((number) => make("span", { class: number === own ? "who own" : "who" }, number === own ? `yours, ${number}` : `request ${number}`)));
    $("pages-about").textContent = pages ? `${large(pages)} pages` : "no pages";
    const meter = make("div", { class: "meter", role: "img", "aria-label": `${used} pages in use, ${kept} kept` });
    [[used, "var(--r0)"], [kept, "var(--r4)"]].forEach(([value, tint]) => {
      const part = make("i");
      part.style.width = pages ? `${100 * value / pages}%` : "0";
      part.style.setProperty("--c", tint);
      meter.append(part);
    });
    facts($("pages"), [["in use", large(used)], ["kept for the same beginnings", large(kept)], ["tokens read", large(state.tokens_in)], ["not read again", large(state.tokens_cached)]]);
    if (pages) $("pages").prepend(meter);
    const rows = Object.entries(others).map(([name, value]) => {
      const [words, scale, digits, unit] = CACHE[name] || [name.replaceAll("_", " "), 1, 3, ""];
      if (typeof value !== "number") return [words, String(value)];
      return [words, `${(scale * value).toLocaleString("en", { maximumFractionDigits: digits })}${unit}`];
    });
    $("cache-about").textContent = rows.length ? "" : "all experts are in memory";
    facts($("cache"), rows);
    if (state.load) {
      state.load.forEach((row, at) => { if ((experts[at] || 0) < row.length) { experts[at] = row.length; layersChanged(); } });
      if (!mine) drawLoad();
    }
  }
  async function poll() {
    let wait = 1000;
    if (!document.hidden) try {
      const response = await fetch("viewer/state", { headers: headers() });
      if (!response.ok) throw new Error(await refused(response));
      state = await response.json();
      showState();
    } catch (error) {
      trouble(error instanceof TypeError ? "The server does not answer." : error.message);
      wait = 4000;
    }
    setTimeout(poll, wait);
  }

  // ---- a recorded trace
  function open(at) {
    clear();
    const one = data.trace.documents[at];
    one.tokens.forEach((text, place) => add({ text, routes: one.routes.map((routed) => routed[place]) }, true));
    $("count").textContent = `${one.tokens.length} tokens of ${one.length}`;
    drawLoad();
  }

  $("model").textContent = data.model;
  layersChanged();
  if (data.trace) {
    $("ask").hidden = $("server").hidden = true;
    $("documents").hidden = false;
    $("status").textContent = data.trace.says;
    data.trace.documents.forEach((one, at) => $("document").append(make("option", { value: at }, one.title)));
    $("document").addEventListener("change", () => open(Number($("document").value)));
    if (data.trace.documents.length) open(0);
  } else {
    data.models.forEach((name) => $("name").append(make("option", { value: name }, name)));
    $("name-label").hidden = data.models.length < 2;
    $("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
    $("stop").addEventListener("click", () => abort && abort.abort());
    addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
      if (event.key === "Escape" && abort) abort.abort();
    });
    drawLoad();
    poll();
  }
})();
