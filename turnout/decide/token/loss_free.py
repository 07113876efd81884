"""Loss-free balancing: a bias on the scores, moved by the observed load, decides who is chosen but not by how much."""

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import Priority, check, largest, limit, linear, softmax
from turnout.errors import ShapeError, UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["LossFree", "nudge"]


def nudge(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The bias after one step of balancing: b + rate * sign(mean load - load), exact for whole-number loads.

    Args:
        bias_E: (E,) the bias that the step was routed with.
        load_E: (E,) the tokens that each expert was chosen by in the whole step, before capacity.
        rate: how far each bias moves.

    Raises:
        ShapeError: load_E is not (E,).

    >>> nudge(torch.zeros(3), torch.tensor([5, 0, 1]), 0.5)
    tensor([-0.5000,  0.5000,  0.5000])

    Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1.
    """
    if load_E.shape != bias_E.shape:
        raise ShapeError(
            word(
                "load_E",
                got=f"shape {tuple(load_E.shape)}",
                allowed=f"have one load for each of the {bias_E.numel()} experts",
                where="after_step",
                fix="pass the sum of routing.load_E over the step's batches",
            )
        )
    load_E = load_E.detach().to(bias_E.device)
    return bias_E + rate * torch.sign(load_E.sum() - load_E.numel() * load_E).to(bias_E.dtype)


def refuse_evaluation(training: bool) -> None:
    """Refuses to balance a router in evaluation mode, where the load of held-out text must not leak in."""
    if not training:
        raise UsageError(
            word(
                "the router",
                got="one in evaluation mode",
                allowed="be in training mode",
                where="after_step",
                fix="call after_step from the training loop only, once per optimizer step",
            )
        )


def in_fp32(before_E: Tensor, after_E: Tensor) -> Tensor:
    """The bias after its module moved between devices and dtypes: on the new device, with all its digits."""
    if after_E.dtype == torch.float32:
        return after_E
    return after_E.float() if before_E.is_meta else before_E.to(after_E.device)


class LossFree(Called):
    """Each token takes the k experts with the highest biased score; the weights are the scores without the bias.

    s = sigmoid(W x) or softmax(W x); chosen = the k largest of s_e + b_e; g_e = s_e for those. After every optimizer
    step b_e moves by rate * sign(mean load - load_e): up for an expert that got too few tokens, down for one with too
    many. No gradient reaches b, and b reaches no weight.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        scores: "sigmoid" or "softmax".
        renormalize: whether the K weights of a token are scaled to sum to 1.
        rate: how far the bias moves per step; 0 leaves it alone.
        capacity_factor: c > 0 limits every expert to max(1, ceil(c T K / E)) tokens; None drops nothing.
        priority: whom a full expert keeps: "weight" the highest weights, "position" the earliest tokens.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: another name for scores, a negative rate, or a capacity_factor that is not positive.

    >>> router = LossFree(4, 3, top_k=1, rate=0.1)
    >>> router.after_step(torch.tensor([6, 0, 0]))
    >>> router.bias_E
    tensor([-0.1000,  0.1000,  0.1000])

    Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts". ``bias_E`` stays
    in fp32 when the module is cast down, or steps of 0.001 would vanish.
    """

    bias_E: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        scores: Literal["sigmoid", "softmax"] = "sigmoid",
        renormalize: bool = False,
        rate: float = 0.001,
        capacity_factor: float | None = None,
        priority: Priority = "weight",
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("LossFree", width, num_experts, top_k, capacity_factor, priority)
        if scores not in ("sigmoid", "softmax") or not rate >= 0:
            raise UsageError(
                word(
                    "scores and rate",
                    got=f"{scores!r} and {rate}",
                    allowed="be 'sigmoid' or 'softmax', and not negative",
                    where="turnout.decide.token.LossFree",
                    fix="pass scores='sigmoid' and rate=0.001",
                )
            )
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.scores, self.renormalize, self.rate = scores, renormalize, rate
        self.capacity_factor, self.priority = capacity_factor, priority
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = linear(x_TD, self.weight)
        score_TE = logit_TE.sigmoid() if self.scores == "sigmoid" else softmax(logit_TE)
        index_TK = largest(score_TE + self.bias_E, self.top_k)
        weight_TK = score_TE.gather(1, index_TK)
        if self.renormalize:
            weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20)
        routing = Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=score_TE, logit_TE=logit_TE
        )
        return limit(routing, self.top_k, self.capacity_factor, self.priority)

    def after_step(self, load_E: Tensor) -> None:
        """Moves the bias by one step; the training loop calls it once per optimizer step.

        Args:
            load_E: (E,) the tokens that chose each expert (before capacity), summed over the step's batches and ranks.

        Raises:
            ShapeError: load_E is not (E,).
            UsageError: the router is in evaluation mode.
        """
        refuse_evaluation(self.training)
        self.bias_E.copy_(nudge(self.bias_E, load_E, self.rate))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before_E = self.bias_E
        super()._apply(fn, recurse)
        self.bias_E = in_fp32(before_E, self.bias_E)
        return self

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, scores={self.scores!r}, rate={self.rate}"
