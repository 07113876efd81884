"""Which tokens end a text, as a model says itself."""

from pathlib import Path
from typing import Any

from torch import nn

from turnout.errors import CheckpointError, word
from turnout.reading import read_json

__all__ = ["own_ends"]


def own_ends(model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a text: of the generation configuration, or the configuration where there is none of those.

    Args:
        model: one of transformers, or one of ours, of which the folder that it was read from says it.

    Returns:
        The ids; none where nothing says.

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
        where = next((str(file) for file in files if file.is_file()), None)
        found = None if where is None else read_json(where).get("eos_token_id")
        return _ids(found, where or "")
    for name in ("generation_config", "config"):
        if (part := getattr(model, name, None)) is not None:
            return _ids(getattr(part, "eos_token_id", None), f"{type(model).__name__}.{name}")
    return ()


def _ids(found: Any, where: str) -> tuple[int, ...]:
    if found is None:
        return ()
    ids = tuple(found) if isinstance(found, list | tuple) else (found,)
    if any(not isinstance(one, int) or isinstance(one, bool) for one in ids):
        allowed, fix = "be a token id, or a list of them", "correct it, or pass eos=... yourself"
        raise CheckpointError(word("eos_token_id", got=f"{found!r:.80}", allowed=allowed, where=where, fix=fix))
    return ids
