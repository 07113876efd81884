"""Modules that stand around others: compiled, distributed, checkpointed or home-made ones, and what is inside them."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["plain_names", "routers_of", "stripped", "takes", "unwrapped"]

# Where wrappers hold what they wrap: torch.compile, FullyShardedDataParallel, activation checkpointing; and, where it
# is all that they hold, DistributedDataParallel, DataParallel, AveragedModel and what is written after their example.
_SURE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ALONE = "module"


def _held(module: nn.Module) -> str | None:
    """The attribute in which a wrapper holds what it wraps; None for other modules.

    A module is a wrapper by its attribute, as above, or when one module is all it holds and it hands on whatever it is
    called with.
    """
    children = [name for name, _ in module.named_children()]
    for name in _SURE:
        if name in children:
            return name
    if len(children) != 1 or next(iter(module.parameters(recurse=False)), None) is not None:
        return None
    if children == [_ALONE]:
        return _ALONE
    kinds = {each.kind for each in inspect.signature(module.forward).parameters.values()}
    hands_on = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return children[0] if hands_on and next(iter(module.buffers(recurse=False)), None) is None else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers around it; a module without any is itself.

    >>> import torch
    >>> inside = nn.Linear(1, 1)
    >>> unwrapped(torch.nn.DataParallel(inside)) is inside is unwrapped(inside)
    True

    Source: none; plain bookkeeping.
    """
    while (name := _held(module)) is not None:
        module = getattr(module, name)
    return module


def takes(call: Callable[..., Any], name: str) -> bool:
    """Whether something that is called takes this keyword, looked for through wrappers that hand keywords on.

    >>> class Around(nn.Module):
    ...     def __init__(self, inside):
    ...         super().__init__()
    ...         self.inside = inside
    ...     def forward(self, *arguments, **keywords):
    ...         return self.inside(*arguments, **keywords)
    >>> takes(Around(nn.Identity()), "input"), takes(Around(nn.Identity()), "mask"), takes(lambda mask: 0, "mask")
    (True, False, True)

    Source: none; plain bookkeeping.
    """
    while isinstance(call, nn.Module):
        held = _held(call)
        keywords = inspect.signature(call.forward).parameters
        if held is None and name in keywords:
            return True
        if held is None:
            return False
        call = getattr(call, held)
    return name in inspect.signature(call).parameters


def routers_of(model: nn.Module) -> list[nn.Module]:
    """What the model, or whatever it is wrapped in, says its ``routers`` are, in order; [] where nothing says so.

    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.routers = nn.ModuleList([nn.Identity()])
    >>> len(routers_of(nn.Sequential(Model()))), routers_of(nn.Identity())
    (1, [])

    Source: none; plain bookkeeping.
    """
    for module in model.modules():
        found = getattr(module, "routers", None)
        if (found is not None and not callable(found)) or isinstance(found, nn.ModuleList):
            return [unwrapped(router) for router in found]
    return []


def plain_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name of a tensor or module in the model -> its name without the wrappers that it is in.

    >>> import torch
    >>> model = torch.nn.DataParallel(nn.Sequential(torch.nn.DataParallel(nn.Linear(1, 1))))
    >>> plain_names(model, model.state_dict())
    {'module.0.module.weight': '0.weight', 'module.0.module.bias': '0.bias'}

    Source: none; plain bookkeeping.
    """
    wrappers = {path: held for path, module in model.named_modules() if (held := _held(module)) is not None}
    found = {}
    for name in names:
        pieces, path, plain = name.split("."), "", []
        for piece in pieces:
            if wrappers.get(path) != piece:
                plain.append(piece)
            path = f"{path}.{piece}" if path else piece
        found[name] = ".".join(plain)
    return found


def stripped(name: str) -> str:
    """A name as written by others, without what wrappers put into it: ``_orig_mod.``, a leading ``module.``...

    >>> stripped("module._orig_mod.blocks.0.weight"), stripped("blocks.0.module.weight")
    ('blocks.0.weight', 'blocks.0.module.weight')

    Source: none; plain bookkeeping.
    """
    pieces = [piece for piece in name.split(".") if piece not in _SURE]
    while len(pieces) > 1 and pieces[0] == _ALONE:
        pieces = pieces[1:]
    return ".".join(pieces)
