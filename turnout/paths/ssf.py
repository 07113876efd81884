"""A pool of scales and shifts of one layer's features: the smallest paths there are."""

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, word
from turnout.run.merged import average
from turnout.types import Cost, Routing

__all__ = ["SSF"]


class SSF(nn.Module):
    """N pairs of a scale and a shift of D features; a sequence's pairs are averaged first, then applied to it.

    y = x * sum_n w_n scale_n + sum_n w_n shift_n. Scales start at 1 and shifts at 0: nothing changes at the start.

    Args:
        num_paths: N.
        width: D.

    Raises:
        ShapeError: a size is below 1.

    >>> pool = SSF(2, 3)
    >>> _ = pool.scale.data.copy_(torch.tensor([[1.0] * 3, [3.0] * 3]))
    >>> pool.merged(torch.ones(1, 3), Routing.from_dense(torch.tensor([[0.5, 0.5]])), torch.tensor([0]))
    tensor([[2., 2., 2.]], grad_fn=<AddBackward0>)

    Source: Lian et al., 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning"; the pool:
    Feng et al., 2023, "Towards Instance-adaptive Inference for Federated Learning".
    """

    def __init__(self, num_paths: int, width: int) -> None:
        super().__init__()
        if min(num_paths, width) < 1:
            got, where = f"{num_paths} and {width}", "turnout.paths.SSF"
            fix = "pass 1 or more"
            raise ShapeError(word("num_paths and width", got=got, allowed="be at least 1", where=where, fix=fix))
        self.scale = nn.Parameter(torch.ones(num_paths, width))
        self.shift = nn.Parameter(torch.zeros(num_paths, width))

    @property
    def num_paths(self) -> int:
        """N."""
        return len(self.scale)

    def merged(self, x_TD: Tensor, routing: Routing, sequence_T: Tensor) -> Tensor:
        """(T, D) each token scaled and shifted by the mean of what its sequence takes.

        Raises:
            ShapeError: x_TD is not (T, D) for as many tokens, or the routing over another number of pairs.
        """
        if x_TD.shape != (len(sequence_T), self.scale.shape[1]) or routing.num_experts != self.num_paths:
            got = f"{tuple(x_TD.shape)}, and a routing over {routing.num_experts}"
            allowed = f"be ({len(sequence_T)}, {self.scale.shape[1]}), and over {self.num_paths}"
            fix, where = "make the routing of these sequences", "turnout.paths.SSF"
            raise ShapeError(word("x_TD and routing", got=got, allowed=allowed, where=where, fix=fix))
        scale_BD, shift_BD = average(routing, self.scale), average(routing, self.shift)
        return x_TD * scale_BD[sequence_T].to(x_TD.dtype) + shift_BD[sequence_T].to(x_TD.dtype)

    def cost(self) -> Cost:
        """What a token costs: a multiplication and an addition a feature."""
        size = self.scale.numel() + self.shift.numel()
        return Cost(params=size, params_active=size // self.num_paths, flops=2.0 * self.scale.shape[1])

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.num_paths}, {self.scale.shape[1]}"
