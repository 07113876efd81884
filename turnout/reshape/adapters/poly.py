"""Poly and MHR on a live model: an inventory of adapters from nothing, and new tasks for one that is trained."""

import fnmatch
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from turnout.decide.token import Poly
from turnout.errors import ShapeError, UsageError, nearest, word
from turnout.expects import expects
from turnout.layers import Adapter
from turnout.models.checkpoint.peft import PeftAdapter
from turnout.reshape.adapters.host import CHOICE
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["add_tasks", "fresh_adapters"]

_WHERE = "turnout.reshape.fresh_adapters"


@expects(model=nn.Module)
def fresh_adapters(
    model: nn.Module,
    modules: Sequence[str],
    *,
    count: int,
    rank: int,
    scale: float = 1.0,
    base: str | None = None,
    generator: torch.Generator | None = None,
) -> list[PeftAdapter]:
    """``count`` adapters that have learned nothing, for ``attach``; they are called skill-0, skill-1 and so on.

    A is uniform within D ** -0.5 and B zero, so that the model computes what it did until they are trained.

    Args:
        model: the model that will get them; not changed.
        modules: which linear maps, by the end of their names, such as "q_proj"; ``*`` stands for anything.
        count: how many adapters.
        rank: of each.
        scale: the factor of B A, lora_alpha / r in the words of PEFT.
        base: the name of the model; None is what its configuration says.
        generator: where the chance comes from; torch's default when None.

    Raises:
        UnknownNameError: a name fits no module.
        UsageError: it fits one that is no ``nn.Linear``.
        ShapeError: count or rank below 1.

    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> two = fresh_adapters(model, ["0"], count=2, rank=3)
    >>> [one.name for one in two], two[0].params
    (['skill-0', 'skill-1'], 36)

    Source: Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", for how they start; Ponti et al.,
    2023, "Combining Modular Skills in Multitask Learning", for an inventory of them.
    """
    if min(count, rank) < 1:
        got, fix = f"{count} and {rank}", "pass such as count=8 and rank=16"
        raise ShapeError(word("count and rank", got=got, allowed="be at least 1", where=_WHERE, fix=fix))
    maps = named_linears(model, modules, _WHERE)
    base = base or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    adapters = []
    for n in range(count):
        factor = {}
        for name, linear in maps.items():
            weight, bound = linear.weight, linear.in_features**-0.5
            a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
            factor[name] = (a.to(weight), weight.new_zeros(linear.out_features, rank), float(scale))
        adapters.append(PeftAdapter(f"skill-{n}", base, factor))
    return adapters


@expects(model=nn.Module)
def add_tasks(model: Model, count: int = 1, *, generator: torch.Generator | None = None) -> tuple[Model, Report]:
    """The same model with ``count`` more tasks in its tables, each with logits near 0; changed in place.

    After this ``turnout.train.train_routers(model, batches)`` learns the new task by the table alone (MHR-z), and with
    ``adapters=True`` by the adapters too. The other tasks' logits stay; where adapters are trained, what they do does
    not.

    Args:
        model: ``attach``-ed with the router "poly".
        count: how many.
        generator: where the logits' chance comes from; torch's default when None.

    Returns:
        ``model`` itself, and a report: ``tasks`` numbers the new ones, ``params_added`` is what they cost.

    Raises:
        UsageError: the model has no such routers, or of different numbers of tasks.

    >>> from turnout.paths import LoRA
    >>> model = nn.Sequential(Adapter(nn.Linear(4, 4), LoRA(4, 4, ranks=(1, 1)), Poly(4, 2, num_tasks=3, parts=2)))
    >>> add_tasks(model)[1].values
    {'tasks': [3], 'params_added': 4}

    Source: Caccia et al., 2023, "Multi-Head Adapter Routing for Cross-Task Generalization". There the new task's logits
    take the place of the old ones.
    """
    found = {module.router: None for module in model.modules() if isinstance(module, Adapter)}
    routers = [router for router in found if isinstance(router, Poly)]
    sizes = sorted({router.num_tasks for router in routers})
    if len(routers) < len(found) or len(sizes) != 1 or count < 1:
        got = f"{len(routers)} of {len(found)} routers that are Poly, with {sizes} tasks, and {count} more"
        allowed, fix = "be Poly, all of as many tasks, and at least one more", "attach with router='poly'"
        where = "turnout.reshape.add_tasks"
        raise UsageError(word("the model's routers", got=got, allowed=allowed, where=where, fix=fix))
    for router in routers:
        router.add_tasks(count, generator=generator)
    chosen = getattr(model, CHOICE, None)
    if chosen is not None:  # what save_attached will write
        setattr(model, CHOICE, (chosen[0], chosen[1] | {"num_tasks": sizes[0] + count}, *chosen[2:]))
    added = sum(router.logit[-count:].numel() for router in routers)
    return model, Report("add_tasks", {"tasks": list(range(sizes[0], sizes[0] + count)), "params_added": added})


def named_linears(model: nn.Module, modules: Sequence[str], where: str) -> dict[str, nn.Linear]:
    """The linear maps whose names end in one of ``modules``, in the model's order."""
    everything = {name: module for name, module in model.named_modules() if name}
    chosen: set[str] = set()
    for pattern in modules:
        hits = {name for name in everything if fnmatch.fnmatchcase(f".{name}", f"*.{pattern}")}
        if not hits:
            leaves = sorted({name.rpartition(".")[2] for name in everything})
            raise nearest(pattern, leaves, kind="module", where=where)
        chosen |= hits
    found = {name: module for name, module in everything.items() if name in chosen}
    wrong = [name for name, module in found.items() if not isinstance(module, nn.Linear)]
    if wrong or not found:
        got = f"{wrong[0]}, a {type(found[wrong[0]]).__name__}" if wrong else "none"
        fix = "name linear maps, such as 'q_proj', of a model that is loaded unquantised and has no adapters yet"
        raise UsageError(word("modules", got=got, allowed="be nn.Linear, at least one", where=where, fix=fix))
    return found  # pyrefly: ignore[bad-return]
