"""A bank of experts with factored matrices: low-rank plus some rows, a factor shared by several experts."""

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, nearest, word
from turnout.run import activate, factored, factored_reference, written_out
from turnout.run.ranks.exchange import own_part
from turnout.run.ranks.expert_parallel import Owners, spread_rows
from turnout.types import Cost, ExpertWeights, FactoredWeights, Routing
from turnout.types.called import Called
from turnout.types.weights import GATED, Activation

__all__ = ["FactoredBank"]

_WHERE = "turnout.paths.FactoredBank"


class FactoredBank(Called):
    """E feed-forward experts each of whose matrices is W = L R + S: a product of two thin ones, and a few rows.

    Gate, value and down are factored one by one. The factor beside the width (R of gate and value, L of down) is shared
    by ``share`` neighbouring experts; S is zero but in the rows that the buffers ``up_row`` and ``down_row`` name.

    Args:
        num_experts: E, at least 1.
        width: D, of the tokens.
        hidden: F, of each expert.
        up_rank: of gate and of value, 0 for S alone.
        down_rank: of down, 0 for S alone.
        share: how many experts share a factor, at least 1.
        up_rows: how many rows S has over all gates and values.
        down_rows: how many over all down matrices.
        activation: as in ``Bank``.
        bias: whether both products add a bias (started at zero).
        std: standard deviation of what the weights start from: products of the factors have it, and rows.
        generator: where the chance comes from; torch's default when None.

    Which rows S has is for the caller to set, ascending; they start as the first ones.

    Raises:
        UsageError: a size that is too small, more rows than there are, or an unknown activation.

    >>> bank = FactoredBank(4, width=8, hidden=16, up_rank=3, down_rank=2, share=4, up_rows=5)
    >>> tuple(bank.up_in.shape), tuple(bank.up_out.shape), tuple(bank.down_in.shape), tuple(bank.down_out.shape)
    ((1, 6, 8), (4, 32, 3), (4, 2, 16), (1, 8, 2))

    Source: Li et al., 2024, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", with
    the form of Li et al., 2023, "LoSparse"; Liu et al., 2025, "Mixture of Latent Experts", for the shared factor. One
    module holds both: the latter is without rows, the former without sharing.
    """

    up_row: Tensor
    down_row: Tensor

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        up_rank: int,
        down_rank: int,
        share: int = 1,
        up_rows: int = 0,
        down_rows: int = 0,
        activation: Activation = "swiglu",
        bias: bool = False,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.width, self.hidden, self.activation = num_experts, width, hidden, activation
        self.share, self.parts = share, 2 if activation in GATED else 1
        self.owners: Owners | None = None  # who holds which experts, where processes share them
        high = hidden * self.parts
        most = {"up_rows": num_experts * high, "down_rows": num_experts * width}
        for name, least in (("num_experts", 1), ("width", 1), ("hidden", 1), ("up_rank", 0), ("down_rank", 0),
                            ("share", 1), ("up_rows", 0), ("down_rows", 0)):  # fmt: skip
            size = locals()[name]
            if not least <= size <= most.get(name, size):
                allowed = f"be at least {least}" + (f" and at most {most[name]}" if name in most else "")
                raise UsageError(word(name, got=size, allowed=allowed, where=_WHERE, fix=f"pass {name}={least}"))
        activate(torch.empty(0, 2), activation)
        groups = -(-num_experts // share)

        def drawn(*shape: int, rank: int = 1) -> nn.Parameter | None:
            spread = std**0.5 / rank**0.25 if rank else 0.0  # of a product of two, summed over the rank: std
            return nn.Parameter(torch.empty(shape).normal_(0, spread, generator=generator)) if rank else None

        self.up_in = drawn(groups, self.parts * up_rank, width, rank=up_rank)
        self.up_out = drawn(num_experts, high, up_rank, rank=up_rank)
        self.down_in = drawn(num_experts, down_rank, hidden, rank=down_rank)
        self.down_out = drawn(groups, width, down_rank, rank=down_rank)
        self.up_rest = nn.Parameter(torch.empty(up_rows, width).normal_(0, std, generator=generator))
        self.down_rest = nn.Parameter(torch.empty(down_rows, hidden).normal_(0, std, generator=generator))
        self.register_buffer("up_row", torch.arange(up_rows))
        self.register_buffer("down_row", torch.arange(down_rows))
        self.up_bias = nn.Parameter(torch.zeros(num_experts, high)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, width)) if bias else None

    def weights(self) -> FactoredWeights:
        """The factors and rows as executors see them; where processes share the experts, of those here."""
        of = (self.up_in, self.up_out, self.down_in, self.down_out, self.up_row, self.up_rest, self.down_row,
                self.down_rest, self.up_bias, self.down_bias)  # fmt: skip
        return FactoredWeights(
            *(None if tensor is None else own_part(tensor) for tensor in of),  # pyrefly: ignore[bad-argument-type]
            num_experts=self.num_experts if self.owners is None else self.owners.slots,
            share=self.share,
            activation=self.activation,
        )

    def written_out(self) -> ExpertWeights:
        """The same experts with every matrix written out."""
        return written_out(self.weights())

    def forward(self, x_TD: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        """(T, D), each token's weighted sum of its experts' outputs.

        Args:
            x_TD: (T, D), the tokens.
            routing: which experts each takes, and with what weight.
            backend: "auto" and "factored" run the factors; "reference" writes every matrix out first.

        Raises:
            UnknownNameError: another executor; those of ``turnout.run`` take whole matrices.
        """
        if backend not in ("auto", "factored", "reference"):
            raise nearest(backend, ("auto", "factored", "reference"), kind="backend", where=_WHERE)
        run = factored_reference if backend == "reference" else factored
        if self.owners is not None:
            weights = self.weights()
            return spread_rows(x_TD, routing, self.owners, lambda row_ND, own: run(row_ND, own, weights))
        return run(x_TD, routing, self.weights())

    def cost(self, tokens: int, entries: float) -> Cost:
        """What a forward pass over ``tokens`` tokens with ``entries`` routed entries takes (products only).

        A token is taken to meet as many groups as it takes experts, or all where these are fewer. Rows of S are taken
        to lie evenly on the experts.
        """
        params = sum(parameter.numel() for parameter in self.parameters())
        per_token = entries / max(tokens, 1)
        groups = -(-self.num_experts // self.share)
        met = min(per_token, groups) / groups
        shared = sum(factor.numel() for factor in (self.up_in, self.down_out) if factor is not None)
        biases = sum(bias.numel() for bias in (self.up_bias, self.down_bias) if bias is not None)
        own = params - shared
        used = per_token / self.num_experts
        active = met * shared + used * own
        return Cost(params, round(active), flops=2.0 * tokens * (active - used * biases))

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        ranks = [0 if factor is None else factor.shape[at] for factor, at in ((self.up_out, 2), (self.down_in, 1))]
        rows = f"up_rows={len(self.up_row)}, down_rows={len(self.down_row)}"
        sizes = f"{self.num_experts}, width={self.width}, hidden={self.hidden}"
        return f"{sizes}, up_rank={ranks[0]}, down_rank={ranks[1]}, share={self.share}, {rows}"
