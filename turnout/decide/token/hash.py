"""Hash: the token's id decides, and nothing is learned."""

import math

import torch
from torch import Tensor

from turnout.decide.token.gate import check, check_tokens, limit
from turnout.errors import UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["Hash"]

_LOW = 0xFFFFFFFF


class Hash(Called):
    """Each token id has its k experts once and for all, picked by a seeded hash, each with weight 1 / k.

    e_j = (h(id) + j s(id)) mod E for j < k; h is the 32-bit finaliser of MurmurHash3 over id and seed, and s, taken
    from its high bits, is coprime to E, so that the k experts differ.

    Args:
        width: D, of the tokens; only checked.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        seed: another seed is another assignment.
        capacity_factor: c > 0 limits every expert to max(1, ceil(c T K / E)) tokens, the earliest first; None drops
            nothing.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: capacity_factor is not positive.

    >>> routing = Hash(4, 8)(torch.zeros(4, 4), token_id_T=torch.tensor([7, 1, 7, 2]))
    >>> bool((routing.dense()[0] == routing.dense()[2]).all()), routing.num_entries
    (True, 4)

    Takes: K experts a token, by its id; none.

    Source: Roller et al., 2021, "Hash Layers For Large Sparse Models": the random hash. The assignment is computed,
    not stored, so no vocabulary size is needed; there it is drawn at random, and k > 1 splits each expert's weights.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        seed: int = 0,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        check("Hash", width, num_experts, top_k, capacity_factor)
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.seed, self.capacity_factor = seed, capacity_factor
        self._steps = [step for step in range(1, max(num_experts, 2)) if math.gcd(step, num_experts) == 1]

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens by their ids; there are no scores and no logits in it.

        Args:
            x_TD: (T, D), looked at for T and the device only.
            token_id_T: (T,) whole numbers, the ids.
            generator: not used.

        Raises:
            ShapeError: x_TD is not (T, width).
            UsageError: no ids, or not one whole number per token.
        """
        check_tokens(x_TD, self.width)
        if token_id_T is None or token_id_T.shape != x_TD.shape[:1] or token_id_T.is_floating_point():
            raise UsageError(
                word(
                    "token_id_T",
                    got="None" if token_id_T is None else f"{token_id_T.dtype} of shape {tuple(token_id_T.shape)}",
                    allowed=f"hold one whole number for each of the {len(x_TD)} tokens",
                    where="turnout.decide.token.Hash",
                    fix="pass token_id to the layer, or choose a router that looks at x",
                )
            )
        hash_T1 = self._hash(token_id_T.to(x_TD.device, torch.int64)).unsqueeze(1)
        index_TK = hash_T1 % self.num_experts
        if self.top_k > 1:
            step_S = torch.tensor(self._steps, device=x_TD.device)
            step_T1 = step_S[hash_T1 // self.num_experts % len(step_S)]
            index_TK = (index_TK + torch.arange(self.top_k, device=x_TD.device) * step_T1) % self.num_experts
        weight_TK = torch.full(index_TK.shape, 1 / self.top_k, dtype=torch.float32, device=x_TD.device)
        routing = Routing.from_topk(index_TK, weight_TK, num_experts=self.num_experts)
        return limit(routing, self.top_k, self.capacity_factor, "position")

    def _hash(self, id_T: Tensor) -> Tensor:
        """32 well-mixed bits of id and seed; seeds lie a golden section of 2^32 apart."""
        h = id_T + (self.seed * 0x9E3779B1 + 0x2545F491 & _LOW) & _LOW
        h = (h ^ h >> 16) * 0x85EBCA6B & _LOW
        h = (h ^ h >> 13) * 0xC2B2AE35 & _LOW
        return h ^ h >> 16

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, seed={self.seed}"
