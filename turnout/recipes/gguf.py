"""A model on disk as one GGUF file, for llama.cpp."""

from pathlib import Path

import torch

from turnout.errors import DataError, UsageError, word
from turnout.models import LM, checkpoint
from turnout.models.gguf import GGUFFile, to_gguf
from turnout.models.gguf.write import Kind
from turnout.recipes.calibration import find_tokenizer
from turnout.recipes.certify import model_folder
from turnout.recipes.partial import Say, refuse_existing
from turnout.reshape import densify

__all__ = ["write_gguf"]

_WHERE = "turnout convert"


def write_gguf(
    path: str | Path,
    out: str | Path,
    *,
    kind: Kind = "q8_0",
    tokenizer: bool = True,
    whole: bool = False,
    dtype: torch.dtype | None = None,
    say: Say = lambda text: None,
) -> GGUFFile:
    """Writes the model of a folder as a GGUF file.

    Args:
        path: a folder of transformers, one of our own, a run folder, or a model of the hub.
        out: the file; must not exist.
        kind: how weights are stored: see ``turnout.models.gguf.to_gguf``.
        tokenizer: whether the tokenizer goes along.
        whole: whether weights that are in few bits already are written out first, and so rounded a second time.
        dtype: to read the weights in; None for the one they are stored in.
        say: is told what happens.

    Raises:
        TurnoutError: anything the user can mend; ``out`` does not exist then.
    """
    out = Path(out)
    refuse_existing(out)
    folder = model_folder(path, where=_WHERE)
    say(f"reading {folder}")
    lm = _read(folder, kind, whole, dtype)
    say(f"writing {out}")
    try:
        like = find_tokenizer(folder).parent
    except DataError:  # to_gguf says how to do without, where one is asked for
        like = folder
    return to_gguf(lm, out, kind=kind, tokenizer=tokenizer, like=like)


def _read(folder: Path, kind: Kind, whole: bool, dtype: torch.dtype | None) -> LM:
    """The model: in few bits where the folder has it so, for the types of few bits to keep its codes."""
    seen = checkpoint.peek(folder, dtype=dtype)
    if seen.kind == "turnout":
        lm = checkpoint.load(folder)
        lm = densify(lm)[0] if whole and lm.config.quantized is not None else lm
        return lm if dtype is None else lm.to(dtype)
    few = kind in ("q8_0", "q4_0", "mxfp4") and not whole
    if few and seen.stored_as is not None and seen.held is None:
        got, allowed = f"weights stored as {seen.stored_as}", f"be whole to be rounded to {kind}"
        fix = "add --densify, to round them a second time, or pass --gguf bf16"
        raise UsageError(word("the model", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return checkpoint.from_hf(folder, dtype=dtype, packed=few and seen.held is not None)
