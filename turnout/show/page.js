"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const SVG = document.querySelector("svg").namespaceURI;
  const percent = (share) => (share / 100).toFixed(1) + " %";
  const color = (expert) => `var(--e${expert % data.colors})`;

  // Elements are made from text nodes only: nothing that a run or a document says is ever parsed as HTML.
  function make(tag, options, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(options || {})) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  function swatch(expert) {
    const mark = make("i");
    mark.style.setProperty("--c", color(expert));
    return make("span", { class: "who" }, mark, String(expert));
  }
  function show(x, y, ...children) {
    tip.replaceChildren(...children);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
    tip.style.left = Math.max(6, Math.min(left, innerWidth - box.width - 6)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(6, y - box.height - 14) : y + 18) + "px";
  }
  const hide = () => { tip.hidden = true; };

  function short(value) {
    for (const [size, letter] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]])
      if (value >= size) return (value / size).toPrecision(3) + letter;
    return String(Math.round(value));
  }
  function nearest(points, x) {
    let best = 0;
    points.forEach((point, index) => { if (Math.abs(point[0] - x) < Math.abs(points[best][0] - x)) best = index; });
    return points[best];
  }

  const readers = {
    lines(chart, x, y, marks) {
      const { frame } = chart;
      const wanted = frame.x[0] + ((x - frame.left) / frame.width) * (frame.x[1] - frame.x[0]);
      const end = ({ points }) => points[points.length - 1][0];
      const longest = chart.series.reduce((a, b) => (end(b) > end(a) ? b : a));
      const at = nearest(longest.points, wanted)[0];
      const left = frame.left + ((at - frame.x[0]) / (frame.x[1] - frame.x[0])) * frame.width;
      const cross = document.createElementNS(SVG, "path");
      cross.setAttribute("class", "cross");
      cross.setAttribute("d", `M${left} ${frame.top}V${frame.top + frame.height}`);
      marks.append(cross);
      // A run that had ended by then says nothing there.
      const going = chart.series.filter((series) => at <= end(series) * 1.01);
      const rows = going.map((series) => {
        const point = nearest(series.points, at);
        const up = (point[1] - frame.y[0]) / (frame.y[1] - frame.y[0]);
        if (up <= 1) {
          const dot = document.createElementNS(SVG, "circle");
          dot.setAttribute("cx", frame.left + ((point[0] - frame.x[0]) / (frame.x[1] - frame.x[0])) * frame.width);
          dot.setAttribute("cy", frame.top + (1 - up) * frame.height);
          dot.setAttribute("r", 4);
          dot.style.fill = series.color;
          marks.append(dot);
        }
        const mark = make("i", { class: "dot" });
        mark.style.setProperty("--c", series.color);
        return make("div", {}, mark, series.name + " ", make("b", {}, point[1].toFixed(chart.digits)));
      });
      const where = chart.over === "tokens" ? short(at) : at.toFixed(2);
      return [make("div", { class: "small" }, `${where} ${chart.over}`), ...rows];
    },
    load(chart, x, y) {
      const { frame } = chart;
      const inside = Math.max(0, Math.min(1, (x - frame.left) / frame.width));
      const at = chart.steps[0] + inside * (chart.steps[chart.steps.length - 1] - chart.steps[0]);
      const index = chart.steps.indexOf(nearest(chart.steps.map((step) => [step]), at)[0]);
      let height = (1 - (y - frame.top) / frame.height) * 10000;
      const shares = chart.shares[index];
      let expert = shares.findIndex((share) => (height -= share) <= 0);
      if (expert < 0) expert = shares.length - 1;
      const even = 10000 / shares.length;
      return [make("div", { class: "small" }, `${chart.name}, ${short(chart.steps[index])} tokens`),
        make("div", {}, "expert ", swatch(expert), " ", make("b", {}, percent(shares[expert]))),
        make("div", { class: "small" }, `${(shares[expert] / even).toFixed(2)} times the even share of ${percent(even)}`)];
    },
    domains(chart, x, y) {
      const { frame } = chart;
      const column = Math.floor(((x - frame.left) / frame.width) * chart.experts.length);
      const row = Math.floor((y / frame.height) * chart.domains.length);
      if (column < 0 || column >= chart.experts.length || row < 0 || row >= chart.domains.length) return null;
      const share = chart.shares[row][column], whole = chart.overall[column];
      const times = whole ? `${(share / whole).toFixed(2)} times ` : "";
      return [make("div", {}, "expert ", swatch(chart.experts[column]), " gets ", make("b", {}, percent(share))),
        make("div", { class: "small" }, `of ${chart.domains[row]}; ${times}its share of all text, ${percent(whole)}`)];
    },
  };

  document.querySelectorAll("[data-chart]").forEach((holder) => {
    const chart = data.charts[Number(holder.dataset.chart)];
    const svg = holder.querySelector("svg");
    const marks = svg.appendChild(document.createElementNS(SVG, "g"));
    const leave = () => { marks.replaceChildren(); hide(); };
    const move = (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      marks.replaceChildren();
      const said = readers[chart.kind](chart, place.x, place.y, marks);
      if (said) show(event.clientX, event.clientY, ...said); else hide();
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", leave);
  });

  const holder = document.querySelector(".passage");
  if (!data.passages.length || !holder) return;
  let passage = data.passages[0];
  let tokens = [...holder.querySelectorAll(".t")];
  let layer = 0, focus = null, current = -1;

  function paint() {
    tokens.forEach((token, index) => {
      const route = passage.routes[layer][index] || [];
      token.style.setProperty("--a", route.length ? color(route[0][0]) : "transparent");
      token.style.setProperty("--b", route.length > 1 ? color(route[1][0]) : "transparent");
      token.style.setProperty("--w", route.length ? Math.round(18 + 46 * Math.max(0, Math.min(1, route[0][1]))) + "%" : "0%");
      token.dataset.n = route.map((entry) => entry[0]).join("·");
      token.classList.toggle("dim", focus !== null && !route.some((entry) => entry[0] === focus));
    });
  }
  function card(index) {
    const rows = passage.routes.map((routes, at) => {
      const row = make("tr", at === layer ? { class: "now" } : {});
      const cell = (...items) => row.append(make("td", {}, ...items));
      const route = routes[index];
      const list = (pick) => route.flatMap((entry, k) => [k ? ", " : "", pick(entry)]);
      cell(passage.layers[at]);
      cell(...(route.length ? route.flatMap((entry) => [swatch(entry[0]), " "]) : ["dropped"]));
      cell(...list((entry) => entry[1].toFixed(2)));
      cell(...list((entry) => (entry[2] === null ? "–" : entry[2].toFixed(3))));
      return row;
    });
    const head = make("tr", {}, ...["layer", "experts", "weights", "scores"].map((name) => make("td", {}, name)));
    const from = Math.max(0, Math.min(layer - 5, rows.length - 12));
    const text = JSON.stringify(passage.tokens[index]).slice(1, -1);
    return [make("code", {}, text || " "), make("table", {}, head, ...rows.slice(from, from + 12))];
  }
  function point(index, x, y) {
    if (tokens[current]) tokens[current].classList.remove("on");
    current = index;
    tokens[index].classList.add("on");
    show(x, y, ...card(index));
  }
  const pointed = (event) => {
    const index = tokens.indexOf(event.target.closest(".t"));
    if (index >= 0) point(index, event.clientX, event.clientY);
  };
  const left = () => { if (tokens[current]) tokens[current].classList.remove("on"); hide(); };
  holder.addEventListener("pointermove", pointed);
  holder.addEventListener("pointerdown", pointed);
  holder.addEventListener("pointerleave", left);
  holder.addEventListener("blur", left);
  holder.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(tokens.length - 1, current + step));
    tokens[index].scrollIntoView({ block: "nearest" });
    const box = tokens[index].getBoundingClientRect();
    point(index, box.left, box.bottom);
  });
  // The first passage is in the page; another one takes its place when it is chosen.
  function turn(index) {
    passage = data.passages[index];
    current = -1;
    tokens = passage.tokens.map((text) => make("span", { class: "t" }, text));
    holder.replaceChildren(...tokens);
    holder.scrollTop = 0;
    document.getElementById("origin").textContent = passage.title;
    document.getElementById("count").textContent = `${tokens.length} tokens`;
    const seen = {};
    for (const [expert] of passage.routes.flat(2)) seen[expert] = (seen[expert] || 0) + 1;
    document.querySelectorAll("[data-expert]").forEach((chip) => {
      const expert = Number(chip.dataset.expert);
      chip.title = `expert ${expert}: ${seen[expert] || 0} entries in this passage`;
    });
  }
  function choose(name, pick) {
    const buttons = [...document.querySelectorAll(`[data-${name}]`)];
    buttons.forEach((button) => button.addEventListener("click", () => {
      const value = Number(button.dataset[name]);
      const off = name === "expert" && focus === value;
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button && !off)));
      pick(off ? null : value);
      paint();
    }));
  }
  choose("passage", turn);
  choose("layer", (value) => { layer = value; });
  choose("expert", (value) => { focus = value; });
  const select = document.getElementById("layer");
  if (select) select.addEventListener("change", () => { layer = Number(select.value); paint(); });
  const numbers = document.getElementById("numbers");
  numbers.addEventListener("click", () => {
    const on = holder.classList.toggle("numbers");
    numbers.setAttribute("aria-pressed", String(on));
  });
  paint();
})();
