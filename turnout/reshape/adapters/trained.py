"""What the routers of attached adapters have learned, on disk: one safetensors file beside the adapters."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from turnout.decide.token import Poly
from turnout.errors import CheckpointError, UsageError, word
from turnout.expects import PATH, expects
from turnout.layers import Adapter, Sharded
from turnout.models.checkpoint.peft import PeftAdapter
from turnout.reading import parse_json
from turnout.run.low_rank import merge
from turnout.storage import load_tensors, save_tensors
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["ROUTERS_FILE", "fold_adapters", "load_routers", "save_routers"]

ROUTERS_FILE = "routers.safetensors"
_FORMAT = "turnout.routers/1"
_WHERE = "turnout.reshape.load_routers"


@expects(path=PATH, model=nn.Module)
def save_routers(path: str | Path, model: nn.Module) -> Report:
    """Writes what the routers of the model's adapters hold to ``routers.safetensors`` in a folder, whole or not at all.

    The file's tensors are called MODULE.PARAMETER; its metadata say the format, and of each module the kind of its
    router, how many adapters it has, and their names in order. A router that several modules share is written for each
    of them.

    Args:
        path: the folder; made where it is missing.
        model: one that ``attach`` gave adapters.

    Returns:
        A report: the modules, and how many numbers were written.

    Raises:
        UsageError: the model has no adapters.
        StorageError: the folder cannot be written.

    >>> import tempfile, torch
    >>> from turnout.decide.token import TopK
    >>> from turnout.paths import LoRA
    >>> model = nn.Sequential(Adapter(nn.Linear(4, 4), LoRA(4, 4, ranks=(1, 1)), TopK(4, 2, top_k=1)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_routers(folder, model)["modules"], load_routers(model, folder)[1]["modules"]
    (['0'], ['0'])

    Source: none; the safetensors format.
    """
    params = write_routers(path, model, router_tensors(model, {}))
    return Report("save_routers", {"modules": list(_layers(model)), "params": params})


def router_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MODULE.PARAMETER -> what the routers hold, or a state dict of the model says that they do."""
    return {
        f"{name}.{key}": state.get(f"{name}.router.{key}", tensor).detach()
        for name, layer in _layers(model).items()
        for key, tensor in layer.router.state_dict().items()
    }


def write_routers(path: str | Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """Writes the routers' tensors; how many numbers they hold."""
    kinds = json.dumps({name: _kind(layer) for name, layer in _layers(model).items()})
    metadata = {"format": _FORMAT, "routers": kinds}
    held = {key: tensor.clone() for key, tensor in tensors.items()}  # layers may share a router
    save_tensors(Path(path) / ROUTERS_FILE, held, metadata)
    return sum(tensor.numel() for tensor in tensors.values())


@expects(model=nn.Module, path=PATH)
def load_routers(model: Model, path: str | Path) -> tuple[Model, Report]:
    """The same model with the routers that ``save_routers`` wrote; changed in place, all of them or none.

    Args:
        model: ``attach``-ed with the same adapters and the same kind of router.
        path: the folder.

    Returns:
        ``model`` itself, and a report of the modules.

    Raises:
        CheckpointError: no whole file, or one of other modules, kinds, adapters, shapes or another order of adapters;
            the model is then as it was.
        UsageError: the model has no adapters.

    >>> load_routers.__name__  # see save_routers
    'load_routers'

    Source: none; the safetensors format.
    """
    file, layers = Path(path) / ROUTERS_FILE, _layers(model)
    kinds, tensors = _read(file)
    wanted = {name: _kind(layer) for name, layer in layers.items()}
    for name in sorted(wanted.keys() | kinds.keys()):
        ours, theirs = wanted.get(name), kinds.get(name)
        bare = isinstance(theirs, list) and len(theirs) == 2  # without names, as files were first
        if (ours[:2] if ours and bare else ours) != theirs:
            raise _bad(file, f"the router of {name}", str(theirs), f"be {ours}, as in the model")
    slots = {f"{name}.{key}": slot for name, layer in layers.items() for key, slot in layer.router.state_dict().items()}
    for key in sorted(slots.keys() | tensors.keys()):
        shapes = [tuple(side[key].shape) if key in side else None for side in (tensors, slots)]
        if shapes[0] != shapes[1]:
            raise _bad(file, key, f"shape {shapes[0]}", f"have the shape {shapes[1]}, as in the model")
        if not bool(tensors[key].isfinite().all()):
            raise _bad(file, key, "numbers that are not", "be finite")
    for key, slot in slots.items():
        slot.copy_(tensors[key])
    return model, Report("load_routers", {"modules": list(layers)})


@expects(model=nn.Module)
@torch.no_grad()
def fold_adapters(
    model: nn.Module, name: str, *, task: int | Literal["average"] | None = None, base: str | None = None
) -> PeftAdapter:
    """One ordinary adapter that computes what the attached ones do together, for ``write_adapter``.

    For ScaLearn, at each linear map A stacks the factors A_n of all adapters, and B holds omega_n * scale_n * B_n side
    by side; the rank is the sum of theirs. For Poly and MHR, A = sum_n w_n A_n and B = sum_n w_n scale_n B_n, part by
    part, with w the weights of one task; the rank is the largest of theirs. The scale is 1, and both are exact but for
    rounding. With ``task="average"`` all w are equal, whatever the router: what MHR-mu goes on to train. Shards (MoS)
    are put together, to the bit.

    Args:
        model: ``attach``-ed with the router "scalearn" or "poly", or any for ``task="average"``; or changed by
            ``attach_shards``.
        name: of the new adapter.
        task: for Poly, the task's number, or "average".
        base: the name of the model it belongs to.

    Returns:
        The adapter; the model is not changed.

    Raises:
        UsageError: the model has no adapters, or another router: what it adds depends on the input; or Poly, and no
            known task; or "average", and maps that only some adapters change: a mean of factors has no one meaning.

    >>> import torch
    >>> from turnout.paths import LoRA, ScaLearn
    >>> model = nn.Sequential(Adapter(nn.Linear(4, 4), LoRA(4, 4, ranks=(1, 2)), ScaLearn(2, 4)))
    >>> fold_adapters(model, "both").factor["0"][0].shape
    torch.Size([3, 4])

    Source: Frohmann et al., 2024, "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale",
    for the scaling; Caccia et al., 2023, "Multi-Head Adapter Routing for Cross-Task Generalization", for the average;
    that all fold into one adapter of LoRA's kind is arithmetic.
    """
    factor = {}
    sharded = {key: module for key, module in model.named_modules() if isinstance(module, Sharded)}
    if sharded:
        return PeftAdapter(name, base, {key: layer.paths.factors(layer.number) for key, layer in sharded.items()})
    layers = _layers(model)
    everyone = {adapter for layer in layers.values() for adapter in layer.names}
    for module, layer in layers.items():
        if task is not None:
            factor[module] = _merged(layer, module, task, everyone)
            continue
        fold = getattr(layer.router, "fold", None)
        if fold is None:
            fix = "pass task=0" if isinstance(layer.router, Poly) else "attach with router='scalearn'"
            raise _changing(layer, module, fix)
        mode = layer.router.training
        layer.router.eval()
        weights = fold(layer.paths.weights())
        layer.router.train(mode)
        rank_N = torch.tensor(weights.rank_N, device=weights.up_RO.device)
        scale_R = weights.up_RO.new_tensor(weights.scale_N).repeat_interleave(rank_N)
        up_OR = (weights.up_RO * scale_R.unsqueeze(1)).t()
        factor[module] = (weights.down_RD.clone(), up_OR.contiguous(), 1.0)
    return PeftAdapter(name, base, factor)


def _merged(
    layer: Adapter, module: str, task: int | Literal["average"], everyone: set[str]
) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of the adapters' average with the weights of a task, or with equal ones."""
    weights = layer.paths.weights()
    if task == "average":
        if set(layer.names) != everyone:
            got, allowed = f"{', '.join(layer.names)} at {module}", "all change the same maps for task='average'"
            fix, where = "leave out the adapters that do not", "turnout.reshape.fold_adapters"
            raise UsageError(word("the adapters", got=got, allowed=allowed, where=where, fix=fix))
        weight_SN = weights.down_RD.new_full((1, weights.num_paths), 1 / weights.num_paths)
    elif isinstance(layer.router, Poly):
        weight_SN = layer.router.weights(task).to(weights.down_RD)
    else:
        raise _changing(layer, module, "pass task='average', or none")
    merged = merge(weights, weight_SN)
    return merged.down_RD, merged.up_RO.t().contiguous(), 1.0


def _changing(layer: Adapter, module: str, fix: str) -> UsageError:
    got = f"a {type(layer.router).__name__} at {module}"
    allowed = "be ScaLearn, the same for every input, or Poly with a task"
    return UsageError(word("the router", got=got, allowed=allowed, where="turnout.reshape.fold_adapters", fix=fix))


def _layers(model: nn.Module) -> dict[str, Adapter]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    if not layers:
        fix = "call turnout.reshape.attach first"
        raise UsageError(word("model", got="no adapters", allowed="have some", where=_WHERE, fix=fix))
    return layers


def _kind(layer: Adapter) -> list[Any]:
    return [type(layer.router).__name__, layer.paths.num_paths, list(layer.names)]


def _read(file: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    def refuse(problem: str) -> CheckpointError:
        return _bad(file, "the file", problem, "be a whole safetensors file, as it was written")

    metadata, tensors = load_tensors(file, refuse, ("format", "routers"))
    if metadata.get("format") != _FORMAT:
        raise _bad(file, "the format", str(metadata.get("format")), f"be {_FORMAT}")
    return parse_json(metadata.get("routers", ""), refuse), tensors


def _bad(file: Path, what: str, got: str, allowed: str) -> CheckpointError:
    fix = "attach the adapters and the router that it was saved from"
    return CheckpointError(word(what, got=got, allowed=allowed, where=str(file), fix=fix))
