"""Whether training under a plan is training: every gradient on many processes against those of one."""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from turnout.decide.device import schedule_of
from turnout.errors import UsageError, nearest, word
from turnout.hub import located
from turnout.models import LM, LMConfig, MoEConfig
from turnout.recipes.certify import model_folder, open_model
from turnout.recipes.planted import Fault
from turnout.recipes.spawned import check_bears, spawned
from turnout.recipes.stepped import Stepped, alone, batch_for, together
from turnout.run.ranks import processes
from turnout.run.ranks.shard import mesh
from turnout.types.layout import Layout
from turnout.types.plan import Plan

__all__ = ["Gap", "Parity", "compare", "parity", "plan_of", "small_model"]

_WHERE = "turnout.recipes.parity"
Dtype = Literal["fp32", "fp64"]
# What may differ, of the largest number of the same tensor. Sums over other groups of tokens have other roundings.
_BOUNDS = {"fp32": 1e-6, "fp64": 1e-12}
_ROUNDED = 1e-4  # in fp32 more than the bound, and no more than this, may be rounding: then fp64 decides
# Where parameters or gradients travel in bf16. One process and several round elsewhere: of eight seeds the worst tensor
# was 0.018 to 0.031 off, while both were 0.04 to 0.31 off fp32; the least fault that can be planted is 0.5.
_COARSE = 4e-2


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far one tensor under the plan is from that of one process.

    Args:
        what: "loss", "norm", "gradient" or "weight".
        name: of the parameter.
        error: the largest difference, relative to the largest number of the tensor in one process.
        ratio: of the two norms (for weights: of what the step added): 2.000 where everything is twice too large.
        note: what is wrong with it beside numbers, such as that it is missing.

    Source: none; plain bookkeeping.
    """

    what: str
    name: str
    error: float
    ratio: float = math.nan
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Parity:
    """What came out of a comparison.

    Args:
        plan: of which.
        dtype: that both computed in.
        bound: on every error.
        gaps: all of them, the largest first.
        fault: that was planted, if any.
        exact: the same in fp64, where fp32 was beyond its bound by what may be rounding; that decides then.

    Source: none; plain bookkeeping.
    """

    plan: Plan
    dtype: str
    bound: float
    gaps: tuple[Gap, ...]
    fault: str | None = None
    exact: "Parity | None" = None

    @property
    def failed(self) -> tuple[Gap, ...]:
        """Those above the bound, or wrong otherwise."""
        return tuple(gap for gap in self.gaps if gap.note or not gap.error <= self.bound)

    @property
    def holds(self) -> bool:
        """Whether gradients were compared, and all is within the bound."""
        if self.exact is not None:
            return self.exact.holds
        return not self.failed and any(gap.what == "gradient" for gap in self.gaps)

    def to_json(self) -> str:
        """All of it as JSON."""
        gaps = [{name: _plain(value) for name, value in dataclasses.asdict(gap).items()} for gap in self.gaps]
        body = {"plan": self.plan.to_json_dict(), "dtype": self.dtype, "bound": self.bound, "holds": self.holds}
        exact = None if self.exact is None else json.loads(self.exact.to_json())
        return json.dumps(body | {"planted": self.fault, "gaps": gaps, "exact": exact})

    def table(self, rows: int = 12) -> str:
        """The verdict and the worst gaps."""
        count = sum(gap.what == "gradient" for gap in self.gaps)
        verdict = "equal to one process" if self.holds else "NOT equal to one process"
        planted = f", with a fault planted ({self.fault})" if self.fault else ""
        lines = [f"{self.plan.layout}: {verdict}; {count} gradients in {self.dtype}, bound {self.bound:g}{planted}"]
        if not count:
            lines.append("  nothing was compared")
        width = max([len(gap.name) for gap in self.gaps[:rows]], default=4)
        lines.append(f"  {'what':<8}  {'name':<{width}}  {'error':>9}  {'ratio':>9}")
        for gap in self.gaps[:rows]:
            number = f"{gap.what:<8}  {gap.name:<{width}}  {gap.error:9.2e}  {gap.ratio:9.6f}"
            lines.append(f"  {number}  {gap.note}".rstrip())
        if self.exact is not None:
            lines.append(f"beyond the bound of {self.dtype} by what may be rounding; the same in fp64:")
            lines.append(self.exact.table(rows))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def small_model(plan: Plan, *, seed: int = 0) -> LM:
    """A small language model that has what plans can get wrong, random weights, and a first layer whose tokens all go
    to two experts: processes that own neither get no row there.

    Tied embeddings, shared experts, a norm on queries and keys, and as many experts as any ep up to 4 divides.

    Args:
        plan: what it is for.
        seed: of its weights.

    Source: none; a test's input.
    """
    blocks = sum(plan.stages) if plan.stages else max(2, 2 * plan.layout.pp)
    blocks = blocks if plan.overlap is None else plan.overlap.blocks
    count = 4 * plan.layout.ep // math.gcd(4, plan.layout.ep)
    moe = MoEConfig(num_experts=count, top_k=2, hidden=24, shared_hidden=16, router="LossFree", bias=True)
    config = LMConfig(vocab_size=61, width=32, layers=blocks, heads=4, kv_heads=2, qk_norm="head",
                      tie_embeddings=True, max_seq=64, moe=moe, init_std=0.2)  # fmt: skip
    lm = LM(config, seed=seed)
    router: Any = lm.routers[0]
    router.bias_E[:2] += 100.0
    return lm


def compare(
    plan: Plan,
    *,
    lm: LM | None = None,
    dtype: Dtype = "fp32",
    plant: str | None = None,
    seed: int = 0,
) -> Parity:
    """Trains one step under the plan and in one process, on the same batch, and compares all that came out.

    Every process of the plan calls it together, and gets the same. Compared are the loss, the gradient of every
    parameter, their norm, and every parameter after a step of gradient descent. What either side lacks counts as wrong.

    Args:
        plan: whose layout is that of the processes that there are.
        lm: the model, the same weights on every process; ``small_model`` when None.
        dtype: "fp64" tells a wrong sum from one that is only rounded in another order.
        plant: the name of a fault to plant; then it must not hold.
        seed: of the weights and of the batch.

    Raises:
        UsageError: an unknown dtype or fault, a plan that this model cannot be trained under, or one whose parameters
            or gradients travel as int8 or int4.

    Source: none; a comparison. Errors are of the largest number of a tensor, since small ones are all rounding.
    """
    _check(plan, dtype, plant)
    lm = small_model(plan, seed=seed) if lm is None else lm
    again = copy.deepcopy(lm) if dtype == "fp32" else None
    found = _compared(plan, lm.double() if dtype == "fp64" else lm.float(), dtype, plant, seed)
    rounded = any(gap.error > found.bound for gap in found.gaps) and all(gap.error < _ROUNDED for gap in found.gaps)
    if again is None or not rounded:
        return found
    return dataclasses.replace(found, exact=_compared(plan, again.double(), "fp64", plant, seed))


def _check(plan: Plan, dtype: str, plant: str | None) -> None:
    """Refuses what no process needs to be started for."""
    if dtype not in _BOUNDS:
        raise nearest(dtype, _BOUNDS, kind="dtype", where=_WHERE)
    if plant is not None:
        Fault(plant)
    if plan.gather == "int8" or plan.reduce == "int4":
        # Measured: 0.6 of a tensor's largest number where routers choose other experts. A factor of 2 is 0.5 off.
        got, allowed = (
            f"gather={plan.gather}, reduce={plan.reduce}",
            "be full or bf16 for a comparison number by number",
        )
        fix = "compare gather=full, reduce=full of this layout, and the losses of turnout train under the plan itself"
        raise UsageError(word("the plan", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _compared(plan: Plan, lm: LM, dtype: str, plant: str | None, seed: int) -> Parity:
    fault = None if plant is None else Fault(plant)
    meshes, batch = mesh(plan.layout), batch_for(lm, plan, seed)
    want = alone(copy.deepcopy(lm), batch, plan) if dist.get_rank() == 0 else None
    start = {name: p.detach().clone() for name, p in lm.named_parameters()} if want else {}
    if fault is None:
        got = together(lm, batch, plan, meshes, before=_nothing, play=_nothing, after=_nothing)
    else:
        got = together(lm, batch, plan, meshes, before=fault.plant, play=fault.play, after=fault.spoil)
    bound = _COARSE if "bf16" in (plan.gather, plan.reduce) else _BOUNDS[dtype]
    found = [None if want is None else Parity(plan, dtype, bound, gaps(want, got, start), plant)]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def _nothing(*touched: object) -> None:
    pass


def parity(
    plan: Plan, *, model: str | None = None, dtype: Dtype = "fp32", plant: str | None = None, seed: int = 0
) -> Parity | None:
    """``compare`` on processes of its own, which are started here; or, under torchrun, on those that there are.

    Args:
        plan: of the processes.
        model: a run, a folder or a model of the hub; None for ``small_model``.
        dtype: as for ``compare``.
        plant: as for ``compare``.
        seed: as for ``compare``.

    Returns:
        What came out; under torchrun on the first process alone, and None on the others.

    Raises:
        UsageError: as ``compare``; or more processes than this machine bears.

    Source: none; a start of processes.
    """
    _check(plan, dtype, plant)
    if plan.layout.pp > 1:
        schedule_of(plan)  # a name that there is not is said before any process starts
    if processes.launched():
        ranks = processes.start(device="cpu")
        found = _compare_folder(plan, model, dtype, plant, seed)
        processes.end()
        return found if ranks.is_first else None
    world = plan.layout.world
    fix = "compare a plan of the same kinds with smaller degrees, {most} processes at most; or start them yourself: "
    fix += f"torchrun --nproc-per-node {world} -m turnout parity PLAN"
    check_bears(world, "PLAN", where="turnout parity", fix=fix)
    return spawned(world, _compare_folder, plan, model, dtype, plant, seed)


def _compare_folder(plan: Plan, model: str | None, dtype: Dtype, plant: str | None, seed: int) -> Parity:
    place = None if model is None else model_folder(located(model, where="turnout parity").folder)
    lm = None if place is None else open_model(place, packed=False)[0]
    return compare(plan, lm=lm, dtype=dtype, plant=plant, seed=seed)


def plan_of(text: str, where: str = "turnout parity") -> Plan:
    """The plan of a layout that is written ``dp_shard=4,ep=2``; ``microbatches``, ``secondary`` and ``schedule`` may be
    among it.

    Raises:
        UsageError: not such a text.

    >>> plan_of("dp_shard=4,ep=2,microbatches=2").layout.efsdp
    2

    Source: none; plain bookkeeping.
    """
    degrees: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    fields = [field.name for field in dataclasses.fields(Layout)]
    for part in text.replace(",", " ").split():
        name, _, value = part.partition("=")
        known = name in (*fields, "microbatches", "secondary") and value.isdigit()
        if not known and not (name == "schedule" and value):
            allowed = f"be name=number of {', '.join(fields)}, microbatches or secondary, or schedule=NAME"
            fix = "write dp_shard=4,ep=2"
            raise UsageError(word("the layout", got=repr(part), allowed=allowed, where=where, fix=fix))
        if name in degrees or name in rest:
            fix = f"leave one {name} out"
            raise UsageError(word(name, got=repr(text), allowed="be given once", where=where, fix=fix))
        (degrees if name in fields else rest)[name] = int(value) if known else value
    if degrees.get("pp", 1) > 1:
        rest.setdefault("microbatches", 2 * degrees["pp"])
    return Plan(Layout(**degrees), **rest)


# ---- what is apart


def gaps(want: Stepped, got: Stepped, start: Mapping[str, Tensor]) -> tuple[Gap, ...]:
    """How far two steps are apart, the worst first; what only one of them has is among it.

    Args:
        want: of one process.
        got: of many.
        start: the weights before both.

    Source: none; a comparison.
    """
    found = []
    for what, number in want.numbers.items():
        found.append(Gap(what, "", abs(got.numbers[what] - number) / abs(number), got.numbers[what] / number))
    sides: tuple[tuple[str, Any, Any], ...] = (
        ("gradient", dict(want.gradient), got.gradient),
        ("weight", dict(want.weight), got.weight),
    )
    for what, known, seen in sides:
        for name, tensor in seen:
            gap = _gap(what, name, known[name], tensor, start[name]) if name in known else _absent(what, name, "has no")
            found += [] if gap is None else [gap]
        found += [Gap(what, name, math.inf, note="missing") for name in known if name not in {each for each, _ in seen}]
    return tuple(sorted(found, key=lambda gap: -gap.error if gap.error == gap.error else -math.inf))


def _absent(what: str, name: str, has: str) -> Gap:
    return Gap(what, name, math.inf, note=f"one process {has} such parameter")


def _gap(what: str, name: str, want: Tensor | None, got: Tensor | None, start: Tensor) -> Gap | None:
    if got is None or want is None:
        note = "missing" if got is None else "one process has none"
        return None if got is want else Gap(what, name, math.inf, note=note)
    if got.shape != want.shape:
        return Gap(what, name, math.inf, note=f"{tuple(got.shape)} in place of {tuple(want.shape)}")
    if not want.numel():  # nothing there to compare
        return None
    largest, off = float(want.abs().max()), float((got - want).abs().max())
    if what == "weight":  # the ratio is of what the step added
        got, want = got - start, want - start
    norm = float(want.norm())
    return Gap(what, name, off / largest if largest else off, float(got.norm()) / norm if norm else math.nan)
