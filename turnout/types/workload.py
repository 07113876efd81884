"""Workload: a network and a step of its training in numbers, which is all that a planner has to know of it."""

import dataclasses

from turnout.errors import UsageError, word

__all__ = ["BlockSize", "Workload"]


@dataclasses.dataclass(frozen=True)
class BlockSize:
    """One block of a network.

    Args:
        params: parameters that every token uses: attention, norms, router, shared expert, dense feed-forward layer.
        flops: of them and of attention, for one token forward; a multiply-add counts 2.
        kept: numbers that they keep of one token for the backward pass.
        experts: E; 0 for none.
        top_k: K, how many experts a token takes.
        expert_params: of one expert.
        expert_kept: numbers that an expert keeps of one token.
        kept_once: numbers kept of a micro-batch however many rows it has: a window's mask, weights in another dtype.

    >>> BlockSize(params=10, flops=20.0, kept=5.0, experts=8, top_k=2, expert_params=6).total
    58

    Source: none; plain bookkeeping.
    """

    params: int
    flops: float
    kept: float
    experts: int = 0
    top_k: float = 0.0
    expert_params: int = 0
    expert_kept: float = 0.0
    kept_once: float = 0.0

    @property
    def total(self) -> int:
        """All its parameters."""
        return self.params + self.experts * self.expert_params

    @property
    def all_flops(self) -> float:
        """With the experts that a token takes."""
        return self.flops + 2.0 * self.top_k * self.expert_params


@dataclasses.dataclass(frozen=True)
class Workload:
    """One optimizer step of a network.

    Args:
        blocks: from the first to the last.
        width: D, numbers that stand for a token between blocks.
        seq: S, tokens of a sequence.
        batch: sequences of a step, over all devices.
        embedding_params: of the table in front of the first block.
        head_params: of the output layer behind the last; 0 where it is the embedding.
        vocab: V, logits of a token.
        logits_kept: how many times a micro-batch's fp32 logits are held at once; 0 where they are never whole.
        number_bytes: of a number in the computation.
        param_bytes: of a stored parameter.
        grad_bytes: of its gradient.
        optimizer_bytes: of what the optimizer keeps for it.
        wire_bytes: of a number of a token on its way to another device; None for ``number_bytes``.
        first_flops: for one token in front of the first block, such as a router of all layers.
        first_kept: numbers that this keeps of one token.
        last_kept: numbers kept of one token behind the last block, beside its logits.
        last_kept_once: numbers kept there of a micro-batch however many rows it has.

    Raises:
        UsageError: no block, or a batch without a token.

    >>> block = BlockSize(params=10, flops=20.0, kept=5.0)
    >>> Workload((block, block), width=4, seq=8, batch=2).params
    20

    Source: Rajbhandari et al., 2020, "ZeRO", for mixed-precision Adam's 2 + 2 + 12 bytes.
    """

    blocks: tuple[BlockSize, ...]
    width: int
    seq: int
    batch: int
    embedding_params: int = 0
    head_params: int = 0
    vocab: int = 0
    logits_kept: float = 0.0
    number_bytes: float = 2.0
    param_bytes: float = 2.0
    grad_bytes: float = 2.0
    optimizer_bytes: float = 12.0
    wire_bytes: float | None = None
    first_flops: float = 0.0
    first_kept: float = 0.0
    last_kept: float = 0.0
    last_kept_once: float = 0.0

    def __post_init__(self) -> None:
        for name in ("blocks", "width", "seq", "batch"):
            value = getattr(self, name)
            if (len(value) if name == "blocks" else value) < 1:
                where, fix = "turnout.types.Workload", f"give one {name.removesuffix('s')} at least"
                raise UsageError(word(name, got=value, allowed="be at least one", where=where, fix=fix))

    @property
    def params(self) -> int:
        """All parameters."""
        return sum(block.total for block in self.blocks) + self.embedding_params + self.head_params

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.seq * self.batch

    @property
    def travelling(self) -> float:
        """Bytes that stand for a token between devices."""
        return self.width * (self.number_bytes if self.wire_bytes is None else self.wire_bytes)

    @property
    def experts(self) -> int:
        """The most that a block has."""
        return max(block.experts for block in self.blocks)
