"""Group-limited top-k: the routers of DeepSeek-V2 and V3."""

from typing import Literal

import torch
from torch import Tensor, nn

from turnout.decide.token.correction import Corrected
from turnout.decide.token.gate import Priority, check, largest, limit, linear, picked, sigmoid, softmax
from turnout.errors import ShapeError, UsageError, nearest, word
from turnout.types import Routing

__all__ = ["GroupLimited"]


class GroupLimited(Corrected):
    """Each token takes the k experts with the highest biased score, from a few groups of experts only.

    s = sigmoid(W x) or softmax(W x); c = s + b; the ``top_groups`` groups with the highest group score stay, all others
    are masked with -inf; chosen = the k largest c that are left; g_e = scale * s_e / (sum of the chosen s + 1e-20).
    A group's score is the sum of its two largest c, or its largest. b moves after every optimizer step, as in
    ``LossFree``. As it stands this is DeepSeek-V3; V2 is scores="softmax", group_score="max", bias=False,
    renormalize=False.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        num_groups: groups of E / num_groups neighbouring experts (devices, in the paper); 1 for no groups.
        top_groups: groups that a token may choose from; they must hold K experts.
        scores: "sigmoid" or "softmax".
        group_score: "top2", the sum of a group's two largest, or "max".
        bias: whether there is a correction bias b; without it nothing but a loss balances the load.
        renormalize: whether the K scores of a token are scaled to sum to 1 before ``scale``.
        scale: what the weights are multiplied with (routed_scaling_factor).
        rate: how far the bias moves per step; 0 leaves it alone. Of no meaning without ``bias``.
        capacity_factor: c > 0 limits every expert to max(1, ceil(c T K / E)) tokens; None drops nothing.
        priority: whom a full expert keeps: "weight" the highest weights, "position" the earliest tokens.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, groups that do not divide E or do not hold K, or a size below 1.
        UsageError: a negative rate, a capacity_factor that is not positive, or an unknown name of scores.

    >>> router = GroupLimited(2, 4, top_k=2, num_groups=2, top_groups=1)
    >>> _ = router.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0], [2.0, 0.0], [2.0, 0.0]]))
    >>> router(torch.tensor([[1.0, 0.0]])).expert_R.tolist()  # expert 0 scores highest, but its group does not
    [2, 3]

    Takes: K experts a token, from few groups; 2 D E operations a token.

    Source: DeepSeek-AI, 2024, "DeepSeek-V3 Technical Report", section 2.1.2, with the group score of the released
    code; DeepSeek-AI, 2024, "DeepSeek-V2", section 2.1.3, device-limited routing. Groups of one expert score with that
    one. ``bias_E`` stays in fp32 when the module is cast down.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        num_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        scores: Literal["sigmoid", "softmax"] = "sigmoid",
        group_score: Literal["top2", "max"] = "top2",
        bias: bool = True,
        rate: float = 0.001,
        capacity_factor: float | None = None,
        priority: Priority = "weight",
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("GroupLimited", width, num_experts, top_k, capacity_factor, priority)
        _check_groups(num_experts, top_k, num_groups, top_groups)
        _check_names(scores, group_score, rate)
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.num_groups, self.top_groups = num_groups, top_groups
        self.scores, self.group_score = scores, group_score
        self.renormalize, self.scale, self.rate = renormalize, scale, rate
        self.capacity_factor, self.priority = capacity_factor, priority
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32) if bias else None)

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE, score_TE = self.scored(x_TD)
        index_TK, weight_TK = self.chosen(score_TE)
        routing = Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=score_TE, logit_TE=logit_TE
        )
        return limit(routing, self.top_k, self.capacity_factor, self.priority)

    def scored(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """As ``turnout.decide.token.gate.ByScore``."""
        logit_TE = linear(x_TD, self.weight)
        return logit_TE, sigmoid(logit_TE) if self.scores == "sigmoid" else softmax(logit_TE)

    def chosen(self, score_TE: Tensor, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """As ``turnout.decide.token.gate.ByScore``; a rank among the experts of the groups that are open."""
        biased_TE = score_TE if self.bias_E is None else score_TE + self.bias_E
        index_TK = picked(self._limited(biased_TE.detach()), self.top_k, rank)
        weight_TK = score_TE.gather(1, index_TK)
        if self.renormalize:
            weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20)
        return index_TK, weight_TK if self.scale == 1 else weight_TK * self.scale

    def _limited(self, biased_TE: Tensor) -> Tensor:
        """The biased scores, -inf outside the groups that each token may choose from."""
        if self.top_groups == self.num_groups:
            return biased_TE
        size = self.num_experts // self.num_groups
        grouped_TGM = biased_TE.unflatten(1, (self.num_groups, size))
        group_TG = grouped_TGM.topk(min(2 if self.group_score == "top2" else 1, size), dim=2)[0].sum(2)
        closed_TG = torch.ones_like(group_TG, dtype=torch.bool)
        closed_TG.scatter_(1, largest(group_TG, self.top_groups), False)
        return grouped_TGM.masked_fill(closed_TG.unsqueeze(2), float("-inf")).flatten(1)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        groups = f"groups={self.top_groups}/{self.num_groups} by {self.group_score}"
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, {groups}, scores={self.scores!r}"


def _check_names(scores: str, group_score: str, rate: float) -> None:
    where = "turnout.decide.token.GroupLimited"
    if not rate >= 0:
        fix = "pass rate=0.001, or 0 to leave the bias alone"
        raise UsageError(word("rate", got=rate, allowed="not be negative", where=where, fix=fix))
    for name, got, allowed in (
        ("scores", scores, ("sigmoid", "softmax")),
        ("group_score", group_score, ("top2", "max")),
    ):
        if got not in allowed:
            raise nearest(str(got), allowed, kind=name, where=where)


def _check_groups(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> None:
    divides = num_groups >= 1 and num_experts % num_groups == 0
    if divides and 1 <= top_groups <= num_groups and top_groups * (num_experts // num_groups) >= top_k:
        return
    near = max(n for n in range(1, num_experts + 1) if num_experts % n == 0 and n <= max(num_groups, 1))
    raise ShapeError(
        word(
            "num_groups and top_groups",
            got=f"{num_groups} and {top_groups}",
            allowed=f"divide num_experts={num_experts}, and leave at least top_k={top_k} experts to choose from",
            where="turnout.decide.token.GroupLimited",
            fix=f"pass num_groups={near}, top_groups={min(near, -(-top_k * near // num_experts))}",
        )
    )
