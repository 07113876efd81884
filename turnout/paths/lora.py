"""A bank of low-rank adapters of one linear map: paths that a router can choose among."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, word
from turnout.run import low_rank, low_rank_merged
from turnout.types import Cost, LowRankWeights, Routing
from turnout.types.called import Called

__all__ = ["LoRA"]


class LoRA(Called):
    """N low-rank adapters of one linear map from D to O, of any ranks, with their factors stacked.

    Adapter n adds scale_n * B_n A_n x, with A_n (r_n, D) and B_n (O, r_n); a routing says which adapters a token takes
    and with what weights.

    Args:
        width: D, what the linear map takes.
        out: O, what it gives.
        ranks: r_n of each adapter, at least 1 each.
        scales: of each adapter, lora_alpha / r in the words of PEFT; None is 1 for all.
        generator: where the chance of the starting weights comes from; torch's default when None.

    A_n starts uniform as ``nn.Linear`` does, B_n at zero: an adapter that has learned nothing adds nothing.

    Raises:
        ShapeError: a size below 1, or not one scale for each rank.

    >>> bank = LoRA(8, 4, ranks=(2, 3))
    >>> bank.num_paths, tuple(bank.down.shape), tuple(bank.up.shape)
    (2, (5, 8), (5, 4))

    Source: Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models". We stack the factors of all adapters
    along the rank, and store B transposed.
    """

    def __init__(
        self,
        width: int,
        out: int,
        ranks: Sequence[int],
        *,
        scales: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        scales = [1.0] * len(ranks) if scales is None else list(scales)
        if min(width, out, len(ranks), *ranks) < 1 or len(scales) != len(ranks):
            got = f"{width}, {out}, {list(ranks)} and {len(scales)} scales"
            allowed = "be 1 or more, with a scale for each rank"
            fix = "pass one rank and one scale an adapter"
            where = "turnout.paths.LoRA"
            raise ShapeError(word("width, out, ranks and scales", got=got, allowed=allowed, where=where, fix=fix))
        self.border_N = (0, *accumulate(int(rank) for rank in ranks))
        self.scale_N = tuple(float(scale) for scale in scales)
        bound = width**-0.5
        self.down = nn.Parameter(torch.empty(self.border_N[-1], width).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(self.border_N[-1], out))

    @property
    def num_paths(self) -> int:
        """N."""
        return len(self.scale_N)

    def weights(self) -> LowRankWeights:
        """The factors as executors see them."""
        return LowRankWeights(self.down, self.up, self.border_N, self.scale_N)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, O) the weighted sum of each token's adapters."""
        return low_rank(x_TD, routing, self.weights())

    def merged(self, x_TD: Tensor, routing: Routing, sequence_T: Tensor, *, parts: int = 1) -> Tensor:
        """(T, O) each token through the average of the adapters that its sequence takes; see ``low_rank_merged``."""
        return low_rank_merged(x_TD, routing, self.weights(), sequence_T, parts=parts)

    def fill(self, n: int, a_rD: Tensor, b_Or: Tensor) -> None:
        """Sets the factors of adapter n, in PEFT's order (``lora_A``, ``lora_B``).

        Raises:
            ShapeError: they are not (r_n, D) and (O, r_n).
        """
        rows = slice(self.border_N[n], self.border_N[n + 1])
        here = self.down[rows], self.up[rows].t()
        if a_rD.shape != here[0].shape or b_Or.shape != here[1].shape:
            got = f"{tuple(a_rD.shape)} and {tuple(b_Or.shape)}"
            allowed = f"be {tuple(here[0].shape)} and {tuple(here[1].shape)}"
            fix = "pass the factors of an adapter of this linear map, of that rank"
            raise ShapeError(word("A and B", got=got, allowed=allowed, where="turnout.paths.LoRA.fill", fix=fix))
        with torch.no_grad():
            here[0].copy_(a_rD)
            here[1].copy_(b_Or)

    def factors(self, n: int) -> tuple[Tensor, Tensor, float]:
        """A_n (r_n, D), B_n (O, r_n) and the scale of adapter n; views of the parameters."""
        rows = slice(self.border_N[n], self.border_N[n + 1])
        return self.down[rows], self.up[rows].t(), self.scale_N[n]

    @torch.no_grad()
    def directions(self) -> Tensor:
        """(N, D) fp32, the unit input that each adapter answers most strongly: the first right singular vector of B A.

        Exact: with B = Q R and A.T = P S, the vector is P times the first right singular vector of the small R S.T.
        Its sign is free; here the entry of the largest size is positive. An adapter that adds nothing has zeros.
        """
        rows = []
        for a, b in pairwise(self.border_N):
            right_Dr, small_rr = torch.linalg.qr(self.down[a:b].double().t())
            left_rr = torch.linalg.qr(self.up[a:b].double().t())[1]
            value_r, vector_rr = torch.linalg.svd(left_rr @ small_rr.t())[1:]
            row_D = right_Dr @ vector_rr[0]
            sign = torch.sign(row_D[row_D.abs().argmax()])
            rows.append(row_D * sign if value_r[0] > 0 else torch.zeros_like(row_D))
        return torch.stack(rows).float()

    def cost(self, entries: float = 1.0) -> Cost:
        """What a token costs that takes ``entries`` adapters on average: two products of the mean rank."""
        size = self.down.numel() + self.up.numel()
        active = size / self.num_paths * entries
        return Cost(params=size, params_active=round(active), flops=2 * active)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        ranks = tuple(b - a for a, b in pairwise(self.border_N))
        return f"{self.down.shape[1]}, {self.up.shape[1]}, ranks={ranks}"
