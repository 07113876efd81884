"""MoS: the low-rank adapters of many layers, put together from the shards of two pools that they share."""

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.types import Cost, LowRankWeights
from turnout.types.called import Called

__all__ = ["Shards"]

_WHERE = "turnout.paths.Shards"


class Shards(Called):
    """Low-rank adapters of M linear maps from D to O, their vectors concatenated from shards of global pools.

    Two pools hold n = e M l shards each, D / l and O / l wide: as many numbers as M adapters of rank e. Map m has the
    indices I_m and J_m (r, l), drawn once and then fixed: row k of A_m is the shards down[I_mk1] .. down[I_mkl] one
    after the other, column k of B_m the shards up[J_mk1] .. up[J_mkl]; y = alpha / r * B_m A_m x. What tells the maps
    apart, in the words of the paper: each takes a subset of the pool, its own (subset selection); A and B are drawn
    independently (pair dissociation); what is drawn are parts of vectors, l of them each (vector sharding); and p of
    its r vectors are in no other map (shard privatization). The shards of one map all differ.

    Args:
        width: D, a multiple of ``shards``.
        out: O, a multiple of ``shards``.
        maps: M.
        budget: e, the rank of the M adapters that would have as many numbers.
        rank: r, of each map, from e up; at most p + (e - p) M, where every map has the whole pool.
        shards: l, in how many a vector is cut.
        private: p, how many of the r vectors are a map's own; at most e.
        dissociate: False draws J_m = I_m.
        alpha: of the scale alpha / r.
        generator: where the chance of indices and starting weights comes from; torch's default when None.

    ``down`` starts uniform within D ** -0.5, as an adapter's A does, and ``up`` at zero. With r = e = p the maps share
    nothing, and are M ordinary adapters; with r = e M, l = 1, p = 0 and no dissociation they are all the same one
    (pure sharing).

    Raises:
        ShapeError: sizes below 1, or shards that do not divide the widths.
        UsageError: a rank or a number of private vectors that the pool does not hold.

    >>> paths = Shards(8, 4, 3, budget=2, rank=4, shards=2, private=1)
    >>> tuple(paths.down.shape), tuple(paths.up.shape), paths.weights(0).rank_N
    ((12, 4), (12, 2), (4,))

    Source: Wang et al., 2025, "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards". As
    in the published code the private shards of A and B stand in the same order; there the pools are one a kind of map
    (all q_proj, and so on), and the order of the layers is read from their names.
    """

    index_down: Tensor
    index_up: Tensor

    def __init__(
        self,
        width: int,
        out: int,
        maps: int,
        *,
        budget: int = 2,
        rank: int = 8,
        shards: int = 4,
        private: int = 1,
        dissociate: bool = True,
        alpha: float = 16.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(width, out, maps, budget, rank, shards) < 1 or width % shards or out % shards:
            got = f"{width}, {out}, {maps}, {budget}, {rank} and {shards}"
            allowed = "be 1 or more, and shards a divisor of width and out"
            fix = "pass shards=1, or another divisor of both"
            what = "width, out, maps, budget, rank and shards"
            raise ShapeError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))
        most = private + (budget - private) * maps
        if not 0 <= private <= budget or not budget <= rank <= most:
            got = f"rank {rank} and private {private}, with budget {budget} and {maps} maps"
            allowed = f"be: private from 0 to {budget}, rank from {budget} to private + (budget - private) * maps"
            fix = f"pass private={max(budget - 1, 0)}, and a rank of at most {max(budget - 1, 0) + maps}"
            raise UsageError(word("rank and private", got=got, allowed=allowed, where=_WHERE, fix=fix))
        self.maps, self.budget, self.rank, self.shards, self.private = maps, budget, rank, shards, private
        self.dissociate, self.alpha = dissociate, float(alpha)
        index_down = self._draw(generator)
        self.register_buffer("index_down", index_down)
        self.register_buffer("index_up", self._draw(generator) if dissociate else index_down.clone())
        count, bound = budget * maps * shards, width**-0.5
        start = torch.empty(count, width // shards).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(start)
        self.up = nn.Parameter(torch.zeros(count, out // shards))

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        """(M, r, l) the shards of each map: some of those for all, then its own."""
        common = (self.budget - self.private) * self.maps * self.shards
        own = self.private * self.shards
        taken = (self.rank - self.private) * self.shards
        rows = []
        for m in range(self.maps):
            drawn = torch.randperm(common, generator=generator)[:taken]
            rows.append(torch.cat((drawn, torch.arange(common + m * own, common + (m + 1) * own))))
        return torch.stack(rows).view(self.maps, self.rank, self.shards)

    @property
    def width(self) -> int:
        """D."""
        return self.down.shape[1] * self.shards

    @property
    def out(self) -> int:
        """O."""
        return self.up.shape[1] * self.shards

    def weights(self, m: int) -> LowRankWeights:
        """The factors of map m as executors see them; gradients flow to the pools."""
        down_RD = self.down[self.index_down[m]].flatten(1)
        up_RO = self.up[self.index_up[m]].flatten(1)
        return LowRankWeights(down_RD, up_RO, (0, self.rank), (self.alpha / self.rank,))

    def factors(self, m: int) -> tuple[Tensor, Tensor, float]:
        """A (r, D), B (O, r) and the scale of map m, in PEFT's order; copies."""
        weights = self.weights(m)
        return weights.down_RD.detach(), weights.up_RO.detach().t().contiguous(), weights.scale_N[0]

    def forward(self, x_TD: Tensor, m: int) -> Tensor:
        """(T, O) what map m's adapter adds."""
        weights = self.weights(m)
        return ((x_TD @ weights.down_RD.t()) * weights.scale_N[0]) @ weights.up_RO

    def cost(self) -> Cost:
        """What the pools hold, and what a token costs at one map: two products of rank r."""
        active = self.rank * (self.width + self.out)
        return Cost(params=self.down.numel() + self.up.numel(), params_active=active, flops=2 * active)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        kept = f"budget={self.budget}, rank={self.rank}, shards={self.shards}, private={self.private}"
        return f"{self.width}, {self.out}, {self.maps}, {kept}, dissociate={self.dissociate}"
