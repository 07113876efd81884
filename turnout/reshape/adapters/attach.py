"""Attach: adapters from ordinary PEFT folders on a live transformers model, and a router that chooses among them."""

import fnmatch
import glob
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from turnout.errors import CheckpointError, UsageError, nearest, word
from turnout.expects import expects
from turnout.layers import Adapter, Asking, Scaled, Sharded
from turnout.models.checkpoint.peft import PeftAdapter, read_adapter, same_base
from turnout.paths import LoRA
from turnout.reshape.adapters.host import CHOICE, alive, leave_alone, put, saved_by
from turnout.reshape.adapters.host import freeze as freeze_all
from turnout.reshape.adapters.routers import ROUTERS, Site, check_options
from turnout.reshape.adapters.save import writer
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["attach", "detach"]

_WHERE = "turnout.reshape.attach"


@expects(model=nn.Module)
def attach(
    model: Model,
    adapters: Sequence[str | Path | PeftAdapter],
    *,
    router: str | Callable[[Site], nn.Module] = "arrow",
    router_options: Mapping[str, Any] | None = None,
    any_base: bool = False,
    freeze: bool = True,
) -> tuple[Model, Report]:
    """The same model, each adapted linear map an ``Adapter`` of all adapters that change it; changed in place.

    A map that only some adapters change chooses among those. Padding is read from ``attention_mask``, however it is
    passed. The base is frozen, so that any loop trains adapters and routers alone. In the state dict the base keeps its
    names, with the adapters beside it; ``save_pretrained`` writes a folder that transformers loads as the base, and
    ``attach_folder`` as the whole. ``detach`` undoes all of it. ``lora_dropout`` is not applied in training.

    Args:
        model: a transformers model, or any module whose linear maps the adapters name.
        adapters: folders of PEFT, or adapters that were read; ranks, scales and targets may differ.
        router: a name (see ``turnout.reshape.adapters.routers.ROUTERS``), or a function from a ``Site`` to a router.
        router_options: keywords of the router, such as ``{"top_k": 1}``.
        any_base: take adapters that say they were trained on a model of another name; shapes are checked anyway.
        freeze: False leaves the base as trainable as it is.

    Returns:
        ``model`` itself, and a report: ``modules`` names the adapted maps, ``adapters`` and ``ranks`` what there is,
        ``params_added`` and ``params_active_added`` what it costs.

    Raises:
        UsageError: no adapter, two of one name, a model with some, PEFT's layers or no linear maps; a wrong option.
        UnknownNameError: no router, or none of its options, is called that.
        CheckpointError: an adapter's folder is not whole, or its numbers or copies are not for this model.
        ShapeError: the adapters come from different base models.

    >>> from turnout.models.checkpoint import PeftAdapter
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> one = {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}
    >>> model, report = attach(model, [PeftAdapter("a", None, one), PeftAdapter("b", None, one)])
    >>> report["modules"], report["adapters"]
    (['0'], ['a', 'b'])

    Source: Hu et al., 2021, "LoRA", for the adapters; each router names its own.
    """
    found = _found(model, adapters, any_base)
    options = dict(router_options or {})
    build = _builder(router, options, len(found))
    sites = _sites(model, found)
    everyone, shared = tuple(one.name for one in found), dict[object, nn.Module]()
    made = {name: _adapter(model, name, present, build, options, shared, everyone) for name, present in sites.items()}
    report = _report(model, made, found, sites, router)
    alive(model)  # only now: a refusal above leaves the model as it was
    if freeze:
        freeze_all(model)
    for name, adapter in made.items():
        put(model, name, adapter)
    setattr(model, CHOICE, (router if isinstance(router, str) else None, options, everyone))
    saved_by(model, writer)
    return model, report


@overload
def detach(model: Asking) -> tuple[nn.Module, Report]: ...
@overload
def detach(model: Model) -> tuple[Model, Report]: ...
@expects(model=nn.Module)
def detach(model: nn.Module) -> tuple[nn.Module, Report]:
    """The same model without its adapters: every layer is the very module it was; changed in place.

    Parameters ask for gradients again as they did before, and the model's class is what it was.

    Args:
        model: what ``attach``, ``attach_shards`` or ``scale_and_shift`` was given, or the last one's result.

    Returns:
        ``model`` itself, or what the asking model held; and a report whose ``modules`` names what was put back.

    >>> from turnout.models.checkpoint import PeftAdapter
    >>> linear = nn.Linear(8, 4)
    >>> model = nn.Sequential(linear)
    >>> one = PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)})
    >>> model, _ = attach(model, [one])
    >>> model, report = detach(model)
    >>> model[0] is linear, report["modules"]
    (True, ['0'])

    Source: none; plain bookkeeping.
    """
    model = model.model if isinstance(model, Asking) else model
    made = {name: module for name, module in model.named_modules() if isinstance(module, Adapter | Scaled | Sharded)}
    for name, changed in made.items():
        put(model, name, changed.base)
    leave_alone(model)
    return model, Report("detach", {"modules": list(made)})


def _found(model: nn.Module, adapters: Sequence[str | Path | PeftAdapter], any_base: bool) -> list[PeftAdapter]:
    """The adapters, read; a model that they cannot go on is refused."""
    if isinstance(adapters, str | Path | PeftAdapter):
        got, fix = f"a {type(adapters).__name__}", "call attach(model, [FOLDER, FOLDER])"
        raise UsageError(word("adapters", got=got, allowed="be a list of adapters", where=_WHERE, fix=fix))
    found = [one if isinstance(one, PeftAdapter) else read_adapter(one) for one in adapters]
    strangers = {type(module).__module__.partition(".")[0] for module in (model, *model.modules())}
    if "peft" in strangers:
        got = f"a {type(model).__name__} with layers of PEFT"
        fix = "load the model again without PEFT, or pass what PeftModel.unload() returns"
        allowed = "be the base model, without PEFT's own layers"
        raise UsageError(word("model", got=got, allowed=allowed, where=_WHERE, fix=fix))
    names = [one.name for one in found]
    if not found or len(set(names)) < len(names):
        got = ", ".join(names) or "none"
        allowed, fix = "be at least one, each of its own name", "rename the folders of those that share a name"
        fix = fix if found else "name the folders that PEFT wrote"
        raise UsageError(word("adapters", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if any(isinstance(module, Adapter | Scaled | Sharded) for module in model.modules()):
        got, allowed = "adapters already", "have none"
        fix = "call turnout.reshape.detach(model) first, and attach all at once"
        raise UsageError(word("model", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if not any_base:
        same_base(found, getattr(getattr(model, "config", None), "_name_or_path", None))
    return found


def _builder(
    router: str | Callable[[Site], nn.Module], options: Mapping[str, Any], count: int
) -> Callable[[Site], nn.Module]:
    """What builds the routers, with options that it takes."""
    if callable(router):
        return router
    if router not in ROUTERS:
        raise nearest(router, ROUTERS, kind="router", where=_WHERE)
    check_options(router, options, count)
    return ROUTERS[router]


def _sites(model: nn.Module, found: list[PeftAdapter]) -> dict[str, list[PeftAdapter]]:
    """Module name -> the adapters that change it, in the model's order; shapes checked."""
    modules = dict(model.named_modules())
    sites: dict[str, list[PeftAdapter]] = {}
    for one in found:
        for name, factor in one.factor.items():
            _fit(modules, name, one.name, factor)
            sites.setdefault(name, []).append(one)
        _same_copies(modules, one)
        without = _without(modules, one)
        if without and one.settings is not None and not one.settings.starts_at_nothing:
            got = f"{', '.join(without[:3])} of {len(without)} without, in adapter {one.name!r}"
            allowed = "be there for every map that its settings name: init_lora_weights=False starts them at random"
            fix = "save the adapter again, whole"
            raise CheckpointError(word("an adapter's factors", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return {name: sites[name] for name in modules if name in sites}


def _without(modules: Mapping[str, nn.Module], one: PeftAdapter) -> list[str]:
    """The linear maps that an adapter's settings name and its folder has no factors for."""
    if one.settings is None:
        return []
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in one.factor]
    return [name for name in linear if one.settings.targeted(name)]


def _same_copies(modules: Mapping[str, nn.Module], one: PeftAdapter) -> None:
    """Refuses an adapter that brings weights of another base along, such as embeddings of another size."""
    wrong = []
    for name, copy in one.copies.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != copy.shape:
            wrong.append(name)
        elif not weight.is_meta and not torch.equal(weight.detach().cpu(), copy.to(weight.dtype)):
            wrong.append(name)
    if wrong:
        got = f"{', '.join(f'{name} {tuple(one.copies[name].shape)}' for name in wrong)} in adapter {one.name!r}"
        fix = "put these weights into the base model first (resize its embeddings where they differ in size)"
        allowed = "be those of the base model: an adapter belongs to the base that it was trained on"
        raise CheckpointError(
            word("weights of a base model beside an adapter", got=got, allowed=allowed, where=_WHERE, fix=fix)
        )


def _fit(modules: Mapping[str, nn.Module], name: str, adapter: str, factor: tuple[Tensor, Tensor, float]) -> None:
    """Refuses factors that are not of a linear map of the model, or that its type of number cannot hold."""
    a, b, scale = factor
    module = modules.get(name)
    if module is None:
        near = fnmatch.filter(modules, f"*{glob.escape(name.rpartition('.')[2])}")[:1]
        got = f"{name}, {(b.shape[0], a.shape[1])}, in adapter {adapter!r}"
        fix = f"use an adapter of this very model{f' (it has {near[0]})' if near else ''}"
        allowed = "be a linear map of the model (there is none of that name)"
        raise CheckpointError(word("an adapted module", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if not isinstance(module, nn.Linear):
        got, fix = f"{name}, a {type(module).__name__}", "load the base model unquantised, with nn.Linear"
        if type(module).__name__ == "Conv1D":
            fix = "use a model of nn.Linear: maps that store (in, out), as those of GPT-2, have no adapters here"
        raise UsageError(word("an adapted module", got=got, allowed="be nn.Linear", where=_WHERE, fix=fix))
    if tuple(module.weight.shape) != (b.shape[0], a.shape[1]):
        got = f"{name}, {(b.shape[0], a.shape[1])}, in adapter {adapter!r}"
        allowed = f"be a linear map of the model ({tuple(module.weight.shape)})"
        fix = "use an adapter of this very model"
        raise CheckpointError(word("an adapted module", got=got, allowed=allowed, where=_WHERE, fix=fix))
    kind = module.weight.dtype
    if not all(bool(torch.isfinite(one.detach().to(kind)).all()) for one in (a, b)) or not math.isfinite(scale):
        got = f"numbers at {name}, in adapter {adapter!r}, that are not finite as {kind}"
        fix = "load the base model in a type that holds them, such as torch.float32, or leave this adapter out"
        raise CheckpointError(word("an adapter's factors", got=got, allowed="be finite", where=_WHERE, fix=fix))


def _adapter(
    model: nn.Module,
    name: str,
    present: list[PeftAdapter],
    build: Callable[[Site], nn.Module],
    options: Mapping[str, Any],
    shared: dict[object, nn.Module],
    everyone: tuple[str, ...],
) -> Adapter:
    """The linear map of that name with these adapters and a router of them."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    factors = [one.factor[name] for one in present]
    width, out = factors[0][0].shape[1], factors[0][1].shape[0]
    paths = LoRA(width, out, [a.shape[0] for a, _, _ in factors], scales=[scale for _, _, scale in factors])
    paths.to(linear.weight)
    for n, (a, b, _) in enumerate(factors):
        paths.fill(n, a, b)
    gates = tuple(one.gate.get(name) for one in present)
    names = tuple(one.name for one in present)
    site = Site(name, paths, names, options, shared, gates, everyone)
    router = build(site).to(linear.weight.device)
    return Adapter(linear, paths, router, names=names).train(linear.training)


def _report(
    model: nn.Module,
    made: Mapping[str, Adapter],
    found: list[PeftAdapter],
    sites: Mapping[str, list[PeftAdapter]],
    router: str | Callable[[Site], nn.Module],
) -> Report:
    partly = {name: len(present) for name, present in sites.items() if len(present) < len(found)}
    notes = [f"{len(partly)} maps are changed by some of the adapters only"] if partly else []
    for one in found:
        if without := _without(dict(model.named_modules()), one):
            notes.append(f"{one.name} has no factors for {len(without)} maps that its settings name: {without[0]}")
    deciders = {id(adapter.router): adapter.router for adapter in made.values()}
    decides = sum(parameter.numel() for one in deciders.values() for parameter in one.parameters())
    values: dict[str, Any] = {
        "adapters": [one.name for one in found],
        "router": router if isinstance(router, str) else getattr(router, "__name__", "given"),
        "ranks": {one.name: sorted({a.shape[0] for a, _, _ in one.factor.values()}) for one in found},
        "modules": list(made),
        "params_added": sum(adapter.paths.cost().params or 0 for adapter in made.values()),
        "params_router": decides,
    }
    return Report("attach", values, tuple(notes))
