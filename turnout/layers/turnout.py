"""The central class: paths, a policy that chooses among them, and a backend that runs the choice."""

import dataclasses

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, word
from turnout.expects import POLICY, expects
from turnout.layers.adapter import about
from turnout.types import Routing

__all__ = ["Routed", "Turnout"]


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """What a routed layer gives: its output, and the decision it took.

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[0]]), torch.ones(1, 1), num_experts=2)
    >>> Routed(torch.zeros(1, 8), routing).routing.load_E.tolist()
    [1, 0]

    Source: none; plain bookkeeping.
    """

    output: Tensor
    routing: Routing


class Turnout(nn.Module):
    """Sends every token down the paths that a policy chooses, and sums what comes back.

    Args:
        paths: the paths; called as ``paths(x_TD, routing, backend=...)``, for example ``turnout.paths.Bank``.
        policy: the router; called as ``policy(x_TD, token_id_T=..., generator=...)``, gives a Routing. One with the
            attribute ``parts`` decides for sequences (``SequenceRouter``): ``paths.merged`` runs one average expert.
        backend: the name of an executor in ``turnout.run``, or "auto".

    >>> import torch
    >>> from torch import nn
    >>> from turnout.paths import Bank
    >>> class First(nn.Module):
    ...     def forward(self, x_TD, *, token_id_T=None, generator=None):
    ...         T = len(x_TD)
    ...         return Routing.from_topk(torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1), num_experts=2)
    >>> routed = Turnout(Bank(2, width=8, hidden=4), First())(torch.zeros(3, 5, 8))
    >>> routed.output.shape, routed.routing.num_tokens
    (torch.Size([3, 5, 8]), 15)

    Source: Shazeer et al., 2017, "Outrageously Large Neural Networks"; any policy and any paths may be put in.
    """

    @expects(paths=nn.Module, policy=POLICY)
    def __init__(self, paths: nn.Module, policy: nn.Module, *, backend: str = "auto") -> None:
        super().__init__()
        self.paths, self.policy, self.backend = paths, policy, backend

    def forward(self, x: Tensor, *, token_id: Tensor | None = None, generator: torch.Generator | None = None) -> Routed:
        """The output, in x's shape and dtype, and the routing of the flattened tokens, or of the sequences.

        Args:
            x: (..., D).
            token_id: (...), for policies that look at the token itself.
            generator: for policies that draw.

        Raises:
            ShapeError: token_id does not fit x.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        if hasattr(self.policy, "parts"):
            found = about(x)
            routing = self.policy(x_TD, given=found, generator=generator)
            y_TD = self.paths.merged(x_TD, routing, found.sequence_T)  # pyrefly: ignore[not-callable]
            return Routed(y_TD.view(x.shape), routing)
        routing = decide(self.policy, x, token_id, generator)
        return Routed(self.paths(x_TD, routing, backend=self.backend).view(x.shape), routing)

    def extra_repr(self) -> str:
        """The backend, for printing."""
        return f"backend={self.backend!r}"


def decide(policy: nn.Module, x: Tensor, token_id: Tensor | None, generator: torch.Generator | None) -> Routing:
    """The policy's routing of the flattened tokens of x."""
    if token_id is not None and token_id.shape != x.shape[:-1]:
        raise ShapeError(
            word(
                "token_id",
                got=f"shape {tuple(token_id.shape)}",
                allowed=f"have the shape {tuple(x.shape[:-1])} of x without its last axis",
                where="turnout.layers",
                fix="pass the ids of the same tokens",
            )
        )
    flat = None if token_id is None else token_id.reshape(-1)
    known = {"given": about(x)} if getattr(policy, "needs_given", False) else {}
    return policy(x.reshape(-1, x.shape[-1]), token_id_T=flat, generator=generator, **known)
