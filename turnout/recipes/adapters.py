"""Adapters on disk to one folder with a router, and what they are worth on a text: each alone, all at once, routed."""

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from turnout import __version__
from turnout.errors import CheckpointError, MissingExtraError, UsageError, nearest, word
from turnout.hub import located
from turnout.measure import hardware
from turnout.models.checkpoint import PeftAdapter, read_adapter
from turnout.models.checkpoint.own import read_json
from turnout.models.placed import roomy
from turnout.reading import check_fields
from turnout.recipes.again import as_before
from turnout.recipes.calibration import Calibration, calibration
from turnout.recipes.partial import Part, Say, unfinished
from turnout.recipes.worth import alone, nats, weights
from turnout.reshape import attach, save_adapters, train_gates
from turnout.reshape.adapters.routers import ROUTERS, check_options, even
from turnout.show import AdaptationData, adaptation_html
from turnout.storage import write_whole
from turnout.types import Report

__all__ = ["Adapted", "adapt", "adapt_again", "is_adaptation", "load_base", "outline_adapters"]

_WHERE = "turnout convert --adapters"
_FORMAT = "turnout.adaptation/1"
# What run.json asks for.
_SETTINGS = {
    "source": str, "adapters": list[str], "router": str, "router_options": dict[str, Any] | None,
    "gate_text": dict[str, str] | None, "text": str | None, "text_tokens": int, "any_base": bool,
    "dtype": Literal["float16", "bfloat16", "float32", "float64"] | None, "device": str | None,
}  # fmt: skip
# The routers that need nothing but the adapters' own folders.
_READY = ("arrow", "even", "phatgoose")


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A finished choice of adapters.

    Args:
        out: the new folder; None when nothing was to be written.
        adapters: what was read.
        report: of ``attach``.
        loss: name -> nats a token on the text: "base", each adapter alone, "all, evenly", and "routed"; empty without.
        share: adapter -> the share of the routing's weight that it got on the text, over all maps.
        share_by_map: linear map -> the same at that map.

    Source: none; plain bookkeeping.
    """

    out: Path | None
    adapters: tuple[PeftAdapter, ...]
    report: Report
    loss: Mapping[str, float]
    share: Mapping[str, float]
    share_by_map: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        table = [("", "rank", "parameters", "maps", "loss", "share")]
        for one in self.adapters:
            ranks = sorted({a.shape[0] for a, _, _ in one.factor.values()})
            rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
            share = f"{100 * self.share[one.name]:.0f} %" if self.share else ""
            table.append((one.name, rank, f"{one.params:,}", str(len(one.factor)), _loss(self.loss, one.name), share))
        routed = f"routed by {self.report['router']}"
        table.append((routed, "", f"{self.report['params_added']:,}", str(self.maps), _loss(self.loss, "routed"), ""))
        if self.loss:
            table[1:1] = [("base", "", "", "", _loss(self.loss, "base"), "")]
            table[-1:-1] = [("all, evenly", "", "", "", _loss(self.loss, "all, evenly"), "")]
        wide = [max(len(row[column]) for row in table) for column in range(6 if self.loss else 4)]
        lines = [
            "  ".join([row[0].ljust(wide[0]), *(row[n].rjust(wide[n]) for n in range(1, len(wide)))]) for row in table
        ]
        notes = [*self.report.notes, *(["the loss is in nats a token of the text"] if self.loss else [])]
        return "\n".join(line.rstrip() for line in [*lines, *notes])

    @property
    def maps(self) -> int:
        """How many linear maps have adapters."""
        return len(self.report["modules"])  # pyrefly: ignore[bad-argument-type] - a list


def adapt(
    path: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    router: str = "arrow",
    router_options: Mapping[str, Any] | None = None,
    gate_text: Mapping[str, str | Path] | None = None,
    text: str | Path | None = None,
    text_tokens: int = 65_536,
    any_base: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "auto",
    say: Say = lambda text: None,
    part: Part = lambda what, done, of: None,
) -> Adapted:
    """Puts the adapters and a router on the model, measures them on the text, and writes copies of them to one folder.

    Args:
        path: a folder of transformers or a model of the hub, which the adapters were trained on; any architecture.
        adapters: folders of PEFT, or adapters of the hub.
        out: the new folder, which ``turnout.reshape.attach_folder`` reads; whole or not at all.
        router, router_options: by name, and its keywords.
        gate_text: adapter's name -> text to train its gates on, for the router "phatgoose".
        text: a file or folder to measure on.
        text_tokens: how much of it, and of each gate's text.
        any_base: take adapters that say they were trained on a model of another name.
        dtype: to read the weights in; None for the one they are stored in.
        device: where the model runs.
        say, part: are told what happens, and how far it is.

    Raises:
        TurnoutError: anything the user can mend; ``out`` does not exist then.
    """
    out, base, found = Path(out), located(path, where=_WHERE), [located(one, where=_WHERE) for one in adapters]
    path, adapters = base.folder, [one.folder for one in found]
    asked: dict[str, Any] = {"router": router, "router_options": router_options, "gate_text": gate_text, "text": text}
    outlined = outline_adapters(path, adapters, **asked, any_base=any_base, dtype=dtype)
    device = roomy(device, sum(file.stat().st_size for file in path.glob("*.safetensors")))
    asked |= {"text_tokens": text_tokens, "any_base": any_base, "device": device.type}
    asked["dtype"] = dtype and str(dtype).split(".")[1]
    settings: dict[str, Any] = {"source": base.source, "adapters": [one.source for one in found], **_settings(asked)}
    texts, options = settings["gate_text"], settings["router_options"]
    with unfinished(out, settings, part) as place:
        place.clear()
        save_adapters(place.result, adapters, router=router, router_options=options, base=base.source)
        say(f"reading {base.name}")
        model = load_base(path, dtype).to(device)
        folders = {one.name: place.result / "adapters" / one.name for one in outlined.adapters}
        for number, (name, gate) in enumerate(texts.items(), 1):
            say(f"training the gates of {name} on {gate}")
            _train(model, folders[name], _rows(model, path, gate, text_tokens), any_base)
            part("training gates", number, len(texts))
        rows = None if text is None else _rows(model, path, text, text_tokens)
        say("attaching" if rows is None else f"measuring on {rows.tokens:,} tokens of {text}")
        done = _measure(model, [read_adapter(one) for one in folders.values()], router, options, rows, any_base)
        _write(place.result, out.name, _record(done, settings, rows))
    return dataclasses.replace(done, out=out)


def _settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, with the places of things from the root on."""

    def whole(place: str | Path) -> str:
        return str(Path(place).resolve())

    return {
        **asked,
        "router_options": dict(asked["router_options"] or {}),
        "gate_text": {name: whole(place) for name, place in (asked["gate_text"] or {}).items()},
        "text": None if asked["text"] is None else whole(asked["text"]),
    }


def _write(folder: Path, name: str, body: Mapping[str, Any]) -> None:
    write_whole(folder / "run.json", json.dumps(body, indent=2) + "\n")
    write_whole(folder / "report.html", adaptation_html(AdaptationData(name, body)))


def _record(done: Adapted, settings: Mapping[str, Any], rows: Calibration | None) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "turnout": __version__,
        "settings": settings,
        "text": None if rows is None else rows.to_json_dict(),
        "adapters": [
            {
                "name": one.name,
                "ranks": sorted({a.shape[0] for a, _, _ in one.factor.values()}),
                "params": one.params,
                "maps": len(one.factor),
                "gates": bool(one.gate),
            }
            for one in done.adapters
        ],
        "loss": done.loss,
        "share": done.share,
        "share_by_map": done.share_by_map,
        "report": json.loads(done.report.to_json()),
        "command": shlex.join(sys.argv),
        "hardware": hardware(),
    }


def _measure(
    model: nn.Module,
    found: list[PeftAdapter],
    router: str,
    options: Mapping[str, Any],
    rows: Calibration | None,
    any_base: bool,
) -> Adapted:
    """The model with the adapters and the router, and what all that loses on the text."""
    loss = {} if rows is None else alone(model, found, rows, any_base)
    _, report = attach(model, found, router=router, router_options=options, any_base=any_base)
    given: dict[str, dict[str, float]] = {}
    if rows is not None:
        with weights(model, found) as given:
            loss["routed"] = nats(model, rows)
    total = {one.name: sum(at.get(one.name, 0.0) for at in given.values()) for one in found} if given else {}
    by_map = {module: _normed(at) for module, at in given.items()}
    return Adapted(None, tuple(found), report, loss, _normed(total), by_map)


def _normed(weight: Mapping[str, float]) -> dict[str, float]:
    whole = sum(weight.values()) or 1.0
    return {name: value / whole for name, value in weight.items()}


def is_adaptation(run_json: str | Path) -> bool:
    """Whether a run.json, or the one in a folder, says how adapters were chosen."""
    path = Path(run_json) / "run.json" if Path(run_json).is_dir() else Path(run_json)
    return path.is_file() and read_json(path, _WHERE).get("format") == _FORMAT


def adapt_again(
    run_json: str | Path, out: str | Path, *, device: str | torch.device | None = None, say: Say, part: Part
) -> Adapted:
    """Does what a run.json says was done, again, in a new folder; on its device, where none is given and it is here.

    Raises:
        TurnoutError: the model, an adapter or a text that it names has gone.
    """
    path = Path(run_json) / "run.json" if Path(run_json).is_dir() else Path(run_json)

    def refuse(problem: str) -> CheckpointError:
        fix = "name a folder that turnout convert --adapters wrote, or restore the file from a copy"
        allowed = "be of a choice of adapters"
        return CheckpointError(word("run.json", got=f"{path} ({problem})", allowed=allowed, where=_WHERE, fix=fix))

    body = read_json(path, _WHERE)
    check_fields(body, {"settings": dict[str, Any]}, refuse)
    asked = dict(body["settings"])
    if strange := sorted(set(asked) - set(_SETTINGS)):
        raise refuse(f"settings of other names: {', '.join(strange)[:80]}")
    check_fields(asked, _SETTINGS, refuse)
    dtype = getattr(torch, asked.pop("dtype")) if asked.get("dtype") else asked.pop("dtype", None)
    was = asked.pop("device", None) or "cpu"
    asked["device"] = as_before(was, say) if device is None else device
    return adapt(asked.pop("source"), asked.pop("adapters"), out, dtype=dtype, say=say, part=part, **asked)


def outline_adapters(
    path: str | Path,
    adapters: Sequence[str | Path],
    *,
    router: str = "arrow",
    router_options: Mapping[str, Any] | None = None,
    gate_text: Mapping[str, str | Path] | None = None,
    text: str | Path | None = None,
    any_base: bool = False,
    dtype: torch.dtype | None = None,
) -> Adapted:
    """What ``adapt`` would put on the model, and whatever it would refuse, checked; no weight of the model is read.

    Args:
        path, adapters, router, router_options, gate_text, text, any_base, dtype: as in ``adapt``.

    Raises:
        TurnoutError: a folder that is not whole, adapters that do not fit the model, a router of no such name, options
            that it does not take, gates or texts that are not there.
    """
    if router in ROUTERS and router not in _READY:
        allowed, got = f"be one of {', '.join(_READY)}", f"{router}, which has to learn from tasks first"
        fix = f"call turnout.reshape.attach(model, folders, router={router!r}), then turnout.train.train_routers"
        if router == "glider":
            got = "glider, which wants to know what every request asks for"
            fix = "in Python, attach(model, folders, router='glider', router_options={'embeddings': {NAME: vector}})"
        raise UsageError(word("--router", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if router not in _READY:
        raise nearest(router, _READY, kind="router", where=_WHERE)
    found = [read_adapter(folder) for folder in adapters]
    check_options(router, router_options or {}, len(found), where=_WHERE)
    _check_gates(found, router, gate_text or {})
    for place in (*(gate_text or {}).values(), *((text,) if text is not None else ())):
        if not Path(place).exists():
            got, allowed, fix = str(place), "be a file or folder that is there", "check the spelling of the path"
            raise UsageError(word("the text", got=got, allowed=allowed, where=_WHERE, fix=fix))
    model = _outline(path, dtype)
    _, report = attach(model, found, router=even, any_base=any_base)
    values = {**report.values, "router": router}
    return Adapted(None, tuple(found), dataclasses.replace(report, values=values), {}, {}, {})


def _check_gates(found: Sequence[PeftAdapter], router: str, texts: Mapping[str, object]) -> None:
    names = [one.name for one in found]
    for name in texts:
        if name not in names:
            raise nearest(name, names, kind="adapter", where="--gate-text")
    without = [one.name for one in found if not one.gate and one.name not in texts]
    if router == "phatgoose" and without:
        got, allowed = ", ".join(without), "have gates, which phatgoose routes by"
        fix = f"add --gate-text {shlex.quote(without[0] + '=TEXT')} with text like that it was trained on"
        raise UsageError(word("every adapter", got=f"none for {got}", allowed=allowed, where=_WHERE, fix=fix))
    if texts and router != "phatgoose":
        fix = "add --router phatgoose, or leave it out"
        raise UsageError(
            word("--gate-text", got=f"router {router}", allowed="go with phatgoose", where=_WHERE, fix=fix)
        )


def _train(model: nn.Module, folder: Path, rows: Calibration, any_base: bool) -> None:
    device = next(model.parameters()).device
    with torch.enable_grad():
        moved = [id_BS.to(device) for id_BS in rows.batches]
        batches = [{"input_ids": id_BS, "labels": id_BS} for id_BS in moved]
        train_gates(model, folder, batches, any_base=any_base)


def _rows(model: Any, path: Path, text: str | Path, tokens: int) -> Calibration:
    longest = int(getattr(model.config, "max_position_embeddings", None) or 512)
    return calibration(text, path, vocab_size=model.config.vocab_size, max_seq=longest, tokens=tokens)


def load_base(path: str | Path, dtype: torch.dtype | None) -> Any:
    """The model of a folder of transformers, or of the hub, in its own class, in evaluation mode.

    Raises:
        MissingExtraError: transformers is not installed.
        UsageError: it is no folder that transformers can load.
    """
    found = located(path, where=_WHERE)
    with _explained(path):
        from transformers import AutoModelForCausalLM, logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(found.folder, dtype=dtype or "auto", local_files_only=True)
            model.config._name_or_path = found.repo or str(found.folder)  # by which adapters know it
            return model.eval()
        finally:
            if shown:
                logging.enable_progress_bar()


def _outline(path: str | Path, dtype: torch.dtype | None) -> Any:
    """The same without its weights."""
    found = located(path, where=_WHERE)
    with _explained(path), torch.device("meta"):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(found.folder, local_files_only=True)
        config._name_or_path = found.repo or str(found.folder)
        return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)


@contextlib.contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{_WHERE} needs transformers. Nearest fix: pip install 'turnout[hf]'.") from error
    except (OSError, ValueError) as error:
        first, fix = str(error).strip().split("\n")[0], "name a folder with config.json and safetensors"
        allowed = "be a causal language model in a folder of transformers"
        raise UsageError(word("the model", got=f"{path} ({first})", allowed=allowed, where=_WHERE, fix=fix)) from error


def _loss(loss: Mapping[str, float], name: str) -> str:
    return f"{loss[name]:.4f}" if name in loss else ""
