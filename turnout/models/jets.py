"""Whole networks as experts: a gate on the features of a frozen one says which of them answers an example."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from turnout.decide.token import FedJETs
from turnout.errors import ShapeError, word
from turnout.types.called import Called

__all__ = ["Jets"]


class Jets(Called):
    """Networks with the same outputs, and a gate that chooses among them for each example; only the chosen run.

    y = sum_e g_e expert_e(x), over the experts that the gate takes.

    Args:
        common: the frozen network: from a batch to features (B, D). It is never trained.
        experts: from a batch to (B, O) each.
        gate: of as many experts, on D features.

    Raises:
        ShapeError: a gate of another number of experts.

    >>> jets = Jets(nn.Identity(), [nn.Linear(4, 3), nn.Linear(4, 3)], FedJETs(4, 2))
    >>> jets(torch.zeros(5, 4)).shape
    torch.Size([5, 3])

    Source: Dun et al., 2023, "FedJETs: Efficient Just-In-Time Personalization with Federated Mixture of Experts".
    """

    def __init__(self, common: nn.Module, experts: Sequence[nn.Module], gate: FedJETs) -> None:
        super().__init__()
        if gate.num_experts != len(experts):
            got, allowed = f"{len(experts)} and a gate of {gate.num_experts}", "be as many as the gate has"
            fix, where = "build the gate for them", "turnout.models.jets.Jets"
            raise ShapeError(word("experts", got=got, allowed=allowed, where=where, fix=fix))
        self.common = common.requires_grad_(False).eval()
        self.experts, self.gate = nn.ModuleList(experts), gate

    def forward(self, x: Tensor, *, among: Tensor | None = None) -> Tensor:
        """(B, O) what the chosen experts give; ``among`` (K,) are the experts of a client, as for the gate."""
        routing = self.gate(self.features(x), among=among)
        parts, start = [], 0
        for expert, load in zip(self.experts, routing.load_E.tolist(), strict=True):
            if load:
                rows = slice(start, start + load)
                y_RO = expert(x[routing.token_R[rows]])
                parts.append(y_RO * routing.weight_R[rows, None].to(y_RO.dtype))
                start += load
        y_RO = torch.cat(parts)
        return y_RO.new_zeros(len(x), y_RO.shape[1]).index_add(0, routing.token_R, y_RO)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(B, D) what the common network sees."""
        return self.common(x)

    def assign(self, x: Tensor, keep: int) -> Tensor:
        """(keep,) the experts for a client with these examples, which need no labels: just-in-time personalisation."""
        return self.gate.assign(self.features(x), keep)

    def train(self, mode: bool = True) -> "Jets":
        """The common network stays in evaluation mode."""
        super().train(mode)
        self.common.eval()
        return self
