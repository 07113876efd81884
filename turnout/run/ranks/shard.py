"""A model spread over processes by torch's own FSDP2, with gradients that are sums: those of one process, exactly."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from turnout.errors import UsageError, word
from turnout.run.ranks.expert_parallel import Owners
from turnout.run.ranks.processes import as_patient
from turnout.types.layout import Layout
from turnout.types.placement import Placement
from turnout.types.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

__all__ = ["Meshes", "accumulate", "experts_in", "mesh", "shard", "slots_of"]

_WHERE = "turnout.run.ranks.shard"


@dataclasses.dataclass(frozen=True, eq=False)
class Meshes:
    """The processes of a layout, as torch wants to see them; what is not split is an axis of one process.

    Args:
        layout: that they are laid out by.
        dense: axes pp, dp_replicate, dp_shard: of everything but experts. Where nothing is sharded (zero=0) all that
            share a stage are copies: dp_replicate takes dp_shard in.
        experts: axes pp, dp_replicate, efsdp, ep, with ep fastest; dp_replicate likewise.
        data: axes pp, dp: who share a stage and work on other data.

    Source: Liu et al., 2025, "MoE Parallel Folding", for the experts' own mesh.
    """

    layout: Layout
    dense: "DeviceMesh"
    experts: "DeviceMesh"
    data: "DeviceMesh"

    @property
    def data_rank(self) -> int:
        """Which part of a batch is this process's."""
        return self.data["dp"].get_local_rank()

    @property
    def data_group(self) -> "ProcessGroup":
        """The processes that work on the parts of one batch."""
        return self.data["dp"].get_group()

    @property
    def expert_group(self) -> "ProcessGroup":
        """The processes that share the experts of a layer."""
        return self.experts["ep"].get_group()

    def of_dense(self) -> "DeviceMesh":
        """What ``fully_shard`` is given for everything but experts."""
        return _without_ones(self.dense, "dp_replicate", "dp_shard")

    def of_experts(self) -> "DeviceMesh":
        """What it is given for experts."""
        return _without_ones(self.experts, "dp_replicate", "efsdp")


def _without_ones(whole: "DeviceMesh", copies: str, shards: str) -> "DeviceMesh":
    return whole[shards] if whole[copies].size() == 1 else whole[copies, shards]


def mesh(layout: Layout, *, device: str = "cpu") -> Meshes:
    """The meshes of a layout over all processes that there are; each of them calls it.

    Args:
        layout: the degrees.
        device: the type of device that the model is on.

    Raises:
        UsageError: another number of processes, or a kind of parallelism that is not run here (cp, tp).

    >>> from torch.testing._internal.distributed.fake_pg import FakeStore
    >>> torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    >>> layout = Layout(dp_shard=4)
    >>> mesh(layout).data_rank
    0
    >>> torch.distributed.destroy_process_group()

    Source: none; torch's own meshes.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if layout.cp > 1 or layout.tp > 1:
        got, allowed = f"{layout}", "have cp=1 and tp=1: turnout runs pipelines, FSDP and expert parallelism"
        fix = f"use dp_shard={layout.folded} in their place"
        raise UsageError(word("the layout", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if not dist.is_initialized():
        got, allowed = "no process group", "be started"
        fix = "call turnout.run.ranks.processes.start() first, under torchrun"
        raise UsageError(word("the processes", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if dist.get_world_size() != layout.world:
        got, allowed = f"{dist.get_world_size()} of them", f"be the {layout.world} of the layout ({layout})"
        fix = f"start torchrun with --nproc-per-node {layout.world}, or change the layout"
        raise UsageError(word("the processes", got=got, allowed=allowed, where=_WHERE, fix=fix))
    copies, shards, inner = layout.dp_replicate, layout.dp_shard, layout.efsdp
    if layout.zero == 0:  # nothing is sharded: all are copies
        copies, shards, inner = copies * shards, 1, 1
    outer = layout.world // layout.pp // (inner * layout.ep)
    found = [
        init_device_mesh(device, (layout.pp, copies, shards), mesh_dim_names=("pp", "dp_replicate", "dp_shard")),
        init_device_mesh(
            device, (layout.pp, outer, inner, layout.ep), mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep")
        ),
        init_device_mesh(device, (layout.pp, layout.data_ranks), mesh_dim_names=("pp", "dp")),
    ]
    for group in (group for each in found for group in each.get_all_groups()):
        as_patient(group)
    return Meshes(layout, *found)


def shard(
    model: nn.Module,
    layout: Layout,
    meshes: Meshes,
    *,
    plan: Plan | None = None,
    units: Sequence[nn.Module] | None = None,
    travel: Callable[["FSDPModule"], None] | None = None,
) -> nn.Module:
    """Spreads a model over the processes, in place: experts first (ep), then what FSDP2 shards, inner parts first.

    What a process adds to the loss must be its own tokens' sum divided by the number of tokens of all processes: no
    gradient is averaged anywhere. After ``loss.backward()`` the gradient of every parameter is then what one process
    with the whole batch has; where the plan has an ``overlap``, after a step of ``turnout.models.Overlapped``.

    Args:
        model: the same weights on every process; here, or on the meta device. A pipeline stage is one too.
        layout: what is split.
        meshes: of that layout.
        plan: how parameters and gradients travel; as they are when None.
        units: parts that are gathered one at a time, such as blocks; ``model.blocks`` when None.
        travel: called with every part that FSDP2 holds, to put in collectives of its own (int8 and int4 want that).

    Returns:
        The model.

    Raises:
        UsageError: experts that ep does not divide, a router that chooses among the tokens of a batch, parts that are
            not known, or a way to travel that nothing was given for.

    >>> shard(nn.Identity(), Layout(), mesh, units=[])  # of a single process nothing is spread
    Identity()

    Source: Rajbhandari et al., 2020, "ZeRO"; Zhao et al., 2023, "PyTorch FSDP"; Liu et al., 2025, "MoE Parallel
    Folding". The sums are ours: averages over unlike meshes are what makes expert gradients ep times too large.
    """
    plan = Plan(layout) if plan is None else plan
    _refuse(model, layout, plan, travel)
    units = _blocks(model) if units is None else units
    if plan.overlap is not None:  # nothing but experts is in parts; who plays the schedule sums gradients himself
        _spread_all(model, meshes, plan)
        return model
    for unit in units if plan.recompute else ():
        _recompute(unit)
    if layout.world // layout.pp == 1:
        return model
    _spread_all(model, meshes, plan)
    for part in _wrapped(model, units, meshes, plan):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else the factor is a kind of sum that gloo has not
        if travel is not None:
            travel(part)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    if not hasattr(model, "blocks"):
        got, allowed = f"a {type(model).__name__} without blocks", "have parts that are gathered one at a time"
        fix = "pass units=[...], such as its layers"
        raise UsageError(word("the model", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return list(model.blocks)  # pyrefly: ignore[bad-argument-type]


def _recompute(unit: Any) -> None:
    if hasattr(unit, "recompute"):  # a block of ours, which knows when not to
        unit.recompute = True
    else:
        # Under the hooks of whatever is put around it later, which gather its parameters for both passes.
        unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)


def experts_in(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of a model whose experts can be spread over processes, with their names."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "owners")]


def accumulate(model: Any, layout: Layout, *, last: bool) -> None:
    """Says before a backward pass whether it is the last of a step; gradients of several passes add up.

    With zero=0 and 1 gradients travel once, after the last one, and what is gathered stays until then. With zero=2 and
    3 every pass leaves a process with its part of the gradients alone, so that they travel after every pass.

    Args:
        model: what ``shard`` gave.
        layout: that it was given.
        last: whether the optimizer steps after this pass.

    Source: Rajbhandari et al., 2020, "ZeRO": stages 1 and 2 differ in what accumulates.
    """
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last or layout.zero >= 2)
        model.set_reshard_after_backward(last or layout.zero >= 2)


# ---- pieces


def _refuse(model: nn.Module, layout: Layout, plan: Plan, travel: object) -> None:
    if plan.layout != layout:
        got, fix = f"{plan.layout}", f"pass a plan of {layout}"
        raise UsageError(word("the plan", got=got, allowed=f"be of the layout {layout}", where=_WHERE, fix=fix))
    if travel is None and (plan.gather == "int8" or plan.reduce == "int4"):
        got, fix = f"gather={plan.gather} and reduce={plan.reduce}", "pass travel=..., or gather='bf16', reduce='bf16'"
        raise UsageError(word("the plan", got=got, allowed="have collectives for them", where=_WHERE, fix=fix))
    cut = layout.pp > 1 and plan.microbatches > 1
    for name, module in model.named_modules() if layout.data_ranks > 1 or cut else ():
        if getattr(module, "capacity_factor", None) is not None:
            got = f"{name} ({type(module).__name__}, capacity_factor={module.capacity_factor})"
            allowed = (
                "route each token by itself: it chooses among the tokens of its batch, and each part of it has others"
            )
            fix = "build it with capacity_factor=None, or with a router that knows none (TopK, LossFree)"
            raise UsageError(word("a router", got=got, allowed=allowed, where=_WHERE, fix=fix))


def slots_of(placement: Placement, number: int, name: str) -> torch.Tensor:
    """(S,) the expert in each slot of a layer, by its name where the placement has names."""
    known = {layer: at for at, layer in enumerate(placement.layers)}
    at = next((known[layer] for layer in (name, name.rpartition(".")[0]) if layer in known), None if known else number)
    if at is None or at >= placement.num_layers:
        got, allowed = f"{placement.num_layers} layers {list(placement.layers)}", f"have the experts of {name}"
        fix = "place the layers of this very model, or leave the placement out"
        raise UsageError(word("the placement", got=got, allowed=allowed, where=_WHERE, fix=fix))
    held = [len(placement.on(at, device)) for device in range(placement.devices)]
    if len(set(held)) > 1:
        got, allowed = f"{held} experts on the processes", "put as many on each as on any other"
        fix = "place it with slots of equal number"
        raise UsageError(word(f"the placement of {name}", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return torch.tensor(placement.phy2log[at])


def _spread_all(model: nn.Module, meshes: Meshes, plan: Plan) -> None:
    for number, (name, experts) in enumerate(experts_in(model) if meshes.layout.ep > 1 else ()):
        slots = None if plan.placement is None else slots_of(plan.placement, number, name)
        # FSDP2 adds the axis of copies where it holds them.
        copied = plan.overlap is not None
        _spread(name, experts, meshes, slots, copied=copied)


def _spread(name: str, experts: Any, meshes: Meshes, expert_S: torch.Tensor | None, *, copied: bool) -> None:
    """Leaves a process with its own experts, as its part of tensors that the group shares."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    count, ep, share = experts.num_experts, meshes.layout.ep, getattr(experts, "share", 1)

    def refuse(got: str, allowed: str, fix: str) -> UsageError:
        return UsageError(word(f"the experts of {name}", got=got, allowed=allowed, where=_WHERE, fix=fix))

    if expert_S is None and count % ep:
        near = max(each for each in range(1, ep + 1) if count % each == 0)
        raise refuse(f"{count}", f"be a multiple of ep={ep}", f"pass ep={near}, or {count + -count % ep} experts")
    if share > 1 and (count // ep) % share:
        allowed = f"leave each of ep={ep} processes whole groups of those that share a factor"
        raise refuse(f"{count}, {share} of which share one", allowed, "pass ep=1")
    if any(getattr(experts, rest, None) is not None and len(getattr(experts, rest)) for rest in ("up_row", "down_row")):
        raise refuse("with rows beside their factors", "be factors alone with ep > 1", "pass ep=1")
    if share > 1 and expert_S is not None:
        raise refuse(f"{share} of which share a factor", "lie in their order", "leave the placement out")
    if expert_S is None:
        owners = Owners.even(count, meshes.expert_group)
    else:
        owners = Owners(expert_S, count, meshes.expert_group)
    group = meshes.experts["dp_replicate", "ep"] if copied else meshes.experts["ep"]
    places = [Replicate(), Shard(0)] if copied else [Shard(0)]
    for part, parameter in list(experts.named_parameters(recurse=False)):
        if not len(parameter):  # rows that it has not
            continue
        each = len(parameter) // ep  # where several share a factor, fewer than the experts
        own = range(owners.rank * each, (owners.rank + 1) * each) if share > 1 else owners.own
        own = parameter.detach()[torch.tensor(own, device=parameter.device)]
        spread = DTensor.from_local(own, group, places, run_check=False)
        setattr(experts, part, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    experts.owners = owners


def _wrapped(model: nn.Module, units: Sequence[nn.Module], meshes: Meshes, plan: Plan) -> list["FSDPModule"]:
    """What FSDP2 holds of a model, inner parts first."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Routers' scores are views, of which torch warns that nothing may write to them; nothing does.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    policy, dense, place = _policy(plan), meshes.of_dense(), meshes.of_experts()
    found = []
    for _, experts in experts_in(model):
        keep = _reshard(plan, place.size(-1))
        how = {"mp_policy": policy, "reshard_after_forward": keep, "shard_placement_fn": _by(place)}
        found.append(fully_shard(experts, mesh=place, **how))
    for unit in units:
        keep = _reshard(plan, dense.size(-1))
        found.append(fully_shard(unit, mesh=dense, mp_policy=policy, reshard_after_forward=keep))
    found.append(fully_shard(model, mesh=dense, mp_policy=policy))
    for name in ("loss", "route"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return found


def _policy(plan: Plan) -> "MixedPrecisionPolicy":
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Else gradients would travel in the dtype of the parameters that were gathered.
    wide = torch.float32 if plan.gather == "bf16" else None
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if plan.gather == "bf16" else None,
        reduce_dtype=torch.bfloat16 if plan.reduce == "bf16" else wide,
    )


def _reshard(plan: Plan, shards: int) -> bool | int:
    """Whether parameters are given up between forward and backward pass, or over how many processes they stay."""
    if plan.secondary is None or plan.layout.zero < 3:
        return plan.layout.zero in (0, 3)
    if plan.secondary == 1:
        return False
    if plan.secondary >= shards:
        return True
    if shards % plan.secondary:
        got, allowed = plan.secondary, f"divide {shards}, the processes that share experts"
        raise UsageError(word("secondary", got=got, allowed=allowed, where=_WHERE, fix="leave it out, or change ep"))
    return plan.secondary


def _by(place: "DeviceMesh") -> Callable[[nn.Parameter], Any]:
    """Along which axis experts are sharded: whole experts where they come out even, else parts of each."""
    from torch.distributed.tensor import DTensor, Shard

    shards = place.size(-1)

    def axis(parameter: nn.Parameter) -> Any:
        here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(next((each for each, size in enumerate(here.shape) if size % shards == 0), 0))

    return axis
