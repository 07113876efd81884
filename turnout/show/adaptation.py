"""The page of a choice of adapters: what each is worth on a text, and which of them the router takes where."""

import dataclasses
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Self

from turnout.errors import CheckpointError, word
from turnout.expects import expects
from turnout.reading import read_json
from turnout.show.bars import share_bars, value_bars
from turnout.show.charts import tracks
from turnout.show.page import flat, fold, frame, missing, table
from turnout.show.palette import expert_color

__all__ = ["AdaptationData", "adaptation_html"]

_MAPS = 48  # linear maps that are drawn


@dataclasses.dataclass(frozen=True)
class AdaptationData:
    """A finished choice of adapters as plain data.

    Args:
        name: of the new folder.
        record: its run.json: settings, adapters, loss, share, share_by_map, report, command, hardware.

    >>> AdaptationData("routed", {"settings": {"source": "models/base"}}).base
    'base'

    Source: none; plain bookkeeping.
    """

    name: str
    record: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The choice of adapters that is in a folder.

        Raises:
            CheckpointError: there is none, or its run.json is damaged.
        """
        folder = Path(folder)
        try:
            found = cls(folder.resolve().name, read_json(folder / "run.json"))
            adaptation_html(found)  # which reads all that it must hold
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            got, fix = f"{folder} ({type(error).__name__}: {error})", "name a folder that convert --adapters wrote"
            allowed = "hold a choice of adapters"
            raise CheckpointError(
                word("the folder", got=got, allowed=allowed, where="AdaptationData.open", fix=fix)
            ) from error
        return found

    @property
    def base(self) -> str:
        """The name of the model that the adapters are for."""
        return Path(self.record["settings"]["source"]).name


@expects(data=AdaptationData)
def adaptation_html(data: AdaptationData) -> str:
    """One html page: the loss without adapters, with each alone, with all of them evenly and routed; and who is chosen.

    Like ``report_html`` it holds everything that it shows, escapes every text, and says what is missing.

    Args:
        data: the choice.

    Returns:
        The text of the file, to be written as UTF-8.

    >>> report = {"values": {"router": "arrow", "params_added": 96, "modules": ["0"]}}
    >>> one = {"name": "<b>a</b>", "ranks": [2], "params": 96, "maps": 1, "gates": False}
    >>> record = {"settings": {"source": "base"}, "adapters": [one], "loss": {}, "share": {}, "report": report}
    >>> page = adaptation_html(AdaptationData("out", record))
    >>> "<b>a</b>" in page, "no text was given" in page
    (False, True)

    Source: none; the drawings are our own.
    """
    adapters = data.record["adapters"]
    title = f"{data.base} → {data.name}"
    items = "".join(
        f'<li><i class="dot" style="--c:{expert_color(n)}"></i><b>{escape(one["name"])}</b> '
        f"rank {escape(_ranks(one))} · {one['params']:,} parameters</li>"
        for n, one in enumerate(adapters)
    )
    head = (
        f'<header>{tracks(len(adapters), [0, 1])}<div class="inner"><p class="eyebrow">{escape(title)}</p>'
        f'<h1>{escape(adaptation_headline(data))}.</h1><ul class="lead">{items}</ul></div></header>'
    )
    payload = {"colors": max(1, min(len(adapters), 64)), "charts": [], "passages": []}
    return frame(title, head, adaptation_sections(data), experts=len(adapters), payload=payload)


def adaptation_sections(data: AdaptationData) -> list[str]:
    """What the page shows under its heading."""
    return [_worth(data), _chosen(data), _adapters(data), _setup(data)]


def adaptation_headline(data: AdaptationData) -> str:
    """The key result in one sentence."""
    loss, router = data.record["loss"], data.record["report"]["values"]["router"]
    count = len(data.record["adapters"])
    if not loss:
        return f"{count} adapters on {data.base}, routed by {router}"
    if not all(map(math.isfinite, loss.values())):
        lost = [name for name, value in loss.items() if not math.isfinite(value)]
        return f"{count} adapters on {data.base}, routed by {router}; the loss is not finite: {', '.join(lost)}"
    alone = min(value for name, value in loss.items() if name not in ("base", "all, evenly", "routed"))
    best = "better than" if loss["routed"] < min(alone, loss["all, evenly"]) else "not better than"
    return f"Routed by {router}, {count} adapters are {best} the best of them alone and than all of them evenly"


def _worth(data: AdaptationData) -> str:
    loss = data.record["loss"]
    if not loss:
        inside = missing("no text was given: --calibration PATH measures the model on one")
        return _section("What they are worth", "", inside)
    note = f"Nats a token of {data.record['text']['tokens']:,} tokens of the text; lower is better."
    names = [*(name for name in loss if name != "routed"), "routed"]
    rows = [(name, loss[name], f"{loss[name]:.4f}", 1 if name == "routed" else 0) for name in names]
    return _section("What they are worth", note, f'<div class="two"><div class="card">{value_bars(rows)}</div></div>')


def _chosen(data: AdaptationData) -> str:
    share = data.record.get("share_by_map") or {}
    if not share:
        return ""
    names = [one["name"] for one in data.record["adapters"]]
    rows = [
        (_short(module), [found.get(name, 0.0) for name in names], list(range(len(names))))
        for module, found in list(share.items())[:_MAPS]
    ]
    note = "The share of the routing's weight that each adapter gets at every linear map; dotted lines: an even share."
    more = f"<p>The first {_MAPS} of {len(share)} maps.</p>" if len(share) > _MAPS else ""
    overall = {name: f"{100 * value:.1f} %" for name, value in data.record["share"].items()}
    cards = f'<div class="card"><div class="caption"><h3>at each linear map</h3></div>{share_bars(rows)}{more}</div>'
    cards += f'<div class="card"><div class="caption"><h3>over all maps</h3></div>{table([*overall.items()])}</div>'
    return _section("Who is chosen", note, f'<div class="two">{cards}</div>')


def _adapters(data: AdaptationData) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("rank", "parameters", "linear maps", "gates"))
    rows = [
        (one["name"], _ranks(one), f"{one['params']:,}", str(one["maps"]), "yes" if one["gates"] else "no")
        for one in data.record["adapters"]
    ]
    return _section("The adapters", "As their folders hold them.", f'<div class="card">{table(rows, head)}</div>')


def _setup(data: AdaptationData) -> str:
    asked = fold("What was asked", table([*flat(data.record["settings"]).items()]), opened=True)
    where = {key: data.record[key] for key in ("command", "turnout", "hardware") if key in data.record}
    return _section("How it was made", "", asked + fold("Where it ran", table([*flat(where).items()])))


def _section(title: str, note: str, inside: str) -> str:
    lead = f'<p class="about">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{inside}</section>"


def _short(module: str) -> str:
    """The layer's number and the map's own name: "3 gate" for "model.layers.3.mlp.gate_proj"."""
    parts = module.split(".")
    return " ".join([*(part for part in parts if part.isdigit()), parts[-1].removesuffix("_proj")])


def _ranks(one: Mapping[str, Any]) -> str:
    low, high = min(one["ranks"]), max(one["ranks"])
    return str(low) if low == high else f"{low}-{high}"
