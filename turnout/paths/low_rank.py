"""What one adapter of low rank adds to a linear map of ours."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.run.product import linear

__all__ = ["LowRank"]


class LowRank(nn.Module):
    """scale · B A x, beside W x: what fine-tuning adds when W stays as it is.

    A map whose outputs are of several kinds, such as queries, keys and values, has a pair (A, B) for each. A begins as
    ``nn.Linear`` does and B at zero, so that nothing is added at first.

    Args:
        inner: the inputs.
        sizes: the outputs of each kind, in order.
        rank: r, of each pair.
        scale: of what is added; alpha / r, as PEFT has it.
        generator: where the chance comes from; torch's default when None.

    Raises:
        UsageError: a rank below 1.

    >>> added = LowRank(8, (4, 2), rank=3, scale=2.0)
    >>> added(torch.ones(5, 8)).shape, bool(added(torch.ones(5, 8)).any())
    (torch.Size([5, 6]), False)

    Source: Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; started as PEFT does.
    """

    def __init__(
        self,
        inner: int,
        sizes: Sequence[int],
        *,
        rank: int,
        scale: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise UsageError(
                word("rank", got=rank, allowed="be 1 or more", where="turnout.paths.LowRank", fix="rank=8")
            )
        self.sizes, self.rank, self.scale = tuple(sizes), rank, scale
        edge = 1 / math.sqrt(inner)  # of a uniform distribution: Kaiming's, with a = sqrt(5)
        self.down = nn.Parameter(torch.empty(len(self.sizes) * rank, inner).uniform_(-edge, edge, generator=generator))
        self.up = nn.Parameter(torch.zeros(sum(self.sizes), rank))

    def pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """A (r, inner) and B (size, r) of each kind of output."""
        return tuple(zip(self.down.split(self.rank), self.up.split(self.sizes), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """(..., sum of sizes) from (..., inner)."""
        narrow = linear(x, self.down)
        parts = zip(narrow.split(self.rank, dim=-1), self.up.split(self.sizes), strict=True)
        wide = [linear(part, up) for part, up in parts]
        return self.scale * (wide[0] if len(wide) == 1 else torch.cat(wide, dim=-1))

    def product(self) -> Tensor:
        """(sum of sizes, inner), what W becomes more when this is folded into it."""
        return self.scale * torch.cat([b @ a for a, b in self.pairs()])

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.down.shape[1]}, {self.sizes}, rank={self.rank}, scale={self.scale}"
