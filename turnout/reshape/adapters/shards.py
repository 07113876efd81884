"""MoS on a live model: adapters put together from shared shards, trained, saved as one file, and put on again."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from turnout.errors import CheckpointError, UsageError, word
from turnout.expects import PATH, expects
from turnout.layers import Adapter, Scaled, Sharded
from turnout.models.checkpoint.peft import PeftAdapter, same_base
from turnout.paths import Shards
from turnout.reading import check_fields, parse_json
from turnout.reshape.adapters.host import SHARDS, alive, put, saved_by
from turnout.reshape.adapters.host import freeze as freeze_all
from turnout.reshape.adapters.poly import named_linears
from turnout.storage import load_tensors, save_tensors
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["SHARDS_FILE", "attach_shards", "load_shards", "save_shards"]

SHARDS_FILE = "shards.safetensors"
_FORMAT = "turnout.shards/1"
_WHERE = "turnout.reshape.attach_shards"
_TENSORS = ("down", "up", "index_down", "index_up")


@expects(model=nn.Module)
def attach_shards(
    model: Model,
    modules: Sequence[str],
    *,
    budget: int = 2,
    rank: int = 8,
    shards: int = 4,
    private: int = 1,
    dissociate: bool = True,
    alpha: float = 16.0,
    together: Literal["name", "shape"] = "name",
    generator: torch.Generator | None = None,
    freeze: bool = True,
) -> tuple[Model, Report]:
    """The same model, each named linear map with an adapter of ``rank`` from pools that they share; changed in place.

    Everything else is frozen, so that any loop trains the pools alone: ``model.turnout_shards``. At the start the model
    computes what it did. ``detach`` undoes it; ``fold_adapters`` makes an ordinary adapter of it. ``save_pretrained``
    writes a folder that transformers loads as the base, and ``load_shards`` as the whole.

    Args:
        model: any with ``nn.Linear`` maps.
        modules: which of them, by the end of their names, such as "q_proj"; ``*`` stands for anything.
        budget: the pools hold as many numbers as ordinary adapters of this rank would.
        rank: of each map's adapter.
        shards: in how many a vector is cut; it divides the widths of the maps.
        private: how many of a map's ``rank`` vectors are its own.
        dissociate: False draws the same shards for both factors.
        alpha: of the scale alpha / rank.
        together: maps of the same last name and shape share pools, or all maps of the same shape.
        generator: where the chance of indices and starting weights comes from.
        freeze: False leaves everything else as trainable as it is.

    Returns:
        ``model`` itself, and a report: ``groups`` names the maps that share, ``params_trained`` is what the pools hold
        and ``params_as_lora`` what adapters of this rank that share nothing would.

    Raises:
        UnknownNameError: a name fits no module.
        UsageError: no linear maps, a model that has adapters already, or a rank that the pools do not hold.
        ShapeError: shards that do not divide a width.

    >>> model = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 4)}) for _ in range(4))
    >>> model, report = attach_shards(model, ["proj"], budget=1, rank=4, shards=2, private=0)
    >>> report["params_trained"], report["params_as_lora"]
    (48, 192)

    Source: Wang et al., 2025, "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards".
    """
    _fresh(model)
    if together not in ("name", "shape"):
        allowed, fix = "be 'name' or 'shape'", "pass together='name'"
        raise UsageError(word("together", got=together, allowed=allowed, where=_WHERE, fix=fix))
    maps = named_linears(model, modules, _WHERE)
    groups = _groups(maps, together)
    options = {"budget": budget, "rank": rank, "shards": shards, "private": private, "dissociate": dissociate}
    options |= {"alpha": alpha, "generator": generator}  # pyrefly: ignore[unsupported-operation]
    pools = {key: _shards([maps[name] for name in names], options) for key, names in groups.items()}
    return model, Report("attach_shards", _put(model, groups, pools, freeze))


@expects(path=PATH, model=nn.Module)
def save_shards(path: str | Path, model: nn.Module) -> Report:
    """Writes the model's shards to ``shards.safetensors`` in a folder, whole or not at all.

    The tensors are GROUP.down, GROUP.up and the indices into them, GROUP.index_down and GROUP.index_up (M, r, l). The
    metadata are JSON: the format, the base model's name, and of each group the modules, in the order of the indices,
    and the settings.

    Args:
        path: the folder; made where it is missing.
        model: one that ``attach_shards`` changed.

    Returns:
        A report: the modules, and how many numbers are trained.

    Raises:
        UsageError: the model has no shards.
        StorageError: the folder cannot be written.

    >>> import tempfile
    >>> model = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 4)}) for _ in range(2))
    >>> model, _ = attach_shards(model, ["proj"], budget=1, rank=2, shards=2, private=0)
    >>> plain = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 4)}) for _ in range(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_shards(folder, model)["params"], load_shards(plain, folder)[1]["params_trained"]
    (24, 24)

    Source: none; the safetensors format.
    """
    write = _writer(model, {})
    return write(Path(path))


def _writer(model: nn.Module, state: Mapping[str, Tensor]) -> Callable[[Path], Report]:
    """A function that writes the shards to a folder; tensors of a state dict stand in the place of the model's own."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Sharded)}
    held: nn.ModuleDict = getattr(model, SHARDS, nn.ModuleDict())
    pools = {key: one for key, one in held.items() if isinstance(one, Shards)}
    if not layers or not pools:
        fix, where = "call turnout.reshape.attach_shards first", "turnout.reshape.save_shards"
        raise UsageError(word("model", got="no shards", allowed="have shards", where=where, fix=fix))
    tensors, groups = {}, {}
    for key, one in pools.items():
        names = {layer.number: name for name, layer in layers.items() if layer.paths is one}
        groups[key] = {"modules": [names[m] for m in range(one.maps)], "options": _options(one)}
        for name in _TENSORS:
            tensor = state.get(f"{SHARDS}.{key}.{name}", getattr(one, name)).detach().cpu().contiguous()
            tensors[f"{key}.{name}"] = tensor if tensor.is_floating_point() else tensor.int()
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    metadata = {"format": _FORMAT, "shards": json.dumps({"base": base, "groups": groups})}
    params = sum(one.cost().params or 0 for one in pools.values())

    def write(path: Path) -> Report:
        save_tensors(path / SHARDS_FILE, tensors, metadata)
        return Report("save_shards", {"modules": list(layers), "params": params})

    return write


@expects(model=nn.Module, path=PATH)
def load_shards(model: Model, path: str | Path, *, any_base: bool = False) -> tuple[Model, Report]:
    """The same model with the shards that ``save_shards`` wrote; changed in place, whole or not at all.

    Args:
        model: one without adapters, with linear maps of those names and shapes.
        path: the folder.
        any_base: take shards that say they were trained on a model of another name; shapes are checked anyway.

    Returns:
        What ``attach_shards`` gives.

    Raises:
        CheckpointError: no whole file, or one that does not fit the model; it is then as it was.
        UsageError: the model has adapters already.
        ShapeError: shards of a model of another name.

    >>> load_shards.__name__  # see save_shards
    'load_shards'

    Source: none; the safetensors format.
    """
    file = Path(path) / SHARDS_FILE
    _fresh(model)
    body, tensors = _read(file)
    if not any_base:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        same_base([PeftAdapter(file.parent.name, body.get("base"), {})], name)
    groups, pools = {}, {}
    for key, group in body["groups"].items():
        groups[key] = list(group["modules"])
        pools[key] = _pool(model, file, key, group, tensors)
    return model, Report("load_shards", _put(model, groups, pools, True))


def _values(groups: Mapping[str, Sequence[str]], pools: Mapping[str, Shards]) -> dict[str, Any]:
    costs = [(one.cost(), one.maps) for one in pools.values()]
    trained = sum(cost.params or 0 for cost, _ in costs)
    alone = sum((cost.params_active or 0) * maps for cost, maps in costs)
    return {"groups": dict(groups), "params_trained": trained, "params_as_lora": alone}


def _fresh(model: nn.Module) -> None:
    if any(isinstance(module, Adapter | Scaled | Sharded) for module in model.modules()):
        got, allowed = "adapters already", "have none"
        fix = "call turnout.reshape.detach(model) first"
        raise UsageError(word("model", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _groups(maps: Mapping[str, nn.Linear], together: str) -> dict[str, list[str]]:
    """Which maps share pools: a key, and their names in the model's order."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for name, linear in maps.items():
        leaf = name.rpartition(".")[2] if together == "name" else "all"
        found.setdefault((leaf, linear.in_features, linear.out_features), []).append(name)
    leaves = [leaf for leaf, _, _ in found]
    return {
        leaf if leaves.count(leaf) == 1 else f"{leaf}_{width}x{out}": names
        for (leaf, width, out), names in found.items()
    }


def _put(
    model: nn.Module, groups: Mapping[str, Sequence[str]], pools: Mapping[str, Shards], freeze: bool
) -> dict[str, Any]:
    """The maps changed, everything else frozen, the pools in the model; what there is to report."""
    alive(model)
    if freeze:
        freeze_all(model)
    for key, names in groups.items():
        for number, name in enumerate(names):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)  # checked before
            put(model, name, Sharded(linear, pools[key], number).train(linear.training))
    setattr(model, SHARDS, nn.ModuleDict({f"{key}": one for key, one in pools.items()}))
    saved_by(model, _writer)
    return _values(groups, pools)


def _options(one: Shards) -> dict[str, Any]:
    return {name: getattr(one, name) for name in ("budget", "rank", "shards", "private", "dissociate", "alpha")}


def _pool(model: nn.Module, file: Path, key: str, group: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Shards:
    """The shards of one group, from what the file says, checked against the model."""
    names = group["modules"]
    everything = dict(model.named_modules())
    linears = [module for name in names if isinstance(module := everything.get(name), nn.Linear)]
    shapes = {tuple(linear.weight.shape) for linear in linears}
    if len(shapes) != 1 or len(linears) < len(names):
        got = f"{names}, {len(linears)} of them linear maps of the model, of shapes {sorted(shapes)}"
        raise _bad(file, f"the modules of {key}", got, "be linear maps of the model, of one shape")
    try:
        one = _shards(linears, group["options"])
    except (TypeError, UsageError) as error:
        raise _bad(file, f"the settings of {key}", str(error), "be those of turnout.paths.Shards") from error
    for name in _TENSORS:
        slot: Tensor = getattr(one, name)
        tensor = tensors.get(f"{key}.{name}", torch.empty(0))
        fits = tensor.shape == slot.shape and tensor.is_floating_point() == slot.is_floating_point()
        if not fits or (not slot.is_floating_point() and not 0 <= int(tensor.min()) <= int(tensor.max()) < len(one.up)):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            allowed = f"have the shape {tuple(slot.shape)}, with indices below {len(one.up)}"
            raise _bad(file, f"{key}.{name}", got, allowed)
        with torch.no_grad():
            slot.copy_(tensor)
    return one


def _shards(linears: Sequence[nn.Linear], options: Mapping[str, Any]) -> Shards:
    """For these maps, of their type, on their device."""
    first = linears[0]
    return Shards(first.in_features, first.out_features, len(linears), **options).to(first.weight)


def _read(file: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    def refuse(problem: str) -> CheckpointError:
        return _bad(file, "the file", problem, "be a whole safetensors file, as it was written")

    metadata, tensors = load_tensors(file, refuse, ("format", "shards"))
    if metadata.get("format") != _FORMAT:
        raise _bad(file, "the format", metadata.get("format"), f"be {_FORMAT}, with its groups")
    body = parse_json(metadata.get("shards", ""), refuse)
    check_fields(body, {"base": str | None, "groups": dict[str, dict]}, refuse)
    for group in body["groups"].values():
        check_fields(group, {"modules": list[str], "options": dict[str, Any]}, refuse)
    return body, tensors


def _bad(file: Path, what: str, got: object, allowed: str) -> CheckpointError:
    fix = "load the file that save_shards wrote, on the model that it was saved from"
    return CheckpointError(word(what, got=str(got), allowed=allowed, where=str(file), fix=fix))
