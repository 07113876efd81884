"""The central class: paths, a policy that chooses among them, and a backend that runs the choice."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.expects import POLICY, expect
from turnout.layers.told import about
from turnout.layers.told import real as padding
from turnout.paths import every
from turnout.types import Routing, spread
from turnout.types.called import Called
from turnout.wrappers import unwrapped

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


class Turnout(Called):
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

    def __init__(self, paths: nn.Module, policy: nn.Module, *, backend: str = "auto") -> None:
        super().__init__()
        expect("paths", paths, nn.Module, "turnout.layers.Turnout")
        expect("policy", policy, POLICY, "turnout.layers.Turnout")
        self.paths, self.policy, self.backend = paths, policy, backend

    def forward(
        self,
        x: Tensor,
        *,
        token_id: Tensor | None = None,
        generator: torch.Generator | None = None,
        real: Tensor | None = None,
    ) -> Routed:
        """The output, in x's shape and dtype, and the routing of the flattened tokens, or of the sequences.

        Args:
            x: (..., D).
            token_id: (...), for policies that look at the token itself.
            generator: for policies that draw.
            real: (...) bool, false at padding, about which nothing is decided; None leaves it to what
                ``turnout.layers.given`` says.

        Raises:
            ShapeError: token_id or real does not fit x.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        if hasattr(unwrapped(self.policy), "parts"):
            found = about(x)
            if real is not None:
                found = dataclasses.replace(found, keep_T=_fitting("real", real, x))
            routing = self.policy(x_TD, given=found, generator=generator)
            y_TD = self.paths.merged(x_TD, routing, found.sequence_T)  # pyrefly: ignore[not-callable]
            return Routed(y_TD.view(x.shape), routing)
        routing = decide(self.policy, x, token_id, generator, real, experts=self.paths)
        return Routed(self.paths(x_TD, routing, backend=self.backend).view(x.shape), routing)

    def extra_repr(self) -> str:
        """The backend, for printing."""
        return f"backend={self.backend!r}"


def decide(
    policy: nn.Module,
    x: Tensor,
    token_id: Tensor | None,
    generator: torch.Generator | None,
    real: Tensor | None = None,
    *,
    carry_TX: Tensor | None = None,
    experts: nn.Module | None = None,
) -> Routing:
    """The policy's routing of the flattened tokens of x; rows of padding, where ``real`` is false, are empty.

    The policy never sees padding, so what is chosen, drawn, counted and dropped is as if there were none. It is told
    what it says that it needs: with ``needs_given`` what is known of the sequences, with ``needs_carry`` what the
    router of the routed layer before carried on, with ``needs_experts`` a function that gives what every expert makes
    of tokens, (T, D) -> (T, E, D).
    """
    x_TD, asked = x.reshape(-1, x.shape[-1]), unwrapped(policy)
    ids_T = None if token_id is None else _fitting("token_id", token_id, x)
    real_T = padding(x) if real is None else _fitting("real", real, x).to(x.device).bool()
    known: dict[str, Any] = {"token_id_T": ids_T, "generator": generator}
    if getattr(asked, "needs_carry", False):
        known["carry_TX"] = carry_TX
    if real_T is not None:
        x_TD = x_TD[real_T]
        known |= {name: known[name][real_T] for name in ("token_id_T", "carry_TX") if known.get(name) is not None}
    if getattr(asked, "needs_given", False):
        known["given"] = dataclasses.replace(about(x), keep_T=real_T).tokens()
    if getattr(asked, "needs_experts", False):
        if experts is None:
            allowed, fix = "be where the router is asked, which runs them", "put the router into a turnout.layers.MoE"
            raise UsageError(word("the experts", got=None, allowed=allowed, where="turnout.layers", fix=fix))
        known["experts"] = functools.partial(every, experts)
    routing = policy(x_TD, **known)
    return routing if real_T is None else spread(routing, real_T)


def _fitting(name: str, value: Tensor, x: Tensor) -> Tensor:
    """(T,) what is said of each token of x."""
    if value.shape != x.shape[:-1]:
        raise ShapeError(
            word(
                name,
                got=f"shape {tuple(value.shape)}",
                allowed=f"have the shape {tuple(x.shape[:-1])} of x without its last axis",
                where="turnout.layers",
                fix="pass what belongs to the same tokens",
            )
        )
    return value.reshape(-1)
