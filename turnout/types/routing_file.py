"""A routing on disk: one safetensors file."""

from pathlib import Path
from typing import Any

from turnout.errors import CheckpointError, word
from turnout.storage import load_tensors, save_tensors

__all__ = ["read_routing", "write_routing"]

_FORMAT = "turnout.routing/1"
_OPTIONAL = ("wanted_E", "score_TE", "logit_TE", "real_T")


def write_routing(routing: Any, path: Path) -> None:
    """Writes what ``Routing.save`` keeps, aside first and then renamed."""
    tensors = {name: getattr(routing, name) for name in ("token_R", "weight_R", "offset_E", *_OPTIONAL)}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_tensors(path, tensors, {"format": _FORMAT, "num_tokens": str(routing.num_tokens)})


def read_routing(kind: Any, path: Path) -> Any:
    """The routing of that class that ``write_routing`` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, altered or not a routing.
    """

    def refuse(problem: object) -> CheckpointError:
        allowed, fix = f"be a whole {_FORMAT} safetensors file", "write it again with Routing.save"
        got = f"{path} ({problem})"
        return CheckpointError(word("the file", got=got, allowed=allowed, where="Routing.load", fix=fix))

    meta, tensors = load_tensors(path, refuse, ("format", "num_tokens"), any_link=True)
    if meta.get("format") != _FORMAT:
        raise refuse(f"format {meta.get('format')!r}")
    try:
        return kind(num_tokens=int(meta["num_tokens"]), **tensors).validate()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise refuse(error) from error
