"""The page of a conversion: one self-contained html file that shows a model before and after its steps."""

import dataclasses
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Self

from turnout.errors import CheckpointError, word
from turnout.expects import expects
from turnout.measure.certificate import Certificate
from turnout.measure.report import quantity
from turnout.reading import check_fields, read_json, read_text
from turnout.show.bars import expert_cells, gap_bars, pair_bars, share_bars
from turnout.show.charts import tracks
from turnout.show.conversion_record import check_record
from turnout.show.page import dot, flat, fold, frame, missing, table
from turnout.show.stock import stock_loads, stock_section

__all__ = ["ConversionData", "conversion_html"]

# What keeps the page small whatever the model.
_LAYERS, _VALUES = 32, 16
_VERDICTS = {"bit-equal": "the same to the bit", "within bound": "the same within the bound", "different": "different"}


@dataclasses.dataclass(frozen=True)
class ConversionData:
    """A finished conversion as plain data.

    Args:
        name: of the new folder.
        record: "conversion" of its run.json: source, steps with their reports, plan, held_out, command, hardware.
        certificate: of the input against the output; None where there is none.

    >>> record = {"source": "models/big", "steps": [], "plan": [{"name": "input"}]}
    >>> ConversionData("small", record).source
    'big'

    Source: none; plain bookkeeping.
    """

    name: str
    record: Mapping[str, Any]
    certificate: Certificate | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The conversion that made a folder.

        Raises:
            CheckpointError: it is no conversion's, or a file is damaged.
        """
        folder = Path(folder)

        def refuse(problem: str) -> CheckpointError:
            got, fix = f"{folder} ({problem})", "name a folder that turnout convert wrote"
            where = "ConversionData.open"
            return CheckpointError(word("the folder", got=got, allowed="be a conversion's", where=where, fix=fix))

        try:
            body = read_json(folder / "run.json", refuse=refuse, finite=False)
            found = folder / "certificate.json"
            certificate = Certificate.from_json(read_text(found)) if found.is_file() else None
        except OSError as error:
            raise refuse(str(error)) from error
        check_fields(body, {"conversion": dict}, refuse)
        check_record(body["conversion"], refuse)
        return cls(folder.resolve().name, body["conversion"], certificate)

    @property
    def source(self) -> str:
        """The name of the folder that was converted."""
        return Path(self.record["source"]).name

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The model before the first step, and after each."""
        return self.record["plan"]

    @property
    def held_out(self) -> Mapping[str, Any]:
        """Both models on held-out text; empty where there was none."""
        return self.record.get("held_out") or {}


@expects(data=ConversionData)
def conversion_html(data: ConversionData) -> str:
    """One html page: sizes before and after, the certificate, what each step changed, and the load of experts.

    Like ``report_html`` it holds everything that it shows, escapes every text, and says what is missing.

    Args:
        data: the conversion.

    Returns:
        The text of the file, to be written as UTF-8.

    >>> row = {"name": "input", "config": {}, "params": 8, "params_active": 8, "memory_bytes": 32, "flops": 16.0}
    >>> record = {"source": "<b>x</b>", "steps": [], "plan": [row], "held_out": None}
    >>> page = conversion_html(ConversionData("y", record))
    >>> "<b>x</b>" in page, "no text was given" in page
    (False, True)

    Source: none; the drawings are our own.
    """
    experts = most_experts(data)
    title = f"{data.source} → {data.name}"
    head = (
        f'<header>{tracks(experts, [0, 1])}<div class="inner"><p class="eyebrow">{escape(title)}</p>'
        f'<h1>{escape(conversion_headline(data))}.</h1><ul class="lead">{_facts(data)}</ul></div></header>'
    )
    payload = {"colors": max(1, min(experts, 64)), "charts": [], "passages": []}
    return frame(title, head, conversion_sections(data), experts=experts, payload=payload)


def most_experts(data: ConversionData) -> int:
    """The experts of the model that has most of them, before or after."""
    return max([_experts(row) for row in data.rows], default=0)


def conversion_sections(data: ConversionData) -> list[str]:
    """What the page shows under its heading."""
    asked = stock_section(data.record.get("stock"))
    return [_sizes(data), _certificate(data), asked, _steps(data), _load(data), _setup(data)]


def conversion_headline(data: ConversionData) -> str:
    """The key result in one sentence, and whether transformers loads it."""
    return "; ".join(part for part in (_result(data), stock_loads(data.record.get("stock"))) if part)


def conversion_size(data: ConversionData) -> str:
    """How many parameters are left, or came about, against the input."""
    ratio = data.rows[-1]["params"] / max(1, data.rows[0]["params"])
    if ratio < 0.995:
        return f"{100 * (1 - ratio):.0f} % fewer parameters"
    return f"{ratio:.3g} times the parameters" if ratio > 1.005 else "as many parameters"


def _result(data: ConversionData) -> str:
    size = conversion_size(data)
    verdict = data.certificate.verdict if data.certificate else ""
    if verdict == "bit-equal":
        return f"{data.name} computes what {data.source} does, to the bit, with {size}"
    if verdict == "within bound":
        return f"{data.name} computes what {data.source} does, with {size}"
    if data.certificate and data.certificate.lost:
        return f"{data.name} has {size}; {data.certificate.lost} (A is {data.source})"
    if data.held_out:
        before, after = (data.held_out[when]["bits_per_byte"] for when in ("before", "after"))
        return f"{data.name} has {size}, and needs {after:.3f} bits per byte where {data.source} needs {before:.3f}"
    return f"{data.name} has {size}, and computes something else than {data.source}"


def flops_label(data: ConversionData) -> str:
    """The name of that number; a record of before this does not say how much context it is for."""
    seq = data.record.get("seq")
    return f"FLOPs a token, {seq} of context" if seq else "FLOPs a token"


def _facts(data: ConversionData) -> str:
    facts = []
    for n, (name, row) in enumerate(((data.source, data.rows[0]), (data.name, data.rows[-1]))):
        parts = [f"{quantity(row['params'])} parameters", f"{quantity(row['params_active'])} active"]
        parts += [f"{quantity(row['memory_bytes'])}B", f"{quantity(row['flops'])} FLOPs a token"]
        facts.append(f"<li>{dot(n)}<b>{escape(name)}</b> {escape(' · '.join(parts))}</li>")
    return "".join(facts)


def _sizes(data: ConversionData) -> str:
    measures = [
        ("parameters", "params", ""),
        ("active parameters", "params_active", ""),
        ("memory of weights", "memory_bytes", "B"),
        (flops_label(data), "flops", ""),
    ]
    first, last = data.rows[0], data.rows[-1]
    bars = [
        (name, first[key], last[key], quantity(first[key]) + unit, quantity(last[key]) + unit)
        for name, key, unit in measures
    ]
    lines = [(name, [quantity(row[key]) + unit for row in data.rows]) for name, key, unit in measures]
    lines.append(("experts a layer", [_shape(row, "num_experts") for row in data.rows]))
    lines.append(("of them different", [_different(row) for row in data.rows]))
    lines.append(("experts a token", [_shape(row, "top_k") for row in data.rows]))
    lines.append(("neurons of an expert", [_shape(row, "hidden") for row in data.rows]))
    if data.held_out:
        found = [f"{data.held_out[when]['bits_per_byte']:.4f}" for when in ("before", "after")]
        lines.append(("held-out bits per byte", [found[0], *["–"] * (len(data.rows) - 2), found[1]][: len(data.rows)]))
        bytes_, note = data.held_out["bytes"], "of the text, which no step looked at"
        about = f"Bits per byte are over {bytes_:,} bytes {note}; lower is better."
    else:
        about = (
            "Bits per byte were not measured: no text was given with --calibration, or too little to hold some out, or "
            "a model gives no finite numbers."
        )
    names = "".join(f"<th>{escape(row['name'])}</th>" for row in data.rows)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in lines
        if any(cell != "–" for cell in cells)
    )
    grid = f"<table><thead><tr><th></th>{names}</tr></thead><tbody>{body}</tbody></table>"
    return (
        f'<section><h2>Before and after</h2><p class="about">{escape(about)}</p><div class="two">'
        f'<div class="card">{_caption("before and after", "")}{pair_bars(bars)}</div>'
        f'<div class="card scroll">{grid}</div></div></section>'
    )


def _certificate(data: ConversionData) -> str:
    found = data.certificate
    title = "Does it compute the same?"
    if found is None:
        return f"<section><h2>{title}</h2>{missing('There is no certificate.json.')}</section>"
    gap = found.logits
    rows = [
        ["largest relative difference", f"{_number(gap.relative)} (bound {_number(found.bound)})"],
        ["largest difference of a logit", _number(gap.max_abs)],
        ["KL a token", f"{_number(gap.kl_mean)} nats, at most {_number(gap.kl_max)}"],
        ["same likeliest token", f"{100 * gap.top1:.4g} %"],
        ["compared on", f"{found.inputs.tokens:,} tokens, {found.inputs.source}"],
        ["weights of the input", f"sha256 {(found.a.weights_sha256 or '–')[:16]}…"],
        ["weights of the output", f"sha256 {(found.b.weights_sha256 or '–')[:16]}…"],
    ]
    shown = [
        (name, value) for name, value in found.layers.items() if name.startswith("blocks.") and name.count(".") == 1
    ]
    shown = [(f"layer {name.removeprefix('blocks.')}", value) for name, value in shown]
    if shown:
        inside = gap_bars([shown[n] for n in _some(len(shown))], found.bound)
    else:
        inside = missing("All layers give the same bits." if found.verdict == "bit-equal" else "No layer was compared.")
    kind = "same" if found.equal else "other"
    about = f"A is the input, B the output. {str(found).splitlines()[0].partition(': ')[2]}."
    verdict = f'<p class="verdict {kind}">{escape(_VERDICTS[found.verdict])}</p>'
    return (
        f'<section><h2>{title}</h2><p class="about">{escape(about)}</p><div class="two">'
        f'<div class="card">{_caption("input against output", "")}{verdict}{table(rows)}</div>'
        f'<div class="card">{_caption("output of each layer", "relative difference")}{inside}</div></div></section>'
    )


def _steps(data: ConversionData) -> str:
    parts = []
    for number, step in enumerate(data.record["steps"], 1):
        report, caption = step["report"], _caption(f"{number} {step['step']}", "")
        values: dict[str, Any] = report["values"]
        notes = "".join(f'<p class="small">{escape(note)}</p>' for note in report.get("notes") or ())
        card = f'<div class="card">{caption}{table(_whole(values))}{notes}</div>'
        drawn = _drawn(values)
        cells = f'<div class="card">{_caption("experts of each layer", drawn[1])}{drawn[0]}</div>' if drawn else ""
        by_layer = {name: value for name, value in values.items() if isinstance(value, dict) and value}
        rest = fold(f"{step['step']}: values of each layer", _by_layer(by_layer)) if by_layer else ""
        parts.append(f'<div class="two">{card}{cells}</div>{rest}')
    inside = "".join(parts) or missing("No step was taken: the model was written in another format.")
    return f'<section><h2>What each step changed</h2><p class="about">As each step reports it.</p>{inside}</section>'


def _whole(values: Mapping[str, Any]) -> list[list[str]]:
    """What a step reports of the whole model; numbers before and after in one line."""
    rows = []
    for name, value in values.items():
        start = name.removesuffix("_before")
        if start != name and f"{start}_after" in values:
            rows.append([start.replace("_", " "), f"{quantity(value)} → {quantity(values[f'{start}_after'])}"])
        elif not isinstance(value, dict) and f"{name.removesuffix('_after')}_before" not in values:
            rows.append([name.replace("_", " "), _plain(value)])
    return rows


def _drawn(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Which experts of each layer went, or whom they joined, as a drawing, with what it means."""
    weight = values.get("scores") or values.get("frequency") or {}
    rows, meaning = [], ""
    if "leader" in values:
        for layer, leader_E in values["leader"].items():
            most = max(weight.get(layer) or [1]) or 1
            strength_E = [value / most for value in weight.get(layer) or [1] * len(leader_E)]
            about = [f"joins {leader}" if leader != e else "leads" for e, leader in enumerate(leader_E)]
            rows.append((f"layer {layer}", list(zip(leader_E, strength_E, about, strict=True))))
        meaning = "the number is the expert that each became; stronger: used more"
    elif "kept" in values and isinstance(values["kept"], dict):
        for layer, kept in values["kept"].items():
            score_E = weight.get(layer) or [1.0] * (max(kept) + 1)
            most = max(score_E) or 1
            cells = [
                (e if e in kept else None, score / most, f"{'kept' if e in kept else 'dropped'}, score {score:.3g}")
                for e, score in enumerate(score_E)
            ]
            rows.append((f"layer {layer}", cells))
        meaning = "hollow: dropped; stronger: a higher score"
    return (expert_cells([rows[n] for n in _some(len(rows))]), meaning) if rows else None


def _by_layer(values: Mapping[str, Any]) -> str:
    layers = list(dict.fromkeys(layer for value in values.values() for layer in value))
    head = "".join(f"<th>{escape(name)}</th>" for name in values)
    rows = [[str(layer), *(_plain(value.get(layer, "–")) for value in values.values())] for layer in layers[:256]]
    return table(rows, head)


def _load(data: ConversionData) -> str:
    title = "Expert load on held-out text"
    cards = []
    kept = _numbers(data)
    for n, (when, row) in enumerate((("before", data.rows[0]), ("after", data.rows[-1]))):
        found = data.held_out.get(when) or {}
        if not found.get("load") or not _experts(row):
            continue
        rows = []
        for layer, share_E in zip(found["layers"], found["load"], strict=True):
            numbers = kept.get(layer) if when == "after" else None
            same = numbers is not None and len(numbers) == len(share_E)
            rows.append((f"layer {layer}", share_E, numbers if same and numbers else range(len(share_E))))
        worst = max(max(share_E) * len(share_E) - 1 for _, share_E, _ in rows)
        caption = f"{dot(n)}{escape(data.source if n == 0 else data.name)}"
        inside = share_bars([rows[k] for k in _some(len(rows))])
        note = f"MaxVio at most {worst:.2f}"
        cards.append(
            f'<div class="card"><div class="caption"><h3>{caption}</h3><span>{note}</span></div>{inside}</div>'
        )
    if not cards:
        reason = "neither model has experts" if data.held_out else "no text was given with --calibration"
        return f"<section><h2>{title}</h2>{missing(f'Nothing to show: {reason}.')}</section>"
    about = "The share of tokens that each expert of a layer gets; dotted lines: where the borders of an even load lie."
    return f'<section><h2>{title}</h2><p class="about">{about}</p><div class="two">{"".join(cards)}</div></section>'


def _numbers(data: ConversionData) -> dict[int, list[int]]:
    """By layer, the number that each expert of the result had in the input, where experts were only dropped."""
    found: dict[int, list[int]] = {}
    for step in data.record["steps"]:
        kept = step["report"]["values"].get("kept")
        if not isinstance(kept, dict):
            return {}
        found = {int(n): [found[int(n)][e] if int(n) in found else e for e in ids] for n, ids in kept.items()}
    return found


def _setup(data: ConversionData) -> str:
    about = {name: data.record.get(name) for name in ("source", "as_format", "dtype", "seed", "calibration")}
    steps = {
        f"step {n}": {k: v for k, v in step.items() if k != "report"} for n, step in enumerate(data.record["steps"], 1)
    }
    asked = [[key, value] for key, value in flat({**about, **steps}).items()]
    hardware = [[key, value] for key, value in flat(data.record.get("hardware") or {}).items()]
    command = str(data.record.get("command") or "")
    parts = [fold("What was asked", table(asked), opened=True)]
    parts.append(fold("Hardware and versions", table(hardware) if hardware else missing("Not recorded.")))
    inside = f'<pre class="command">{escape(command)}</pre>' if command else missing("Not recorded.")
    parts.append(fold("Command", inside, opened=True))
    return f"<section><h2>How it was made</h2>{''.join(parts)}</section>"


def _caption(title: str, note: str) -> str:
    return f'<div class="caption"><h3>{escape(title)}</h3><span>{escape(note)}</span></div>'


def _experts(row: Mapping[str, Any]) -> int:
    moe = row["config"].get("moe")
    return moe["num_experts"] if moe else 0


def _shape(row: Mapping[str, Any], name: str) -> str:
    moe = row["config"].get("moe")
    return str(moe[name]) if moe else "–"


def _different(row: Mapping[str, Any]) -> str:
    distinct = (row["config"].get("moe") or {}).get("distinct")
    return f"about {sum(distinct) / len(distinct):g}" if distinct else "–"


def _some(count: int) -> list[int]:
    """At most so many layers as a page has room for, evenly spread, with the first and the last."""
    return list(range(count)) if count <= _LAYERS else [round(n * (count - 1) / (_LAYERS - 1)) for n in range(_LAYERS)]


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        shown = ", ".join(_plain(item) for item in value[:_VALUES])
        return shown if len(value) <= _VALUES else f"{shown}, … ({len(value)} in all)"
    return str(value)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
