"""What each device of a layout holds: parameters, gradients, optimizer state, and what a step keeps on top."""

import dataclasses
from collections.abc import Mapping, Sequence

from turnout.errors import UsageError, word
from turnout.types import BlockSize, Plan, Workload

__all__ = ["Held", "Share", "held", "shares", "stage_blocks"]

# Stages of one device, and the forward passes that wait for their backward pass on device p of P with m micro-batches.
_CHUNKS = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2, "ZBVZeroBubble": 2, "DualPipeV": 2, "ZB-H1": 1}


@dataclasses.dataclass(frozen=True)
class Held:
    """The bytes on the device that holds most, by what they are for.

    Args:
        stage: which device along the pipeline, from 0.
        by_kind: ``parameters``, ``gradients``, ``optimizer``, ``activations``, ``gathered``, ``logits``.
        largest: the largest single thing, in words.

    >>> Held(0, {"parameters": 2.0, "optimizer": 3.0}, "").total
    5.0

    Source: none; plain bookkeeping.
    """

    stage: int
    by_kind: Mapping[str, float]
    largest: str

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.by_kind.values())


def chunks(schedule: str) -> int:
    """How many stages a device has under a schedule."""
    return _CHUNKS.get(schedule, 1)


def stage_blocks(workload: Workload, plan: Plan) -> tuple[tuple[int, ...], ...]:
    """For each device along the pipeline, the blocks that it has.

    Stage s is on device s mod pp; with two chunks in V form, stages go there and back.

    Args:
        workload: the network.
        plan: with its stages, or even ones.

    Raises:
        UsageError: more stages than blocks, or stages that do not hold all blocks.

    >>> from turnout.types import Layout
    >>> network = Workload((BlockSize(1, 2.0, 1.0),) * 6, width=4, seq=8, batch=2)
    >>> stage_blocks(network, Plan(Layout(pp=2), schedule="Interleaved1F1B", microbatches=2))
    ((0, 1, 4), (2, 3, 5))

    Source: Narayanan et al., 2021, "Efficient Large-Scale Language Model Training on GPU Clusters".
    """
    pp, each = plan.layout.pp, chunks(plan.schedule) if plan.layout.pp > 1 else 1
    count, blocks = pp * each, len(workload.blocks)
    sizes = plan.stages or tuple(blocks // count + (stage < blocks % count) for stage in range(count))
    if sum(sizes) != blocks or (plan.stages is None and count > blocks):
        where, fix = "turnout.decide.device", f"pass pp={max(1, blocks // each)} or less, or other stages"
        allowed = f"hold the {blocks} blocks of the network, one at least each"
        raise UsageError(word("stages", got=f"{count} stages {sizes}", allowed=allowed, where=where, fix=fix))
    found: list[list[int]] = [[] for _ in range(pp)]
    first = 0
    for stage, size in enumerate(sizes):
        there = plan.schedule in ("ZBVZeroBubble", "DualPipeV") and stage >= pp
        device = 2 * pp - 1 - stage if there else stage % pp
        found[device] += range(first, first + size)
        first += size
    return tuple(map(tuple, found))


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device along the pipeline has of the network, summed over its blocks.

    Args:
        blocks: how many.
        kinds: the different ones.
        params: that every token uses.
        experts: parameters of all experts.
        flops: of a token forward, without experts; ``expert_flops`` with them alone.
        kept: numbers that a token keeps, without experts; ``expert_kept`` of experts alone.
        routed: experts that a token takes, over all blocks; ``routed_blocks`` of which take any.
        kept_once: numbers that a micro-batch keeps however many rows it has.
        first: whether it begins the network; ``last`` whether it ends it.
        ends: parameters in front of the first block and behind the last, where it has these ends.
        copied: of them, those that the other end holds too.

    Source: none; plain bookkeeping.
    """

    blocks: int
    kinds: tuple[BlockSize, ...]
    params: float
    experts: float
    flops: float
    expert_flops: float
    kept: float
    expert_kept: float
    routed: float
    routed_blocks: int
    kept_once: float
    first: bool
    last: bool
    ends: float
    copied: float


def shares(workload: Workload, plan: Plan) -> tuple[Share, ...]:
    """What each device along the pipeline has; the same for plans that differ in other things than its stages.

    >>> network = Workload((BlockSize(3, 6.0, 1.0),) * 4, width=4, seq=8, batch=2)
    >>> [share.params for share in shares(network, Plan())]
    [12]

    Source: none; sums.
    """
    found = []
    turns = plan.schedule in ("ZBVZeroBubble", "DualPipeV") and plan.layout.pp > 1
    for device, owned in enumerate(stage_blocks(workload, plan)):
        first, last = device == 0, device == (0 if turns else plan.layout.pp - 1)
        # Tied to the embedding, the output layer is a copy of it where the pipeline ends elsewhere.
        copied = 0 if workload.head_params or first == last else workload.embedding_params
        ends = workload.embedding_params * first + (workload.head_params or copied) * last
        sizes = [workload.blocks[block] for block in owned]
        found.append(
            Share(
                len(sizes),
                tuple(dict.fromkeys(sizes)),
                sum(s.params for s in sizes),
                sum(s.experts * s.expert_params for s in sizes),
                sum(s.flops for s in sizes),
                sum(2 * s.top_k * s.expert_params for s in sizes),
                sum(s.kept for s in sizes),
                sum(s.top_k * s.expert_kept for s in sizes),
                sum(s.top_k for s in sizes if s.experts),
                sum(s.experts > 0 for s in sizes),
                sum(s.kept_once for s in sizes),
                first,
                last,
                ends,
                copied,
            )
        )
    return tuple(found)


def waiting(plan: Plan, stage: int) -> float:
    """How many micro-batches' worth of a device's blocks wait for their backward pass at once, at the most."""
    pp, m = plan.layout.pp, plan.microbatches
    if pp == 1:
        return 1.0
    if plan.schedule == "GPipe":
        return float(m)
    if plan.schedule == "Interleaved1F1B":
        each = chunks(plan.schedule)
        in_round = m / max(1, m // pp)  # where pp does not divide them, more go through a stage in turn
        return min(float(m), (2 * (pp - stage - 1) + (each - 1) * in_round + 1) / each)
    if plan.schedule in ("ZBVZeroBubble", "DualPipeV"):
        return min(float(m), float(pp) + (0.5 if plan.schedule == "DualPipeV" else 0.0))
    return float(min(m, pp - stage))


def held(workload: Workload, plan: Plan) -> Held:
    """The bytes on the fullest device of a plan.

    Psi parameters in number_bytes, with K = 12 of Adam, over N devices: 4 Psi + K Psi / N with zero=1,
    2 Psi + (2 + K) Psi / N with zero=2, (4 + K) Psi / N with zero=3, as in ZeRO's table; experts are divided by ep
    first, everything by tp. On top of that come what the backward pass waits for, logits, and what is gathered: with
    zero=3 two blocks and what is in front of the first and behind the last; beside gathered parameters the shards that
    they come from. In a pipeline a stage stays gathered through a step, and its gradients are whole until the end.

    Args:
        workload: the network and its step.
        plan: the layout, the schedule, the number of micro-batches.

    Raises:
        UsageError: stages that do not fit the network.

    >>> from turnout.types import Layout
    >>> network = Workload((BlockSize(7_500_000_000, 0.0, 0.0),), width=1, seq=1, batch=64)
    >>> {kind: round(size / 1e9, 1) for kind, size in held(network, Plan(Layout(dp_shard=64, zero=1))).by_kind.items()}
    {'parameters': 15.0, 'gradients': 15.0, 'optimizer': 1.4, 'activations': 0.0, 'gathered': 0.2, 'logits': 0.0}

    Source: Rajbhandari et al., 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", figure 1.
    """
    return held_of(shares(workload, plan), workload, plan)


def held_of(parts: Sequence[Share], workload: Workload, plan: Plan) -> Held:
    """As ``held``, of shares that are known."""
    return max((_stage(workload, plan, stage, part) for stage, part in enumerate(parts)), key=lambda h: h.total)


def _stage(workload: Workload, plan: Plan, stage: int, part: Share) -> Held:
    layout = plan.layout
    dense, experts = (part.params + part.ends) / layout.tp, part.experts / layout.ep
    shard, eshard = layout.dp_shard * layout.cp, layout.efsdp
    found, named = {}, {}
    for kind, each, from_zero in (
        ("parameters", workload.param_bytes, 3),
        ("gradients", workload.grad_bytes, 2),
        ("optimizer", workload.optimizer_bytes, 1),
    ):
        # The engine adds up a pipeline's gradients before it sends them.
        split = layout.zero >= from_zero and not (kind == "gradients" and layout.pp > 1)
        parts = dense / (shard if split else 1) * each, experts / (eshard if split else 1) * each
        found[kind] = sum(parts)
        named[f"the {kind} of its dense layers"], named[f"the {kind} of its experts"] = parts
    tokens = workload.tokens / (layout.data_ranks * layout.cp * plan.microbatches)
    found["activations"] = _kept(workload, plan, part, tokens, waiting(plan, stage)) * workload.number_bytes
    if layout.zero and layout.folded > 1:
        found["gathered"] = _gathered(workload, plan, part, shard, eshard)
    if part.last:
        found["logits"] = tokens * workload.vocab / layout.tp * 4 * workload.logits_kept
    named |= {"what is kept for the backward pass": found["activations"]}
    named |= {"gathered parameters": found.get("gathered", 0.0), "the logits": found.get("logits", 0.0)}
    return Held(stage, found, max(named, key=lambda name: named[name]))


def _kept(workload: Workload, plan: Plan, part: Share, tokens: float, times: float) -> float:
    """Numbers kept for the backward pass, of so many tokens each of so many times."""
    tp = plan.layout.tp
    kept = (tokens * (part.kept / tp + part.expert_kept) + part.kept_once) * times
    if plan.recompute:
        of = (tokens * (s.kept / tp + s.top_k * s.expert_kept) + s.kept_once for s in part.kinds)
        kept = tokens * part.blocks * workload.width * times + max(of, default=0.0)
    kept += tokens * workload.first_kept * times if part.first else 0.0
    return kept + ((tokens * workload.last_kept + workload.last_kept_once) if part.last else 0.0)


def _gathered(workload: Workload, plan: Plan, part: Share, shard: int, eshard: int) -> float:
    """Bytes of gathered parameters beside the shards; where all stay gathered, of the shards beside them."""
    layout = plan.layout
    number = 2.0 if plan.gather == "bf16" else workload.param_bytes

    def split(params: float, experts: float) -> float:
        return params / layout.tp * (shard > 1) + experts / layout.ep * (eshard > 1)

    whole = split(part.params + part.ends, part.experts)
    if layout.zero < 3:
        return split((part.params + part.ends) / shard, part.experts / eshard) * workload.param_bytes
    if layout.pp > 1 or plan.secondary == 1:
        return whole * number
    two = 2 * max((split(size.params, size.experts * size.expert_params) for size in part.kinds), default=0.0)
    between = 0.0 if plan.secondary is None else split(part.params, part.experts) / plan.secondary
    return (two + split(part.ends, 0) + between) * number
