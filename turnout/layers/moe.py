"""The mixture-of-experts layer of a transformer: routed experts, and shared ones that are always on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.expects import POLICY, expect
from turnout.layers.turnout import Routed, decide
from turnout.paths import (
    Bank,
    FactoredBank,
    FeedForward,
    Mixed,
    OffloadedBank,
    PackedBank,
    PackedFeedForward,
    ZeroComputation,
)
from turnout.run.product import linear
from turnout.types import Routing
from turnout.types.called import Called
from turnout.types.invariant import alike
from turnout.types.weights import Activation
from turnout.wrappers import unwrapped

__all__ = ["MoE"]

_KINDS = {"constant": 0, "copy": 0, "zero": 0}


class MoE(Called):
    """Routed experts plus, if wanted, a shared expert: y = sum_e g_e(x) expert_e(x) + s(x) shared(x).

    s(x) is 1, or sigmoid(x @ w) with ``shared_gate``.

    Args:
        width: D, of the tokens.
        hidden: F, of each routed expert.
        num_experts: E.
        router: the policy, with the same width and number of experts; None where each call is given its routing.
        activation: as in ``turnout.paths.Bank``.
        bias: whether both products of every expert, the shared one too, add a bias.
        shared_hidden: F of the shared expert, or None for no shared expert.
        shared_gate: whether the shared expert is scaled by a learned sigmoid.
        distinct: how many different experts the bank holds, where several of the router's share their weights: expert e
            of the router is expert ``label_E[e]`` of the bank. None for num_experts.
        factored: further keywords of ``turnout.paths.FactoredBank``, which then takes the place of the ``Bank``.
        packs: further keywords of ``turnout.paths.PackedBank``, whose experts are in few bits.
        shared_packs: the same for the shared expert, a ``PackedFeedForward`` then.
        zero_computation: keywords of ``turnout.paths.ZeroComputation``, whose experts come after the E; the router
            chooses among all of them.
        backend: the name of an executor in ``turnout.run``, or "auto".
        std: standard deviation of the normal distribution that the weights start from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: the router is of another width or number of experts.
        UsageError: a gate without a shared expert, a size below 1, or an unknown activation.

    >>> import torch
    >>> from torch import nn
    >>> from turnout.types import Routing
    >>> class Even(nn.Module):
    ...     def forward(self, x_TD, *, token_id_T=None, generator=None):
    ...         return Routing.from_topk(torch.arange(len(x_TD))[:, None] % 4, torch.ones(len(x_TD), 1), num_experts=4)
    >>> MoE(8, 16, 4, router=Even(), shared_hidden=16)(torch.zeros(2, 6, 8)).routing.load_E.tolist()
    [3, 3, 3, 3]

    Source: Shazeer et al., 2017, "Outrageously Large Neural Networks"; shared experts as Dai et al., 2024,
    "DeepSeekMoE"; the sigmoid on them as Qwen Team, 2024, "Qwen1.5-MoE".
    """

    label_E: Tensor | None

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        *,
        router: nn.Module | None,
        activation: Activation = "swiglu",
        bias: bool = False,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        distinct: int | None = None,
        factored: Mapping[str, int] | None = None,
        packs: dict[str, Any] | None = None,
        shared_packs: dict[str, Any] | None = None,
        zero_computation: Mapping[str, int] | None = None,
        backend: str = "auto",
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        expect("router", router, POLICY, "turnout.layers.MoE")
        if shared_gate and shared_hidden is None:
            raise UsageError(
                word(
                    "shared_gate",
                    got=True,
                    allowed="go with a shared expert",
                    where="turnout.layers.MoE",
                    fix="pass shared_hidden, or shared_gate=False",
                )
            )
        free = None
        if zero_computation is not None:
            kinds: dict[str, Any] = _KINDS | dict(zero_computation)
            free = ZeroComputation(width, **kinds, std=std, generator=generator)
        _fits(router, width, num_experts + (0 if free is None else free.num_experts))
        self.router, self.backend = router, backend
        held = num_experts if distinct is None else distinct
        sizes, start = {"activation": activation, "bias": bias}, {"std": std, "generator": generator}
        self.bank: Bank | FactoredBank | Mixed | PackedBank | OffloadedBank
        if packs is not None:
            self.bank = PackedBank(held, width, hidden, packs=packs, **sizes)
        else:
            kind, more = (Bank, {}) if factored is None else (FactoredBank, factored)
            self.bank = kind(held, width, hidden, **more, **sizes, **start)
        if free is not None:
            self.bank = Mixed([self.bank, free])
        self.register_buffer("label_E", None if distinct is None else torch.arange(num_experts) % distinct)
        self.shared = self.shared_gate = None
        if shared_hidden is not None:
            self.shared = feed_forward(width, shared_hidden, packs=shared_packs, **sizes, **start)
        if shared_gate:
            self.shared_gate = nn.Parameter(torch.empty(1, width).normal_(0, std, generator=generator))

    def forward(
        self,
        x: Tensor,
        *,
        token_id: Tensor | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
        routing: Routing | None = None,
        real: Tensor | None = None,
        carry_TX: Tensor | None = None,
    ) -> Routed:
        """The output, in x's shape and dtype, and the routing of the flattened tokens.

        Args:
            x: (..., D).
            token_id: (...), for routers that look at the token itself.
            generator: for routers that draw.
            backend: the name of an executor for this call; "auto" leaves it to the layer's own ``backend``.
            routing: of the flattened tokens, decided elsewhere; None asks the layer's router.
            real: (...) bool, false at padding, about which nothing is decided; None leaves it to what
                ``turnout.layers.given`` says. Where a routing is given, that says it.
            carry_TX: (T, X) ``Routing.carry_TX`` of the routed layer before, for routers that need it.

        Raises:
            ShapeError: token_id or real does not fit x.
            UsageError: the layer has no router, and no routing is given.
        """
        if routing is None:
            routing = self.route(x, token_id=token_id, generator=generator, real=real, carry_TX=carry_TX)
        held = routing if self.label_E is None else routing.relabel(self.label_E, self.bank.num_experts)
        y = self.bank(x.reshape(-1, x.shape[-1]), held, backend=self.backend if backend == "auto" else backend)
        y, always = y.view(x.shape), self.always(x)
        return Routed(y if always is None else y + always.to(y.dtype), routing)

    def route(
        self,
        x: Tensor,
        *,
        token_id: Tensor | None = None,
        generator: torch.Generator | None = None,
        real: Tensor | None = None,
        carry_TX: Tensor | None = None,
    ) -> Routing:
        """What the layer's router says of the flattened tokens; arguments as in ``forward``.

        Raises:
            ShapeError: token_id or real does not fit x.
            UsageError: the layer has no router.
        """
        if self.router is None:
            allowed, fix = "be given to a layer without a router", "pass routing=..., or build it with a router"
            raise UsageError(word("routing", got=None, allowed=allowed, where="turnout.layers.MoE", fix=fix))
        return decide(self.router, x, token_id, generator, real, carry_TX=carry_TX, experts=self.bank)

    def always(self, x: Tensor) -> Tensor | None:
        """(..., D) what the shared expert makes of x, under its gate; None without one."""
        if self.shared is None:
            return None
        always = self.shared(x)
        if self.shared_gate is None:
            return always
        return always * alike(torch.sigmoid, linear(x, self.shared_gate), "turnout.layers.MoE")

    def extra_repr(self) -> str:
        """The backend, for printing."""
        return f"backend={self.backend!r}"


def _fits(router: nn.Module | None, width: int, count: int) -> None:
    """Refuses a router of another width or number of experts."""
    asked = None if router is None else unwrapped(router)
    of = getattr(asked, "width", width), getattr(asked, "num_experts", count)
    if of != (width, count):
        got, allowed = f"width {of[0]} and {of[1]} experts", f"have width {width} and {count} experts"
        fix = f"build it with ({width}, {count})"
        raise ShapeError(word("the router", got=got, allowed=allowed, where="turnout.layers.MoE", fix=fix))


def feed_forward(
    width: int,
    hidden: int,
    *,
    packs: dict[str, Any] | None,
    activation: Activation,
    bias: bool,
    std: float,
    generator: torch.Generator | None,
) -> Any:
    """A ``FeedForward``, or a ``PackedFeedForward`` where it is said how; typed as neither, as ``projection``."""
    if packs is not None:
        return PackedFeedForward(width, hidden, packs=packs, activation=activation, bias=bias)
    return FeedForward(width, hidden, activation=activation, bias=bias, std=std, generator=generator)
