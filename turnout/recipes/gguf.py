"""A model on disk as one GGUF file, for llama.cpp."""

from pathlib import Path

import torch

from turnout.errors import DataError
from turnout.models import checkpoint
from turnout.models.gguf import GGUFFile, to_gguf
from turnout.models.gguf.write import Kind
from turnout.recipes.calibration import find_tokenizer
from turnout.recipes.certify import model_folder
from turnout.recipes.partial import Say, refuse_existing

__all__ = ["write_gguf"]

_WHERE = "turnout convert"


def write_gguf(
    path: str | Path,
    out: str | Path,
    *,
    kind: Kind = "q8_0",
    tokenizer: bool = True,
    dtype: torch.dtype | None = None,
    say: Say = lambda text: None,
) -> GGUFFile:
    """Writes the model of a folder as a GGUF file.

    Args:
        path: a folder of transformers, one of our own, a run folder, or a model of the hub.
        out: the file; must not exist.
        kind: how weights are stored: see ``turnout.models.gguf.to_gguf``.
        tokenizer: whether the tokenizer goes along.
        dtype: to read the weights in; None for the one they are stored in.
        say: is told what happens.

    Raises:
        TurnoutError: anything the user can mend; ``out`` does not exist then.
    """
    out = Path(out)
    refuse_existing(out)
    folder = model_folder(path, where=_WHERE)
    say(f"reading {folder}")
    seen = checkpoint.peek(folder, dtype=dtype)
    if seen.kind == "transformers":
        lm = checkpoint.from_hf(folder, dtype=dtype)
    else:
        lm = checkpoint.load(folder)
        lm = lm if dtype is None else lm.to(dtype)
    say(f"writing {out}")
    try:
        like = find_tokenizer(folder).parent
    except DataError:  # to_gguf says how to do without, where one is asked for
        like = folder
    return to_gguf(lm, out, kind=kind, tokenizer=tokenizer, like=like)
