"""Which tokens end a text, as a model says itself."""

from pathlib import Path
from typing import Any

from torch import nn

from turnout.errors import CheckpointError, word
from turnout.reading import read_json

__all__ = ["own_ends"]


def own_ends(model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a text: of the generation configuration, else of the configuration; empty where neither says.

    Args:
        model: one of transformers, or one of ours, of which the folder that it was read from says it.

    Raises:
        CheckpointError: the folder's generation_config.json or config.json is not JSON, or names something else.

    >>> own_ends(nn.Identity())
    ()

    Source: none; ``eos_token_id`` of transformers.
    """
    folder, kept = getattr(model, "origin", None), getattr(model, "ends", ())
    if isinstance(kept, tuple) and kept:
        return kept
    if isinstance(folder, Path):
        files = [folder / name for name in ("generation_config.json", "config.json")]
        said = {str(file): read_json(file).get("eos_token_id") for file in files if file.is_file()}
    else:
        parts = {name: getattr(model, name, None) for name in ("generation_config", "config")}
        said = {f"{type(model).__name__}.{name}": getattr(part, "eos_token_id", None) for name, part in parts.items()}
    return next((_ids(found, where) for where, found in said.items() if found is not None), ())


def _ids(found: Any, where: str) -> tuple[int, ...]:
    ids = tuple(found) if isinstance(found, list | tuple) else (found,)
    if any(not isinstance(one, int) or isinstance(one, bool) for one in ids):
        allowed, fix = "be a token id, or a list of them", "correct it, or pass eos=... yourself"
        raise CheckpointError(word("eos_token_id", got=f"{found!r:.80}", allowed=allowed, where=where, fix=fix))
    return ids
