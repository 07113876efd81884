"""Switch and mixture: a token goes to one group of experts, and there to several."""

import dataclasses

import torch
from torch import Tensor

from turnout.decide.token.gate import largest, softmax
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import ShapeError, UsageError, word
from turnout.types import Routing

__all__ = ["SAM"]

_WHERE = "turnout.decide.token.SAM"


class SAM(LinearGate):
    """Each token takes the k best experts of the one group whose probabilities sum to most.

    p = softmax(W x) over all E experts; q_g = sum of p_e over group g; g* = argmax_g q_g (Switch); the K largest p_e in
    g* run (Mixture), with weight p_e. Beside the loss it asks that no expert elsewhere beats those that run:
    alignment * mean over tokens of sum over e outside g* of relu(p_e - p_K), p_K being the least of the chosen.

    With a group on each device, a token travels to one device whatever K is.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E / G.
        num_groups: G, a divisor of E; None for the most groups that hold 2 K experts each. 1 is top-k; with G = E and
            K = 1 it is Switch.
        alignment: weight of the alignment loss, 0 or more.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E / G, G does not divide E, or a size is below 1.
        UsageError: a negative alignment.

    >>> router = SAM(2, 4, top_k=2, num_groups=2)
    >>> _ = router.weight.data.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.5, 0.0], [1.4, 0.0]]))
    >>> router(torch.tensor([[1.0, 0.0]])).expert_R.tolist()  # the best expert is in the other group
    [2, 3]

    Takes: K experts a token, of one group; 2 D E operations a token.

    Source: Jiang et al., 2021, "SAM: Switch and Mixture routing" (Hetu's layer). The alignment is a mean over tokens, a
    sum there; groups are E / G experts, which the layer takes for G.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        num_groups: int | None = None,
        alignment: float = 1.0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        if num_groups is None:
            fits = [g for g in range(1, num_experts + 1) if num_experts % g == 0 and num_experts // g >= 2 * top_k]
            num_groups = max(fits, default=1)
        if num_groups < 1 or num_experts % num_groups or top_k > num_experts // num_groups:
            allowed = f"divide num_experts={num_experts} into groups of at least top_k={top_k}"
            raise ShapeError(word("num_groups", got=num_groups, allowed=allowed, where=_WHERE, fix="pass num_groups=1"))
        if not alignment >= 0:
            fix = "pass alignment=1.0, or 0.0 for none"
            raise UsageError(word("alignment", got=alignment, allowed="not be negative", where=_WHERE, fix=fix))
        self.num_groups, self.alignment = num_groups, alignment

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = self.logits(x_TD)
        score_TE = softmax(logit_TE)
        group_TG = score_TE.unflatten(1, (self.num_groups, -1)).sum(2)
        best_T1 = largest(group_TG, 1)
        of_E = torch.arange(self.num_experts, device=x_TD.device) // (self.num_experts // self.num_groups)
        inside_TE = of_E == best_T1
        index_TK = largest(score_TE.masked_fill(~inside_TE, -1.0), self.top_k)
        weight_TK = score_TE.gather(1, index_TK)
        routing = self.taken(index_TK, weight_TK, score_TE, logit_TE)
        if self.alignment == 0:
            return routing
        beaten_TE = (score_TE - weight_TK[:, -1:]).relu().masked_fill(inside_TE, 0.0)
        return dataclasses.replace(routing, penalty=self.alignment * beaten_TE.sum() / max(len(x_TD), 1))
