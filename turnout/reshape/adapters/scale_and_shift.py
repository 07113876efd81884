"""A frozen model with pools of scales and shifts behind its layers, chosen for each instance by what it shows."""

from collections.abc import Mapping, Sequence
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from turnout.decide.token import FedIns
from turnout.errors import UsageError, nearest, word
from turnout.expects import expects
from turnout.layers.scaled import Asking, Scaled
from turnout.paths import SSF
from turnout.reshape.adapters.host import alive, freeze, put, saved_by
from turnout.types import Report

__all__ = ["scale_and_shift"]

_WHERE = "turnout.reshape.scale_and_shift"


@expects(model=nn.Module)
def scale_and_shift(
    model: nn.Module,
    modules: Sequence[str],
    *,
    query: nn.Module,
    query_width: int,
    pool_size: int = 25,
    top_k: int = 3,
    trained: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> tuple[Asking, Report]:
    """The model frozen, with a pool behind each of the named layers and one set of keys for all; changed in place.

    Each instance takes the members with the keys nearest to its query, and goes through their average. At the start the
    model computes what it did. ``query`` may share layers with it: the layers themselves stay as they are. ``detach``
    undoes it.

    Args:
        model: any whose named layers give features in the last axis.
        modules: names of ``nn.Linear`` or ``nn.LayerNorm`` layers.
        query: from the model's input to (B, query_width), such as its own frozen features.
        query_width: Q.
        pool_size: members of each pool.
        top_k: how many an instance takes.
        trained: names of modules that go on being trained, such as the head.
        generator: where the starting keys' chance comes from.

    Returns:
        The model that asks and then answers; and a report: the modules, and how many numbers are trained.

    Raises:
        UsageError: a layer of another kind, or no layer.
        UnknownNameError: no module is called that.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> asking, report = scale_and_shift(net, ["0"], query=nn.Identity(), query_width=4, pool_size=5)
    >>> report["params_trained"]  # 5 keys, and 5 scales and shifts
    80

    Source: Feng et al., 2023, "Towards Instance-adaptive Inference for Federated Learning"; Lian et al., 2022, "Scaling
    & Shifting Your Features". There each member of the pool has a classifier of its own too, and
    members start at random, scales from N(1, 0.02) and shifts from N(0, 0.02); ours start where the model is unchanged.
    """
    found = dict(model.named_modules())
    _check(found, modules, trained)
    router = FedIns(query_width, pool_size, top_k=top_k, query_width=query_width, generator=generator)
    alive(model)
    freeze(model)
    query.requires_grad_(False)
    for name in trained:
        found[name].requires_grad_(True)
    for name in modules:
        weight = cast(Tensor, found[name].weight)
        put(model, name, Scaled(found[name], SSF(pool_size, len(weight)).to(weight), router.to(weight.device)))
    saved_by(model, _refuse)
    asking = Asking(model, query, router)
    count = sum(parameter.numel() for parameter in asking.parameters() if parameter.requires_grad)
    values = {"modules": list(modules), "pool_size": pool_size, "top_k": top_k, "params_trained": count}
    return asking, Report("scale_and_shift", values)


def _refuse(model: nn.Module, state: object) -> NoReturn:
    got, allowed = "a model with pools of scales and shifts", "be one that can be put together from a folder"
    fix = (
        "save asking.state_dict(), and load it after the same call of scale_and_shift; or detach(asking), for the base"
    )
    raise UsageError(word("what to save", got=got, allowed=allowed, where="save_pretrained", fix=fix))


def _check(found: Mapping[str, nn.Module], modules: Sequence[str], trained: Sequence[str]) -> None:
    for name in [*modules, *trained]:
        if name not in found:
            raise nearest(name, list(found), kind="module", where=_WHERE)
    wrong = [name for name in modules if not _fits(found[name])]
    if wrong or not modules:
        got = f"{wrong[0]}, a {type(found[wrong[0]]).__name__}" if wrong else "none"
        allowed, fix = (
            "be nn.Linear, or nn.LayerNorm of the last axis with a gain; at least one",
            "name linear layers or layer norms",
        )
        raise UsageError(word("modules", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _fits(layer: nn.Module) -> bool:
    norm = isinstance(layer, nn.LayerNorm) and layer.weight is not None and layer.weight.ndim == 1
    return norm or isinstance(layer, nn.Linear)
