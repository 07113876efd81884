"""The adapters and routers of a live model, beside its base in one folder: what ``attach_folder`` puts on again."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.expects import expects
from turnout.layers import Adapter
from turnout.models.checkpoint.peft import PeftAdapter, write_adapter, write_gates
from turnout.reshape.adapters.host import CHOICE
from turnout.reshape.adapters.routers import GATED
from turnout.reshape.adapters.trained import router_tensors, write_routers
from turnout.storage import write_whole
from turnout.types import Report

__all__ = ["FILE", "FORMAT", "adapters_of", "describe", "refuse_names", "writer"]

FORMAT = "turnout.adapters/1"
FILE = "adapters.json"


@expects(model=nn.Module)
def adapters_of(model: nn.Module, *, state: Mapping[str, Tensor] | None = None) -> list[PeftAdapter]:
    """The adapters of an attached model as they are now, for instance after training; copies.

    Args:
        model: one that ``attach`` gave adapters.
        state: tensors to take in the place of the model's own, as its state dict names them, where there are such.

    Raises:
        UsageError: it has none.

    >>> import torch
    >>> one = PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 0.5)})
    >>> from turnout.reshape import attach
    >>> model, _ = attach(nn.Sequential(nn.Linear(8, 4)), [one])
    >>> [(one.name, one.factor["0"][2]) for one in adapters_of(model)]
    [('a', 0.5)]

    Source: none; plain bookkeeping.
    """
    factor: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    if not layers:
        fix, where = "call turnout.reshape.attach first", "turnout.reshape.adapters_of"
        raise UsageError(word("model", got="no adapters", allowed="have adapters", where=where, fix=fix))
    state = state or {}
    for module, layer in layers.items():
        down, up = (state.get(f"{module}.paths.{key}", getattr(layer.paths, key)) for key in ("down", "up"))
        for n, name in enumerate(layer.names):
            rows = slice(layer.paths.border_N[n], layer.paths.border_N[n + 1])
            a, b = down[rows].detach().clone(), up[rows].detach().t().clone()
            factor.setdefault(name, {})[module] = (a, b, layer.paths.scale_N[n])
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    # Routers know adapters by their place: the one that ``attach`` gave them, not that of the first map of each.
    order = [name for name in getattr(model, CHOICE, (None, {}, ()))[2] if name in factor]
    return [PeftAdapter(name, base, factor[name]) for name in dict.fromkeys((*order, *factor))]


def writer(model: nn.Module, state: Mapping[str, Tensor]) -> Callable[[Path], Report]:
    """A function that writes to a folder what ``attach`` and training have added to the model.

    It refuses before anything is written. ``adapters.json`` is removed first and written last, so that a folder that
    was not finished never passes for whole.

    Args:
        model: one that ``attach`` changed.
        state: tensors in the place of the model's own, as in ``adapters_of``.
    """
    router, options, _ = getattr(model, CHOICE, (None, {}, ()))
    adapters = adapters_of(model, state=state)
    tensors = router_tensors(model, state)
    names = [one.name for one in adapters]
    refuse_names(names, "save_pretrained and save_attached")
    body = described(adapters[0].base, router, options, names)
    gates = _gates(model, tensors) if router in GATED else {}

    def write(path: Path) -> Report:
        (path / FILE).unlink(missing_ok=True)
        for one in adapters:
            place = path / "adapters" / one.name
            shutil.rmtree(place, ignore_errors=True)
            write_adapter(place, one)
            if one.name in gates:
                write_gates(place, gates[one.name])
        params = write_routers(path, model, tensors)
        write_whole(path / FILE, body)
        return Report("save_attached", {"adapters": names, "router": router, "params_router": params})

    return write


def refuse_names(names: Sequence[str], where: str) -> None:
    """Refuses adapters that cannot each have a folder of their name."""
    plain = [name for name in names if name and name not in (".", "..") and Path(name).name == name]
    if not names or len(set(plain)) < len(names):
        got, fix = ", ".join(map(repr, names)) or "none", "rename the adapters' folders"
        allowed = "be at least one, each of its own name, which may be a folder's"
        raise UsageError(word("the adapters", got=got, allowed=allowed, where=where, fix=fix))


def _gates(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Adapter -> module -> its gate there, as ``attach`` reads them from the adapters' folders."""
    gates: dict[str, dict[str, Tensor]] = {}
    for module, layer in model.named_modules():
        if isinstance(layer, Adapter):
            for n, name in enumerate(layer.names):
                gates.setdefault(name, {})[module] = tensors[f"{module}.weight"][n]
    return gates


def describe(
    path: Path, base: str | None, router: str | None, options: Mapping[str, Any] | None, names: Sequence[str]
) -> None:
    """Writes ``adapters.json``, the last of a folder's files."""
    write_whole(path / FILE, described(base, router, options, names))


def described(base: str | None, router: str | None, options: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """The text of ``adapters.json``.

    Raises:
        UsageError: options that JSON cannot hold.
    """
    body = {"format": FORMAT, "base": base, "router": router, "router_options": dict(options or {})}
    return json.dumps(body | {"adapters": list(names)}, indent=2, default=_numbers) + "\n"


def _numbers(value: object) -> list[Any]:
    """A tensor in JSON; fp32 numbers come back to the bit."""
    if not isinstance(value, Tensor):
        allowed, fix = "be what JSON can hold, or tensors", "leave it out here, and attach with it in code"
        got, where = type(value).__name__, "turnout.reshape.save_adapters"
        raise UsageError(word("router_options", got=got, allowed=allowed, where=where, fix=fix))
    return value.detach().cpu().tolist()
