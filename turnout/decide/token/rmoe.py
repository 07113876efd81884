"""RMoE: a router that remembers what the routers of the layers before made of the token."""

import dataclasses

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, largest, linear, softmax
from turnout.errors import ShapeError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["RMoE"]


class RMoE(Called):
    """Top-k by what a recurrent cell, run over the layers, holds of the token.

    z = P x; h = GRU(z, h of the routed layer before), 0 in the first; p = softmax(W h); g_e = p_e for the k largest,
    over their sum. h is of one token and flows from layer to layer, never from token to token: it is causal, and needs
    no cache. P and W are each layer's own; the cell is one for all layers of a model (``share``).

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        hidden: of z and h.
        std: standard deviation of the normal distribution that P, W and the cell's maps start from; its biases at 0.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.

    >>> first, second = RMoE(4, 8, hidden=6), RMoE(4, 8, hidden=6)
    >>> second.share(first.cell)
    >>> x_TD = torch.randn(3, 4)
    >>> second(x_TD, carry_TX=first(x_TD).carry_TX).carry_TX.shape
    torch.Size([3, 6])

    Takes: K experts a token; 2 D H + 12 H^2 + 2 H E operations a token.

    Source: Qiu et al., 2024, "Layerwise Recurrent Router for Mixture-of-Experts". Their release leaves P and W
    uninitialised; hidden is 256 there.
    """

    needs_carry = True
    cell: nn.GRUCell

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        hidden: int = 64,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("RMoE", width, num_experts, top_k, None)
        if hidden < 1:
            where = "turnout.decide.token.RMoE"
            raise ShapeError(word("hidden", got=hidden, allowed="be at least 1", where=where, fix="pass hidden=64"))
        self.width, self.num_experts, self.top_k, self.hidden = width, num_experts, top_k, hidden
        self.projection = nn.Parameter(torch.empty(hidden, width).normal_(0, std, generator=generator))
        self.gate = nn.Parameter(torch.empty(num_experts, hidden).normal_(0, std, generator=generator))
        self.cell = nn.GRUCell(hidden, hidden)
        with torch.no_grad():
            for name, parameter in self.cell.named_parameters():
                parameter.zero_() if "bias" in name else parameter.normal_(0, std, generator=generator)

    def share(self, cell: nn.GRUCell) -> None:
        """Takes another router's cell in the place of its own, which then stands in that one's ``state_dict`` alone."""
        del self._modules["cell"]
        object.__setattr__(self, "cell", cell)

    def forward(
        self,
        x_TD: Tensor,
        *,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        carry_TX: Tensor | None = None,
    ) -> Routing:
        """The routing of these tokens, which carries h on; ``token_id_T`` and ``generator`` are not used.

        Args:
            x_TD: (T, D) tokens.
            token_id_T: not used.
            generator: not used.
            carry_TX: (T, hidden) h of the routed layer before; None in the first.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        z_TP = linear(x_TD, self.projection)
        before_TP = z_TP.new_zeros(z_TP.shape) if carry_TX is None else carry_TX.to(z_TP.dtype)
        hidden_TP = self._cell(z_TP, before_TP)
        logit_TE = linear(hidden_TP, self.gate)
        score_TE = softmax(logit_TE)
        index_TK = largest(score_TE, self.top_k)
        weight_TK = score_TE.gather(1, index_TK)
        tables = {"score_TE": score_TE, "logit_TE": logit_TE}
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        routing = Routing.from_topk(index_TK, weight_TK, num_experts=self.num_experts, **tables)
        return dataclasses.replace(routing, carry_TX=hidden_TP)

    def _cell(self, z_TP: Tensor, before_TP: Tensor) -> Tensor:
        """nn.GRUCell, in fp32 at least whatever its weights and autocast are."""
        cell = self.cell
        r_z_n_T3P = linear(z_TP, cell.weight_ih, cell.bias_ih).chunk(3, 1)
        r_z_n_T3H = linear(before_TP, cell.weight_hh, cell.bias_hh).chunk(3, 1)
        reset_TP, update_TP = ((a + b).sigmoid() for a, b in zip(r_z_n_T3P[:2], r_z_n_T3H[:2], strict=True))
        new_TP = (r_z_n_T3P[2] + reset_TP * r_z_n_T3H[2]).tanh()
        return (1 - update_TP) * new_TP + update_TP * before_TP

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, hidden={self.hidden}"
