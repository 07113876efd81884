"""Rectify-Router: tokens that lost their place go to an expert on their own device, and free places to next choices."""

import dataclasses
import math

import torch
from torch import Tensor

from turnout.decide.token.gate import largest, refuse_capacity, softmax
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import UsageError, word
from turnout.types import Routing

__all__ = ["Rectify"]

_WHERE = "turnout.decide.token.Rectify"


class Rectify(LinearGate):
    """Top-k under a capacity, whose drops are made good on the token's own device, and whose free places are filled.

    p = softmax(W x); an expert has C = ceil(factor K T / E) places, given to first choices before second ones and
    within a rank to the larger p. *Fill-in*: the (K + 1)-th choices come last of all. *Intra-device*: a token with m <
    K places also goes to the best expert h of its device, for all it lacks: y = (sum of placed p_e E_e(x) + (K - m) p_h
    E_h(x)) / sg(sum of placed p_e + (K - m) p_h), sg stopping the gradient. So weights sum to 1 and still teach the
    router.

    The T tokens of a call lie on G devices in G ranges of equal length, and expert e on device e // (E / G). It suits
    experts that began as copies of one dense layer, any of which is better than none. With a capacity, who keeps a
    place depends on all tokens of the call, later ones too.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        devices: G, a divisor of E.
        capacity_factor: of C, above 0; None drops nothing.
        intra_device: whether tokens without their places go to an expert of their device.
        fill_in: whether free places go to (K + 1)-th choices.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: devices or capacity_factor out of range.

    >>> router = Rectify(1, 2, top_k=1, devices=2, fill_in=False)
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0], [0.0]]))
    >>> router(torch.tensor([[1.0], [2.0], [3.0], [1.5]])).dense().tolist()  # two have places
    [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]

    Takes: K experts a token, full experts made good on the same device; 2 D E operations a token.

    Source: Zeng et al., 2024, "Turn Waste into Worth: Rectifying Top-k Router of MoE". Within a rank their places go by
    the largest p of the token. ``wanted_E`` says whom the first K choices were, before anything was dropped or added.
    """

    sees_later_tokens = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        devices: int = 1,
        capacity_factor: float | None = 1.0,
        intra_device: bool = True,
        fill_in: bool = True,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        if devices < 1 or num_experts % devices:
            allowed = f"divide num_experts={num_experts}"
            raise UsageError(word("devices", got=devices, allowed=allowed, where=_WHERE, fix="pass devices=1"))
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            fix, allowed = "pass capacity_factor=1.0, or None to drop nothing", "be positive, or None"
            raise UsageError(word("capacity_factor", got=capacity_factor, allowed=allowed, where=_WHERE, fix=fix))
        self.devices, self.capacity_factor = devices, capacity_factor
        self.intra_device, self.fill_in = intra_device, fill_in

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = self.logits(x_TD)
        score_TE = softmax(logit_TE)
        index_TK = largest(score_TE, self.top_k)
        first = self.taken(index_TK, score_TE.gather(1, index_TK), score_TE, logit_TE)
        placed_TE = self._placed(first, score_TE)
        weight_TE = score_TE * placed_TE
        if self.intra_device and self.capacity_factor is not None:
            lacks_T = (self.top_k - placed_TE.sum(1)).clamp_min(0)
            here_T1 = self._best_here(score_TE)
            weight_TE = weight_TE.scatter_add(1, here_T1, lacks_T[:, None] * score_TE.gather(1, here_T1))
        tiny = torch.finfo(weight_TE.dtype).tiny
        weight_TE = weight_TE / weight_TE.detach().sum(1, keepdim=True).clamp_min(tiny)
        mask_TE = (placed_TE > 0) | (weight_TE.detach() > 0)
        routing = Routing.from_dense(weight_TE, mask_TE=mask_TE)
        routing = dataclasses.replace(routing, score_TE=score_TE, logit_TE=logit_TE)
        if self.capacity_factor is None:
            return routing
        return dataclasses.replace(routing, wanted_E=first.load_E, before=first.detach())

    def _placed(self, first: Routing, score_TE: Tensor) -> Tensor:
        """(T, E) 1 where a choice has a place."""
        if self.capacity_factor is None:
            kept = first
        else:
            refuse_capacity(self.capacity_factor)
            count, asked = len(score_TE), first
            if self.fill_in and self.top_k < self.num_experts:
                index_TK = largest(score_TE, self.top_k + 1)
                weight_TK = score_TE.gather(1, index_TK)
                asked = Routing.from_topk(index_TK, weight_TK, num_experts=self.num_experts)
            places = max(1, math.ceil(self.capacity_factor * self.top_k * count / self.num_experts))
            kept = asked.truncate(places, priority="rank")
        return dataclasses.replace(kept, weight_R=torch.ones_like(kept.weight_R.detach())).dense()

    def _best_here(self, score_TE: Tensor) -> Tensor:
        """(T, 1) the best expert of each token's device."""
        count, experts = score_TE.shape
        device_T = torch.arange(count, device=score_TE.device) * self.devices // max(count, 1)
        device_E = torch.arange(experts, device=score_TE.device) // (experts // self.devices)
        return largest(score_TE.masked_fill(device_T[:, None] != device_E, -1.0), 1)
