"""Sub-networks under sharding: processes that are about to run different parts are stopped, or each part is exact.

Processes that share shards gather them together. Where one runs block A and another block B, torch joins a piece of A
with a piece of B, and says nothing: both go on with weights that nobody has.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from turnout.errors import UsageError, nearest, word
from turnout.run.ranks.processes import named, shared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["agreed", "subnet"]

_WHERE = "turnout.run.ranks.subnet"


def agreed(names: Sequence[str], *, group: "ProcessGroup | None" = None, device: str = "cpu") -> bool:
    """Whether all processes of a group are about to run the same parts in the same order; one small message.

    Args:
        names: of the parts, in the order that this process runs them.
        group: who shares shards; None for all processes.
        device: of the group's messages.

    >>> agreed(["blocks.0"])  # alone
    True

    Source: none; a hash that all compare.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return True
    digest = hashlib.sha256("\0".join(names).encode()).digest()[:8]
    own = torch.tensor([int.from_bytes(digest, "big") >> 1], device=device)
    # The largest of a number and of its negative are opposite only where all numbers are one.
    bounds = torch.cat([own, -own])
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    return bool(bounds[0] == -bounds[1])


@contextlib.contextmanager
def subnet(
    model: nn.Module,
    names: Sequence[str],
    *,
    how: Literal["refuse", "union"] = "refuse",
    group: "ProcessGroup | None" = None,
    device: str = "cpu",
) -> Iterator[None]:
    """Runs a part of a sharded model, forward and backward pass inside, whatever part the other processes run.

    Where all run the same, nothing changes. Where they do not, ``"refuse"`` stops every process before anything else is
    sent; ``"union"`` gathers every part that some process runs, in the order of the model, keeps it until the end, and
    sums its gradients then, those of a process that did not run it being zero. Parts that nobody runs have no gradient.

    Args:
        model: what ``turnout.run.ranks.shard`` gave, or any module under ``fully_shard``.
        names: of the submodules that this process runs, as ``model.named_modules()`` has them, in its order of running.
            What every process runs in any case needs no name.
        how: what to do where processes differ.
        group: who shares shards; None for all processes.
        device: of the group's messages.

    Raises:
        UsageError: on every process, where they differ and are not to or cannot be joined; names each one's parts. Or a
            part that is not there, or not sharded by itself.

    Source: none; what a supernet's training needs (Cai et al., 2020, "Once for All") and FSDP2 does not look for.
    """
    if how not in ("refuse", "union"):
        raise nearest(how, ("refuse", "union"), kind="how", where=_WHERE)
    known = dict(model.named_modules())
    # What is wrong here alone must not leave the others waiting: they learn of it with the names.
    strange = [name for name in names if name not in known]
    if agreed([*strange, *names], group=group, device=device):
        if strange:
            raise nearest(strange[0], known, kind="submodule", where=_WHERE)
        yield
        return
    parts: list[list[str]] = shared(list(names), group)
    absent = [name for row in parts for name in row if name not in known]
    if absent:
        raise nearest(absent[0], known, kind="submodule", where=_WHERE)
    if how == "refuse":
        raise _differ(parts, "pass how='union', or draw the same part on each")
    with _joined(model, known, parts):
        yield


def _differ(parts: Sequence[Sequence[str]], fix: str, allowed: str = "run the same on each process") -> UsageError:
    ranks: dict[tuple[str, ...], list[int]] = {}
    for rank, row in enumerate(parts):
        ranks.setdefault(tuple(row), []).append(rank)
    got = "; ".join(f"{', '.join(row) or 'nothing'} on {named(those)}" for row, those in ranks.items())
    return UsageError(word("the sub-networks", got=got, allowed=allowed, where=_WHERE, fix=fix))


@contextlib.contextmanager
def _joined(model: nn.Module, known: dict[str, nn.Module], parts: Sequence[Sequence[str]]) -> Iterator[None]:
    """All parts of all processes gathered; torch's own hooks find them there, and give up and reduce nothing."""
    units = _units(known, {name for row in parts for name in row}, parts)
    root: Any = model
    root._get_fsdp_state()._lazy_init()  # else torch takes the first part that is gathered for the whole
    groups = [each for unit in units for each in unit._get_fsdp_state()._fsdp_param_groups]
    if not all(each.reduce_grads for each in groups):
        got, allowed = "gradients that are not summed in this pass", "be summed in each pass that runs other parts"
        fix = "use a layout with zero=2 or 3, or one micro-batch"
        raise UsageError(word("the sub-networks", got=got, allowed=allowed, where=_WHERE, fix=fix))
    before = [(each.post_forward_mesh_info, each.reshard_after_backward) for each in groups]
    zeros = [each.reduce_scatter_unused_params for each in groups]
    for unit in units:
        unit.unshard()
    for each in groups:
        each.post_forward_mesh_info, each.reshard_after_backward, each.reduce_grads = None, False, False
    done = False
    try:
        yield
        done = True
    finally:
        for each, (kept, again), zero in zip(groups, before, zeros, strict=True):
            each.post_forward_mesh_info, each.reshard_after_backward, each.reduce_grads = kept, again, True
            if done and torch.is_grad_enabled():
                each.reduce_scatter_unused_params = True
                each.post_backward()
                each.finalize_backward()
                each.comm_ctx.reduce_scatter_states.clear()
            each.reduce_scatter_unused_params = zero
            each._training_state = type(each._training_state).IDLE
        for unit in units:
            unit.reshard()


def _units(known: dict[str, nn.Module], names: set[str], parts: Sequence[Sequence[str]]) -> list[Any]:
    """What FSDP2 holds of these parts, in the order of the model.

    Raises:
        UsageError: a part that is held together with others, or whose experts are on several processes.
    """
    from torch.distributed.fsdp import FSDPModule

    found: dict[int, Any] = {}
    for name in (each for each in known if each in names):
        held = [module for module in known[name].modules() if isinstance(module, FSDPModule)]
        inside = {id(p) for module in held for p in module.parameters()}
        if any(id(p) not in inside for p in known[name].parameters()):
            fix = f"pass it to shard among its units, or to fully_shard: {name}"
            raise _differ(parts, fix, "be sharded each by itself")
        if any(getattr(module, "owners", None) is not None for module in known[name].modules()):
            allowed = "have their experts whole: tokens for experts elsewhere wait for every process"
            raise _differ(parts, "run the same parts on each process, or take ep=1", allowed)
        found |= {id(module): module for module in held}
    return list(found.values())
