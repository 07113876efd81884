"""A changed layer in a state dict: the layer that was there keeps its names, and what was added stands beside it."""

from typing import Any

from torch import Tensor, nn

from turnout.errors import UsageError, word

__all__ = ["as_if_plain", "put_into_base"]

# The parts of a changed layer that a plain one does not have.
_ADDED = ("paths.", "router.")


def as_if_plain(layer: nn.Module) -> None:
    """Lets ``layer.base`` stand in state dicts where it stood before: ``q_proj.weight``, not ``q_proj.base.weight``.

    So the model without what was added is a part of its own state dict, as whoever saves or loads it expects. State
    dicts with the other names are read as well.
    """
    layer.register_state_dict_post_hook(_written)
    layer.register_load_state_dict_pre_hook(_read)


def put_into_base(layer: nn.Module, name: str, value: object) -> bool:
    """Sets ``layer.weight`` or ``layer.bias`` where it is, in ``layer.base``; False for any other name.

    So weights that transformers ties after the layer was changed are tied.

    Raises:
        UsageError: it has another shape, which what was added to the layer does not fit.
    """
    if name not in ("weight", "bias") or "base" not in layer._modules:
        return False
    was = getattr(layer.base, name)
    if isinstance(was, Tensor) and isinstance(value, Tensor) and was.shape != value.shape:
        fix = "call turnout.reshape.detach(model) first, and attach adapters of the new size after that"
        got, allowed = f"shape {tuple(value.shape)}", f"keep the shape {tuple(was.shape)} that its adapters fit"
        where = f"turnout.layers.{type(layer).__name__}"
        raise UsageError(word(f"the {name} of a changed layer", got=got, allowed=allowed, where=where, fix=fix))
    setattr(layer.base, name, value)
    return True


def _written(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    inner = f"{prefix}base."
    assert isinstance(layer.base, nn.Module)
    for name in layer.base.state_dict(keep_vars=True):
        if inner + name in state:
            state[prefix + name] = state.pop(inner + name)


def _read(layer: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    added = tuple(prefix + part for part in (*_ADDED, "base."))
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(added)]:
        state[f"{prefix}base.{key.removeprefix(prefix)}"] = state.pop(key)
