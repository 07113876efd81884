"""ScaLearn: all adapters at once, each output of each scaled by a learned number, with no constraint on their sum."""

import dataclasses

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.types import LowRankWeights, Routing
from turnout.types.called import Called
from turnout.types.recall import steady

__all__ = ["ScaLearn"]

_WHERE = "turnout.paths.ScaLearn"


class ScaLearn(Called):
    """Stands in a router's place: every token takes all N adapters, each scaled output by output.

    y = sum_n omega_n * a_n(x), with a_n the frozen adapters and omega (N, O), or (N, 1) when uniform. It does not
    depend on x, so it folds into the factors that lead out: ``fold``. In training each omega is set to zero with some
    chance, and the rest scaled up by as much.

    Args:
        num_paths: N.
        out: O, of the linear map.
        uniform: one number an adapter instead of one an output.
        scale: omega starts from a normal distribution about scale / N, with a deviation of 1e-3.
        dropout: the chance of zeroing each omega in training, in [0, 1).
        generator: where the starting omegas' chance comes from; torch's default when None.

    Raises:
        ShapeError: a size is below 1.
        UsageError: dropout out of range.

    >>> router = ScaLearn(2, 3, uniform=True, dropout=0.0)
    >>> _ = router.omega.data.copy_(torch.tensor([[2.0], [-1.0]]))
    >>> router.fold(LowRankWeights(torch.ones(3, 4), torch.ones(3, 3), (0, 1, 3), (1.0, 1.0))).up_RO[:, 0].tolist()
    [2.0, -1.0, -1.0]

    Source: Frohmann et al., 2024, "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale".
    The starting scale of 2 and the dropout of 0.3 are those of the published code. There adapters lie between layers;
    here they are at linear maps. One module at several layers is ScaLearn++.
    """

    def __init__(
        self,
        num_paths: int,
        out: int,
        *,
        uniform: bool = False,
        scale: float = 2.0,
        dropout: float = 0.3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(num_paths, out) < 1:
            got, fix = f"{num_paths} and {out}", "pass 1 or more"
            raise ShapeError(word("num_paths and out", got=got, allowed="be at least 1", where=_WHERE, fix=fix))
        if not 0 <= dropout < 1:
            raise UsageError(
                word("dropout", got=dropout, allowed="be in [0, 1)", where=_WHERE, fix="leave it at the default")
            )
        self.num_experts, self.out, self.uniform, self.dropout = num_paths, out, uniform, dropout
        shape = (num_paths, 1 if uniform else out)
        self.omega = nn.Parameter(torch.empty(shape).normal_(scale / num_paths, 1e-3, generator=generator))

    def forward(self, x_TD: Tensor) -> Routing:
        """Every token takes every adapter, whole; what scales them is in ``fold``."""
        return Routing.from_dense(x_TD.new_ones((len(x_TD), self.num_experts), dtype=torch.float32))

    def fold(self, weights: LowRankWeights, *, generator: torch.Generator | None = None) -> LowRankWeights:
        """The factors with omega in those that lead out; ``generator`` draws what is dropped in training.

        Raises:
            ShapeError: they are of another number of adapters, or of another linear map.
        """
        if weights.num_paths != self.num_experts or (weights.out != self.out and not self.uniform):
            got, allowed = f"{weights.num_paths} adapters to {weights.out}", f"be {self.num_experts} to {self.out}"
            raise ShapeError(word("the adapters", got=got, allowed=allowed, where=_WHERE, fix="build it for these"))
        omega_NO = self.omega
        if self.training and self.dropout:
            generator = steady(generator)
            device = omega_NO.device if generator is None else generator.device
            chance_NO = torch.rand(omega_NO.shape, generator=generator, device=device).to(omega_NO.device)
            omega_NO = omega_NO * (chance_NO >= self.dropout) / (1 - self.dropout)
        rank_N = torch.tensor(weights.rank_N, device=omega_NO.device)
        omega_RO = omega_NO.repeat_interleave(rank_N, dim=0, output_size=weights.border_N[-1])
        return dataclasses.replace(weights, up_RO=weights.up_RO * omega_RO.to(weights.up_RO.dtype))

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.num_experts}, {1 if self.uniform else self.out}, dropout={self.dropout}"
