"""Whether training under a plan is training: every gradient on many processes against those of one."""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turnout.errors import UsageError, nearest, word
from turnout.hub import located
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.fused import IGNORE
from turnout.recipes.certify import model_folder, open_model
from turnout.recipes.piped import Piped
from turnout.recipes.planted import Fault
from turnout.recipes.spawned import spawned
from turnout.run import processes
from turnout.run.shard import Meshes, accumulate, mesh, shard
from turnout.run.whole import gradient_norm, whole, whole_gradients
from turnout.types.layout import Layout
from turnout.types.plan import Plan

__all__ = ["Gap", "Parity", "compare", "parity", "plan_of", "small_model"]

_WHERE = "turnout.recipes.parity"
Dtype = Literal["fp32", "fp64"]
# What may differ, of the largest number of the same tensor. Sums over other groups of tokens have other roundings.
_BOUNDS = {"fp32": 1e-6, "fp64": 1e-12}
_ROUNDED = 1e-4  # in fp32 more than the bound, and no more than this, may be rounding: then fp64 decides
_COARSE = 2e-2  # where parameters or gradients travel in bf16
_LR, _SEQ = 1.0, 12


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
        UsageError: an unknown dtype or fault, or a plan that this model cannot be trained under.

    Source: none; a comparison. Errors are of the largest number of a tensor, since small ones are all rounding.
    """
    if dtype not in _BOUNDS:
        raise nearest(dtype, _BOUNDS, kind="dtype", where=_WHERE)
    lm = small_model(plan, seed=seed) if lm is None else lm
    again = copy.deepcopy(lm) if dtype == "fp32" else None
    found = _compared(plan, lm.double() if dtype == "fp64" else lm.float(), dtype, plant, seed)
    rounded = any(gap.error > found.bound for gap in found.gaps) and all(gap.error < _ROUNDED for gap in found.gaps)
    if again is None or not rounded:
        return found
    return dataclasses.replace(found, exact=_compared(plan, again.double(), "fp64", plant, seed))


def _compared(plan: Plan, lm: LM, dtype: str, plant: str | None, seed: int) -> Parity:
    fault = None if plant is None else Fault(plant)
    meshes, batch = mesh(plan.layout), _batch(lm, plan, seed)
    want = _one(copy.deepcopy(lm), batch, plan) if dist.get_rank() == 0 else None
    start = {name: p.detach().clone() for name, p in lm.named_parameters()} if want else {}
    piped = Piped(lm, plan, meshes) if plan.layout.pp > 1 else None
    model = shard(lm, plan.layout, meshes, plan=plan) if piped is None else piped.model
    if fault is not None:
        fault.plant(model, meshes)
    own = batch.part(meshes.data_rank, plan.layout.data_ranks)
    loss = _many(model, own, batch.tokens, plan, meshes) if piped is None else piped.step(own, batch.tokens)
    if fault is not None:
        fault.spoil(model, meshes)
    gaps = _Gaps(want)
    gaps.number("loss", loss)
    gaps.number("norm", gradient_norm(model, meshes) if piped is None else piped.norm())
    for name, grad in whole_gradients(model) if piped is None else piped.gradients():
        gaps.tensor("gradient", name, grad)
    torch.optim.SGD(model.parameters(), lr=_LR).step()
    for name, weight in whole(model, dict(model.named_parameters())) if piped is None else piped.weights():
        gaps.tensor("weight", name, weight, start.get(name))
    bound = _COARSE if plan.gather != "full" or plan.reduce != "full" else _BOUNDS[dtype]
    found = [Parity(plan, dtype, bound, gaps.sorted(), plant)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


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
        UsageError: as ``compare``.

    Source: none; a start of processes.
    """
    if processes.launched():
        ranks = processes.start(device="cpu")
        found = _compare_folder(plan, model, dtype, plant, seed)
        processes.end()
        return found if ranks.is_first else None
    return spawned(plan.layout.world, _compare_folder, plan, model, dtype, plant, seed)


def _compare_folder(plan: Plan, model: str | None, dtype: Dtype, plant: str | None, seed: int) -> Parity:
    lm = None if model is None else open_model(model_folder(located(model, where="turnout parity").folder))[0]
    return compare(plan, lm=lm, dtype=dtype, plant=plant, seed=seed)


def plan_of(text: str, where: str = "turnout parity") -> Plan:
    """The plan of a layout that is written ``dp_shard=4,ep=2``; ``microbatches`` and ``secondary`` may be among it.

    Raises:
        UsageError: not such a text.

    >>> plan_of("dp_shard=4,ep=2,microbatches=2").layout.efsdp
    2

    Source: none; plain bookkeeping.
    """
    found: dict[str, int] = {}
    fields = [field.name for field in dataclasses.fields(Layout)]
    for part in text.replace(",", " ").split():
        name, _, value = part.partition("=")
        if name not in (*fields, "microbatches", "secondary") or not value.isdigit():
            allowed, fix = f"be name=number of {', '.join(fields)}, microbatches or secondary", "write dp_shard=4,ep=2"
            raise UsageError(word("the layout", got=repr(part), allowed=allowed, where=where, fix=fix))
        found[name] = int(value)
    layout: Any = {name: value for name, value in found.items() if name in fields}
    rest: Any = {name: value for name, value in found.items() if name not in fields}
    return Plan(Layout(**layout), **rest)


# ---- the batch, and the step on both sides


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of tokens, and which of them are targets: others in every row, so that processes have unlike many."""

    id_BS: Tensor
    target_BS: Tensor

    @property
    def tokens(self) -> int:
        return int((self.target_BS != IGNORE).sum())

    def part(self, number: int, parts: int) -> "_Batch":
        return _Batch(self.id_BS.chunk(parts)[number], self.target_BS.chunk(parts)[number])


def _batch(lm: LM, plan: Plan, seed: int) -> _Batch:
    rows = 2 * plan.layout.data_ranks * plan.microbatches
    chance = torch.Generator().manual_seed(seed + 1)
    length = min(_SEQ, lm.config.max_seq)
    id_BS = torch.randint(lm.config.vocab_size, (rows, length + 1), generator=chance)
    target_BS = id_BS[:, 1:].clone()
    for row in range(rows):
        target_BS[row, : row * length // (2 * rows)] = IGNORE
    return _Batch(id_BS[:, :-1], target_BS)


def _nats(lm: nn.Module, batch: _Batch) -> Tensor:
    """The sum over this batch's targets; in fp64 past the output layer too, whose own loss is in fp32."""
    model: Any = lm
    if next(lm.parameters()).dtype != torch.float64:
        return model.loss(batch.id_BS, batch.target_BS).nats
    logits_BSV = model(batch.id_BS).logits_BSV
    return nn.functional.cross_entropy(
        logits_BSV.flatten(0, 1), batch.target_BS.flatten(), ignore_index=IGNORE, reduction="sum"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _One:
    """What one process has after a step."""

    numbers: Mapping[str, float]
    gradient: Mapping[str, Tensor | None]
    weight: Mapping[str, Tensor]


def _one(lm: LM, batch: _Batch, plan: Plan) -> _One:
    start = {name: p.detach().clone() for name, p in lm.named_parameters()}
    if plan.gather == "bf16":  # as it arrives
        for parameter in lm.parameters():
            parameter.data = parameter.data.bfloat16()
    loss = _nats(lm, batch) / batch.tokens
    loss.backward()
    loss = loss.detach()
    grads = {name: None if p.grad is None else p.grad.to(start[name].dtype) for name, p in lm.named_parameters()}
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values() if grad is not None))
    stepped = {name: w if (grad := grads[name]) is None else w - _LR * grad for name, w in start.items()}
    return _One({"loss": float(loss), "norm": norm}, grads, stepped)


def _many(lm: nn.Module, own: _Batch, tokens: int, plan: Plan, meshes: Meshes) -> Tensor:
    """The loss of the whole batch; the gradients are in the model."""
    total = own.id_BS.new_zeros((), dtype=torch.float64)
    for number in range(plan.microbatches):
        accumulate(lm, plan.layout, last=number == plan.microbatches - 1)
        loss = _nats(lm, own.part(number, plan.microbatches)) / tokens
        loss.backward()
        total += loss.detach().double()
    dist.all_reduce(total, group=meshes.data_group)
    return total


# ---- what is apart


class _Gaps:
    """Gathers the gaps on the first process; the others only take part in putting tensors together."""

    def __init__(self, want: _One | None) -> None:
        self.want, self.found = want, list[Gap]()
        self.seen: dict[str, set[str]] = {"gradient": set(), "weight": set()}

    def number(self, what: str, got: Tensor) -> None:
        """A number that both sides have."""
        if self.want is not None:
            want = self.want.numbers[what]
            self.found.append(Gap(what, "", abs(float(got) - want) / abs(want), float(got) / want))

    def tensor(self, what: str, name: str, got: Tensor | None, start: Tensor | None = None) -> None:
        """A tensor of a parameter."""
        if self.want is None:
            return
        known: Mapping[str, Tensor | None] = getattr(self.want, what)
        self.seen[what].add(name)
        if name not in known:
            self.found.append(Gap(what, name, math.inf, note="one process has no such parameter"))
            return
        want = known[name]
        if got is None or want is None:
            if got is not None or want is not None:
                note = "missing" if got is None else "one process has none"
                self.found.append(Gap(what, name, math.inf, note=note))
            return
        if got.shape != want.shape:
            note = f"{tuple(got.shape)} in place of {tuple(want.shape)}"
            self.found.append(Gap(what, name, math.inf, note=note))
            return
        if not want.numel():  # nothing there to compare
            return
        largest, off = float(want.abs().max()), float((got - want).abs().max())
        error = off / largest if largest else off
        if start is not None:  # what the step added
            got, want = got - start, want - start
        norm = float(want.norm())
        self.found.append(Gap(what, name, error, float(got.norm()) / norm if norm else math.nan))

    def sorted(self) -> tuple[Gap, ...]:
        """All of them, the worst first; and what was never seen."""
        for what, seen in self.seen.items():
            known: Mapping[str, Any] = {} if self.want is None else getattr(self.want, what)
            self.found += [Gap(what, name, math.inf, note="missing") for name in known if name not in seen]
        return tuple(sorted(self.found, key=lambda gap: -gap.error if gap.error == gap.error else -math.inf))
