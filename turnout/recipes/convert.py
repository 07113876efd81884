"""Convert a model on disk: reshape it in steps, write it in the format it came in, and say how far it moved."""

import dataclasses
import json
import math
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from turnout import __version__
from turnout.errors import CheckpointError, word
from turnout.measure import Certificate, certify, hardware
from turnout.measure.certificate import inputs_digest
from turnout.models import LM, checkpoint
from turnout.models.checkpoint.own import ORIGIN, carry, read_json
from turnout.models.placed import roomy
from turnout.reading import check_fields
from turnout.recipes.again import as_before
from turnout.recipes.calibration import Calibration, calibration
from turnout.recipes.certify import certify_folders
from turnout.recipes.held_out import measured
from turnout.recipes.partial import Part, Partial, Say, enough_memory, refuse_existing, unfinished
from turnout.recipes.plan import Format, Plan, make_plan
from turnout.recipes.run import Run
from turnout.recipes.steps import Step, step_from_json, step_json
from turnout.recipes.stock import check_with_transformers, said
from turnout.reshape.resumable import keeping
from turnout.show import ConversionData, conversion_html
from turnout.storage import digest, write_whole
from turnout.train.allocator import return_freed_memory
from turnout.types import Report

__all__ = ["Conversion", "convert", "is_conversion", "repeat"]

_WHERE = "turnout convert"
_FORMAT = "turnout.conversion/1"
_TOKENS = 65_536


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Args:
        out: the new folder.
        plan: what was to be done.
        record: what run.json holds of it: the steps with their reports, the text, what was measured on it.
        certificate: how far the logits of what was written are from those of what was read, on random tokens.

    Source: none; plain bookkeeping.
    """

    out: Path
    plan: Plan
    record: Mapping[str, Any]
    certificate: Certificate

    @property
    def reports(self) -> tuple[Report, ...]:
        """What each step changed."""
        return tuple(Report.from_json(json.dumps(step["report"])) for step in self.record["steps"])

    def summary(self) -> str:
        """Where it is, how far the logits moved, what transformers says to it; with text, what that means for it."""
        gap = self.certificate.logits
        moved = f"logits at most {_number(gap.max_abs)} apart ({_number(gap.relative)} relative)"
        moved += f", top token the same at {100 * gap.top1:.4g} %"
        if self.certificate.verdict == "bit-equal":
            moved = "the very same logits"
        if self.certificate.lost:
            moved = f"nothing can be said: {self.certificate.lost} (A the input, B the output)"
        about = f"input against output, {self.certificate.inputs.tokens} random tokens"
        lines = [f"{self.out}: {self.plan.architecture}", f"{about}: {moved}"]
        if stock := self.record.get("stock"):
            lines.append(said(stock))
        if held_out := self.record["held_out"]:
            before, after = (held_out[name]["bits_per_byte"] for name in ("before", "after"))
            lines.append(f"held-out text: {before:.4f} bits per byte before, {after:.4f} after")
        return "\n".join(lines)


def convert(
    path: str | Path,
    steps: Sequence[Step],
    out: str | Path,
    *,
    as_format: Format | None = None,
    text: str | Path | None = None,
    text_tokens: int = _TOKENS,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    force: bool = False,
    device: str | torch.device = "auto",
    say: Say = lambda text: None,
    part: Part = lambda what, done, of: None,
) -> Conversion:
    """Reads a model, takes the steps in their order, and writes a folder of the same kind, whole or not at all.

    What is finished of each step, layer by layer and batch by batch, is kept in ``OUT.part`` until the end. The same
    call goes on from there after the process was stopped, whatever stopped it, and ends with the same bits. Where
    transformers is installed, it loads a folder of its kind whole, and to the same logits, before that takes its place.

    Args:
        path: a folder of transformers, one that ``checkpoint.save`` wrote, a run folder, or a model of the hub.
        steps: what to do; may be empty where ``as_format`` asks for another format.
        out: the new folder; must not exist.
        as_format: "transformers" or "model"; None for the kind that ``path`` is.
        text: a file or folder, for steps that look at text; some of it is held out, and both models measured on it.
        text_tokens: how much of it steps look at.
        dtype: to read the weights in; None for the one they are stored in.
        seed, force: of whatever a step draws; go on where the disk or the memory looks too small.
        device: where steps work and text is measured. What was written is compared with what was read on the CPU.
        say, part: are told what happens, and how far it is: of a stretch of work, how many pieces of how many.

    Raises:
        TurnoutError: anything the user can mend; ``out`` does not exist then.
    """
    out = Path(out)
    refuse_existing(out)
    plan = make_plan(path, steps, as_format=as_format, text=text, dtype=dtype)
    if not force:
        plan.check_room(out)
    device = roomy(device, plan.peak_bytes)
    say(str(plan))
    found = None if text is None else _read_text(plan, text, text_tokens, say)
    with unfinished(out, _settings(plan, found, seed, device), part) as place, enough_memory(plan.peak_bytes):

        def tell(what: str) -> None:
            place.doing = what
            say(what)

        if place.holds_work:
            tell(f"going on with what {place.folder} holds")
        done = place.written() or _fill(plan, found, seed, device, place, tell)
        tell("comparing what was written with what was read")
        certificate = _compare(plan, place.result, out)
        done |= _judged(plan, place.result, certificate, tell) | {"device": str(device)}
        body = _record(plan, done, found, certificate, seed, text_tokens)
        _describe(place.result, out.name, body, certificate)
    return Conversion(out, plan, body["conversion"], certificate)


def _read_text(plan: Plan, text: str | Path, tokens: int, say: Say) -> Calibration:
    say(f"reading {text}")
    sizes = {"vocab_size": plan.config.vocab_size, "max_seq": plan.config.max_seq, "tokens": tokens}
    found = calibration(text, plan.folder, **sizes)
    if found.skipped:
        say(f"left out {found.skipped} files or rows of {text} that cannot be read as text")
    return found


def _settings(plan: Plan, text: Calibration | None, seed: int, device: torch.device) -> dict[str, Any]:
    """Whatever decides about the bits of the result, by the name that a user has for it."""
    files = sorted(file for file in plan.folder.iterdir() if file.suffix in (".safetensors", ".json"))
    weights = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns if file.suffix == ".safetensors" else digest(file)]
        for file in files
    ]
    return {
        "PATH": plan.found.source,
        "steps": [step_json(step) for step in plan.steps],
        "--as": plan.target,
        "--dtype": None if plan.dtype is None else str(plan.dtype),
        "--seed": seed,
        "--device": device.type,
        "text of digest": None if text is None else inputs_digest([*text.batches, *text.held_out]),
        "the model's files": weights,
        "turnout": __version__,
        "torch": torch.__version__,
    }


def is_conversion(run_json: str | Path) -> bool:
    """Whether a run.json, or the one in a folder, says how a model was converted."""
    path = Path(run_json)
    path = path / "run.json" if path.is_dir() else path
    return path.is_file() and "conversion" in read_json(path, _WHERE)


def repeat(
    run_json: str | Path,
    out: str | Path,
    *,
    device: str | torch.device | None = None,
    say: Say = lambda text: None,
    part: Part = lambda what, done, of: None,
) -> Conversion:
    """Does what a run.json says was done, again, in a new folder.

    Args:
        run_json: the file, or the folder that holds it.
        out: the new folder.
        device: where; None for where it was done, if that is here too.
        say, part: as in ``convert``.

    Raises:
        TurnoutError: it is no conversion's, or the model or text it names has gone.
    """
    path = Path(run_json)
    path = path / "run.json" if path.is_dir() else path
    body = _asked(path)
    text = body.get("calibration") or {}
    return convert(
        body["source"],
        [step_from_json(step) for step in body["steps"]],
        out,
        as_format=body.get("as_format"),
        text=text.get("source"),
        text_tokens=body.get("text_tokens", _TOKENS),
        dtype=getattr(torch, body["dtype"]) if body.get("dtype") else None,
        seed=body.get("seed", 0),
        device=as_before(body.get("device") or "cpu", say) if device is None else device,
        say=say,
        part=part,
    )


def _asked(path: Path) -> dict[str, Any]:
    """What a conversion's run.json asks for, every field of its type.

    Raises:
        CheckpointError: a field is missing, of another type, or out of range.
    """

    def refuse(problem: str) -> CheckpointError:
        fix = "name a folder that turnout convert wrote, or restore the file from a copy"
        return CheckpointError(
            word("run.json", got=f"{path} ({problem})", allowed="be of a conversion", where=_WHERE, fix=fix)
        )

    body = read_json(path, _WHERE).get("conversion")
    if not isinstance(body, dict):
        raise refuse("no conversion in it")
    dtypes = Literal["float16", "bfloat16", "float32", "float64"] | None
    check_fields(
        body,
        {"source": str, "steps": list[dict[str, Any]], "as_format": Literal["transformers", "model"] | None}
        | {"calibration": dict[str, Any] | None, "text_tokens": int | None, "dtype": dtypes, "seed": int | None}
        | {"device": str | None},
        refuse,
    )
    check_fields(body.get("calibration") or {"source": ""}, {"source": str}, refuse)
    if body.get("text_tokens", 1) is None or body.get("text_tokens", 1) < 1 or body.get("seed", 0) is None:
        raise refuse(f"text_tokens {body.get('text_tokens')!r} and seed {body.get('seed')!r}")
    return body


def _fill(
    plan: Plan, text: Calibration | None, seed: int, device: torch.device, place: Partial, say: Say
) -> dict[str, Any]:
    """Takes the steps and writes the weights; what each step reported, and both models measured."""
    lm, done = _take(plan, text, seed, device, place, say)
    lm.to("cpu")
    say(f"writing {plan.architecture}")
    place.clear()
    _write(lm, plan, place.result)
    place.finish(done)
    return done


def _take(
    plan: Plan, text: Calibration | None, seed: int, device: torch.device, place: Partial, say: Say
) -> tuple[LM, dict[str, Any]]:
    """The model after all steps; what each reported, and both models measured on held-out text."""
    say(f"reading {plan.found.name}")
    lm = _load(plan.folder, plan.dtype, held=plan.held).to(device)
    with keeping(place.pieces("before")):
        before = None if text is None else measured(lm, text)
    reports = []
    for number, step in enumerate(plan.steps, 1):
        say(f"step {number} of {len(plan.steps)}: {step.name}")
        with keeping(place.pieces(f"{number}-{step.name}")):
            lm, report = step.run(lm, text.batches if text else None, seed)
        return_freed_memory()  # what this step worked with is not what the next one needs
        reports.append(json.loads(report.to_json()))
    with keeping(place.pieces("after")):
        after = None if text is None else measured(lm, text)
    finite = all(math.isfinite(one["bits_per_byte"]) for one in (before, after) if one)
    if not finite:
        say("held-out text: the likelihood of it is no finite number, so bits per byte are left out")
    sound = text is not None and before is not None and after is not None and finite
    held_out = {"bytes": text.held_out_bytes, "before": before, "after": after} if sound and text else None
    return lm, {"reports": reports, "held_out": held_out}


def _load(folder: Path, dtype: torch.dtype | None, *, held: bool) -> LM:
    if checkpoint.peek(folder, dtype=dtype).kind == "transformers":
        return checkpoint.from_hf(folder, dtype=dtype, packed=held)
    lm = checkpoint.load(folder)
    return lm if dtype is None else lm.to(dtype)


def _write(lm: LM, plan: Plan, result: Path) -> None:
    if plan.target == "transformers":
        checkpoint.to_hf(lm, result)
        return
    place = result / "model" if plan.target == "run" else result
    if plan.source != "transformers" and lm.origin is not None and lm.origin.name != ORIGIN:
        lm.origin = None  # our own folder, whose small files go beside the weights
    checkpoint.save(place, lm)
    carry(plan.folder, place)


def _compare(plan: Plan, result: Path, out: Path) -> Certificate:
    """What was read against what was written, both from the disk."""
    return_freed_memory()
    if plan.dtype is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "its weights in few bits are held whole")  # the plan says so
            found, _ = certify_folders(plan.path, result, device="cpu")
    else:
        place = result / "model" if plan.target == "run" else result
        held = plan.rows[-1].config.quantized is not None
        a, b = _load(plan.folder, plan.dtype, held=plan.held), _load(place, plan.dtype, held=held)
        generator = torch.Generator().manual_seed(0)
        id_BS = torch.randint(a.config.vocab_size, (8, min(64, a.config.max_seq)), generator=generator)
        found = certify(a, b, id_BS, labels=(plan.found.name, str(out)), source="random tokens, seed 0")
    a, b = dataclasses.replace(found.a, name=plan.found.name), dataclasses.replace(found.b, name=str(out))
    return dataclasses.replace(found, a=a, b=b)


def _judged(plan: Plan, result: Path, certificate: Certificate, say: Say) -> dict[str, Any]:
    """What transformers says to its own kind of folder."""
    if plan.target != "transformers":
        return {}
    if certificate.logits.lost_a:
        # The summary, the page and the certificate say so too: nothing there can be compared with anything.
        say("not compared with transformers: the input's own logits are not finite")
        return {}
    say("loading what was written with transformers")
    return {"stock": check_with_transformers(result, params=plan.rows[-1].params)}


def _describe(result: Path, name: str, body: Mapping[str, Any], certificate: Certificate) -> None:
    certificate.save(result / "certificate.json")
    write_whole(result / "report.html", conversion_html(ConversionData(name, body["conversion"], certificate)))
    write_whole(result / "run.json", json.dumps(body, indent=2) + "\n")


def _record(
    plan: Plan,
    done: Mapping[str, Any],
    text: Calibration | None,
    certificate: Certificate,
    seed: int,
    text_tokens: int,
) -> dict[str, Any]:
    """What run.json holds: enough to do it again, and what came of it."""
    gap = certificate.logits
    steps = [step_json(step) | {"report": report} for step, report in zip(plan.steps, done["reports"], strict=True)]
    conversion = {
        "source": plan.found.source,
        "as_format": None if plan.target == plan.source else plan.target,
        "dtype": None if plan.dtype is None else str(plan.dtype).removeprefix("torch."),
        "seed": seed,
        "device": done["device"],
        "steps": steps,
        "calibration": None if text is None else text.to_json_dict() | {"source": str(Path(text.source).resolve())},
        "text_tokens": text_tokens,
        "held_out": done["held_out"],
        "plan": plan.to_json_dict(),
        "seq": plan.seq,
        "compared": {"verdict": certificate.verdict, "max_abs": gap.max_abs, "relative": gap.relative},
        "command": shlex.join(sys.argv),
        "hardware": hardware(),
        **({"stock": done["stock"]} if "stock" in done else {}),
    }
    if plan.target != "run":
        return {"format": _FORMAT, "conversion": conversion}
    old = read_json(plan.path / "run.json", _WHERE)
    tokens = plan.path / "tokens"
    kept = {name: old[name] for name in ("tokens_digest", "tokens_folder") if name in old}
    kept |= {"tokens_folder": str(tokens.resolve())} if tokens.is_dir() else {}
    run = Run.from_json_dict(old)
    # What the run started from, and what of that was trained, says nothing of another model.
    train = dataclasses.replace(run.train, only="all", rank=None, alpha=None)
    run = dataclasses.replace(run, model=plan.rows[-1].config, train=train, start=None)
    return run.to_json_dict() | kept | {"conversion": conversion}


def _number(value: float | None) -> str:
    return "infinitely" if value is None else f"{value:.3g}"
