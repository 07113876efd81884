"""The model that a run goes on from: known by digest, read once, and its small files kept for what the run writes."""

import hashlib
import shlex
import shutil
from pathlib import Path

import torch

from turnout.errors import CheckpointError, DataError, TurnoutError, UsageError, word
from turnout.hub import located
from turnout.models import LM, checkpoint
from turnout.models.checkpoint import PeftAdapter, write_adapter
from turnout.models.checkpoint.own import ORIGIN, carry, read_json
from turnout.recipes.calibration import find_tokenizer
from turnout.recipes.certify import model_folder
from turnout.recipes.run import Run, Start
from turnout.reshape import add_low_rank, low_rank_adapter
from turnout.storage import digest, write_whole
from turnout.train.data import load_tokenizer
from turnout.train.data.tokenizer import check_tokenizer
from turnout.train.state import find
from turnout.train.step import derived_seed

__all__ = ["KEPT", "begin", "folded_only", "kept_tokenizer", "look", "write_adapters"]

# Where a run keeps the small files of the model that it began with: they outlive that model's folder.
KEPT = "start"
_WHERE = "turnout train --from"


def look(path: str | Path) -> Start:
    """What a run records of the model in a folder; all of it is read once, for the digest, and no weight is kept.

    Args:
        path: a run's output folder, a folder of transformers, one that ``checkpoint.save`` or a conversion wrote, or a
            model of the hub.

    Raises:
        CheckpointError: there is no model.
        DataError: it has no tokenizer, or one that changes text, so that bits per byte could not be counted.
        UsageError: its tokenizer has more tokens than the model.

    Source: none; SHA-256.
    """
    folder = model_folder(path, where=_WHERE)
    seen = checkpoint.peek(folder, dtype=torch.float32)
    place = find_tokenizer(folder, where=_WHERE)
    try:
        check_tokenizer(load_tokenizer(place), vocab_size=seen.config.vocab_size)
    except UsageError as error:
        got, fix = f"{place}, with more", "put the tokenizer.json beside it that the model was trained with"
        allowed = f"have no more tokens than the {seen.config.vocab_size} of the model"
        raise UsageError(word("its tokenizer", got=got, allowed=allowed, where=_WHERE, fix=fix)) from error
    except DataError as error:
        fix = "with this one, transformers' Trainer will do; byte-level and SentencePiece's kinds are trained on here"
        got = f"{place}, one that adds, drops or changes bytes of a test sentence, or cuts it by chance"
        allowed = "be lossless, byte-level or of SentencePiece's kind, or bits per byte would be wrong,"
        raise DataError(word("its tokenizer", got=got, allowed=allowed, where=_WHERE, fix=fix)) from error
    return Start(located(path, where=_WHERE).source, _weights(folder), digest(place))


def _weights(folder: Path) -> str:
    """One digest for config.json and all weights beside it."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    lines = "".join(f"{digest(file)} {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def begin(run: Run, out: Path, *, resume: str | None) -> LM:
    """The model that the run trains, in fp32: with the weights that it starts from, or those about to be replaced by
    a checkpoint's, which needs nothing of the folder that the run began with.

    The small files of the start (tokenizer, chat template, configuration) are copied to ``out/start``, and go along
    with what the run writes.

    Args:
        run: what is trained.
        out: its folder, claimed.
        resume: as for ``execute``.

    Raises:
        CheckpointError: the run has no checkpoint, and the model that it began with has changed or is gone.

    Source: none; plain bookkeeping.
    """
    start, kept = run.start, out / KEPT
    if start is None or (resume is not None and kept.is_dir() and find(out / "checkpoints")):
        lm = LM(run.model, seed=run.train.seed)
    else:
        lm = _read(run, start, out)
        _keep(start.path, kept)
    lm.origin = kept if (kept / "config.json").is_file() else None
    if run.train.rank is not None:
        add_low_rank(lm, rank=run.train.rank, alpha=run.train.alpha, seed=derived_seed(run.train.seed, 1))
    return lm


def _read(run: Run, start: Start, out: Path) -> LM:
    """The weights that the run starts from, the very ones that it recorded."""
    try:
        now = look(start.path)
    except TurnoutError as error:
        raise _changed(start, out, str(error)) from error
    if now != start:
        raise _changed(start, out, "its weights or its tokenizer have other bytes now")
    folder = model_folder(start.path, where=_WHERE)
    foreign = checkpoint.peek(folder, dtype=torch.float32).kind == "transformers"
    lm = checkpoint.from_hf(folder, dtype=torch.float32) if foreign else checkpoint.load(folder).float()
    if lm.config != run.model:
        fix = "build the run with turnout.recipes.tune(FOLDER), and change fields of data and train only"
        got = "another configuration"
        raise UsageError(word("Run.model", got=got, allowed=f"be that of {start.path}", where=_WHERE, fix=fix))
    return lm


def _changed(start: Start, out: Path, problem: str) -> CheckpointError:
    fix = f"bring that model back, or begin anew with: turnout train --from {shlex.quote(start.path)} --out NEW"
    allowed = f"be the model that the run in {out} recorded, since it has no checkpoint yet,"
    return CheckpointError(word(start.path, got=problem, allowed=allowed, where=_WHERE, fix=fix))


def _keep(path: str, kept: Path) -> None:
    """Copies the small files, the tokenizer as the last: the folder is whole when it is there."""
    folder = model_folder(path, where=_WHERE)
    shutil.rmtree(kept, ignore_errors=True)
    origin = folder / ORIGIN if (folder / ORIGIN).is_dir() else folder
    if "model_type" in read_json(origin / "config.json", _WHERE):
        carry(origin, kept, with_config=True)
    place = find_tokenizer(folder, where=_WHERE)
    write_whole(kept / "tokenizer.json", place.read_bytes())


def written_adapter(run: Run, lm: LM, out: Path) -> PeftAdapter | None:
    """The adapters as one of PEFT's, for the folder of transformers that the run began with; None where it did not.

    Raises:
        UsageError: that folder stores the maps in another way than PEFT could add to.
    """
    if run.start is None or run.train.only != "adapters" or lm.origin is None:
        return None
    kind = read_json(lm.origin / "config.json", _WHERE)["model_type"]
    return low_rank_adapter(lm, out.resolve().name, base=run.start.path, prefer=kind)


def write_adapters(run: Run, lm: LM, out: Path) -> None:
    """Writes the adapters to ``out/adapter`` as a folder of PEFT, where there is one to write; ``folded_only`` says."""
    if not folded_only(run, lm, out) and (adapter := written_adapter(run, lm, out)) is not None:
        write_adapter(out / "adapter", adapter)


def folded_only(run: Run, lm: LM, out: Path) -> str:
    """Why the adapters could not be written by themselves; empty where they can be, or nobody would look for them."""
    try:
        written_adapter(run, lm, out)
    except UsageError as error:
        return f"the adapters will be in model/, folded in, and not by themselves: {error}"
    return ""


def kept_tokenizer(out: Path) -> Path:
    """The tokenizer of the model that the run in ``out`` began with."""
    return out / KEPT / "tokenizer.json"
