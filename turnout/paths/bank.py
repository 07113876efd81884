"""Feed-forward paths: a bank of experts with stacked weights, and the dense one that is always on."""

from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.paths.layout import align_fused_optimizers
from turnout.paths.low_rank import LowRank
from turnout.run import activate, execute, merged
from turnout.run.product import linear
from turnout.run.ranks.exchange import own_part
from turnout.run.ranks.expert_parallel import Owners, expert_parallel
from turnout.types import Cost, ExpertWeights, Routing
from turnout.types.called import Called
from turnout.types.weights import GATED, Activation

__all__ = ["Bank", "FeedForward"]


def _check(where: str, activation: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(word(name, got=size, allowed="be at least 1", where=where, fix=f"pass {name}=1 or more"))
    activate(torch.empty(0, 2), activation)


class Bank(Called):
    """E feed-forward experts of the same shape, with their weights stacked.

    Expert e maps x to act(x @ up_EDH[e] + up_bias[e]) @ down_EFD[e] + down_bias[e]; with a gated activation the up
    product is twice as wide, all gates first.

    Args:
        num_experts: E, at least 1.
        width: D, of the tokens.
        hidden: F, of each expert.
        activation: "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai" (gated), "gelu", "gelu_tanh", "relu" or
            "silu".
        bias: whether both products add a bias (started at zero).
        std: standard deviation of the normal distribution that the weights start from.
        generator: where the chance comes from; torch's default when None.

    Raises:
        UsageError: a size below 1, or an unknown activation.

    >>> bank = Bank(4, width=8, hidden=16)
    >>> tuple(bank.up_EDH.shape), tuple(bank.down_EFD.shape)
    ((4, 8, 32), (4, 16, 8))

    Source: Shazeer et al., 2017, "Outrageously Large Neural Networks"; gated as Shazeer, 2020, "GLU Variants Improve
    Transformer". We stack the weights and keep gate and value in one product.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check("turnout.paths.Bank", activation, num_experts=num_experts, width=width, hidden=hidden)
        self.num_experts, self.width, self.hidden, self.activation = num_experts, width, hidden, activation
        self.owners: Owners | None = None  # who holds which experts, where processes share them
        wide = hidden * (2 if activation in GATED else 1)
        # Stored (out, in), as nn.Linear and most checkpoints.
        self.up = nn.Parameter(torch.empty(num_experts, wide, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(num_experts, wide)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, width)) if bias else None
        with torch.no_grad():
            for stack in (self.up, self.down):
                # A view draws other numbers than a whole tensor: these are the ones that seeds have always given.
                stack.transpose(1, 2).normal_(0, std, generator=generator)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"owners": None} | state  # one that was pickled before there was this
        turned = state.pop("turned", ())  # and one whose memory was (in, out), of either shape
        super().__setstate__(state)
        for stack in (self.up, self.down):
            if turned or not stack.is_contiguous():
                align_fused_optimizers()  # one may have been pickled beside it
                stack.data = (stack.data.transpose(1, 2) if turned else stack.data).contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stacks = [state_dict.get(f"{prefix}{name}") for name in ("up", "down")]
        if any(isinstance(stack, Tensor) and not stack.is_contiguous() for stack in stacks):
            align_fused_optimizers()  # of 0.1, as an optimizer's state beside it will be
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def up_EDH(self) -> Tensor:
        """(E, D, H), a view of ``up`` in logical order whatever the storage is; writing to it writes the parameter."""
        return own_part(self.up).transpose(1, 2)

    @property
    def down_EFD(self) -> Tensor:
        """(E, F, D), a view of ``down`` in logical order whatever the storage is."""
        return own_part(self.down).transpose(1, 2)

    def weights(self) -> ExpertWeights:
        """The experts as executors see them."""
        biases = (None if bias is None else own_part(bias) for bias in (self.up_bias, self.down_bias))
        return ExpertWeights(self.up_EDH, self.down_EFD, *biases, activation=self.activation)

    def forward(self, x_TD: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        """(T, D), each token's weighted sum of its experts' outputs.

        Args:
            x_TD: (T, D), the tokens.
            routing: which experts each takes, and with what weight.
            backend: an executor's name, or "auto".
        """
        if self.owners is not None:
            return expert_parallel(x_TD, routing, self.weights(), self.owners, backend=backend)
        return execute(x_TD, routing, self.weights(), backend=backend)

    def merged(self, x_TD: Tensor, routing: Routing, sequence_T: Tensor) -> Tensor:
        """(T, D), each token through the average of the experts that its sequence takes; see ``turnout.run.merged``.

        Raises:
            UsageError: other processes hold some of the experts.
        """
        if self.owners is not None:
            got, allowed = "experts on other processes", "be here, all of them, to be averaged"
            raise UsageError(word("a bank", got=got, allowed=allowed, where="Bank.merged", fix="train it with ep=1"))
        return merged(x_TD, routing, self.weights(), sequence_T)

    def cost(self, tokens: int, entries: float) -> Cost:
        """What a forward pass over ``tokens`` tokens with ``entries`` routed entries takes (products only)."""
        each = sum(parameter[0].numel() for parameter in self.parameters())
        products = self.up[0].numel() + self.down[0].numel()
        return Cost(
            params=each * self.num_experts,
            params_active=round(each * entries / max(tokens, 1)),
            flops=2.0 * entries * products,
        )

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.num_experts}, width={self.width}, hidden={self.hidden}, activation={self.activation!r}"


class FeedForward(Called):
    """The dense feed-forward layer: x -> act(x @ up + up_bias) @ down + down_bias. Also the shared expert.

    Args:
        width: D, of the tokens.
        hidden: F.
        activation: as in ``Bank``.
        bias: whether both products add a bias (started at zero).
        std: standard deviation of the normal distribution that the weights start from.
        generator: where the chance comes from; torch's default when None.

    Raises:
        UsageError: a size below 1, or an unknown activation.

    >>> FeedForward(8, 16)(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 3, 8])

    Source: Shazeer, 2020, "GLU Variants Improve Transformer". We keep gate and value in one product.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check("turnout.paths.FeedForward", activation, width=width, hidden=hidden)
        self.width, self.hidden, self.activation = width, hidden, activation
        wide = hidden * (2 if activation in GATED else 1)
        # Stored (out, in), as nn.Linear.
        self.up = nn.Parameter(torch.empty(wide, width).normal_(0, std, generator=generator))
        self.down = nn.Parameter(torch.empty(width, hidden).normal_(0, std, generator=generator))
        self.up_bias = nn.Parameter(torch.zeros(wide)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(width)) if bias else None
        # Of low rank, beside ``up`` and ``down`` while these stay as they are.
        self.up_added: LowRank | None = None
        self.down_added: LowRank | None = None

    @property
    def up_DH(self) -> Tensor:
        """(D, H), a view of ``up`` in the order of ExpertWeights."""
        return self.up.t()

    @property
    def down_FD(self) -> Tensor:
        """(F, D), a view of ``down`` in the order of ExpertWeights."""
        return self.down.t()

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) from (..., D)."""
        wide = linear(x, self.up, self.up_bias)
        wide = wide if self.up_added is None else wide + self.up_added(x)
        hidden = activate(wide, self.activation)
        y = linear(hidden, self.down, self.down_bias)
        return y if self.down_added is None else y + self.down_added(hidden)

    def cost(self, tokens: int) -> Cost:
        """What a forward pass over ``tokens`` tokens takes (products only)."""
        params = sum(parameter.numel() for parameter in self.parameters())
        products = self.up.numel() + self.down.numel()
        return Cost(params=params, params_active=params, flops=2.0 * tokens * products)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"width={self.width}, hidden={self.hidden}, activation={self.activation!r}"
