"""Expert prototyping: experts in K groups, of each of which a token takes the best one."""

import torch
from torch import Tensor

from turnout.decide.token.gate import largest, softmax
from turnout.decide.token.linear_gate import LinearGate
from turnout.types import Routing

__all__ = ["Prototyping"]


class Prototyping(LinearGate):
    """k top-1: the experts lie in K prototypes, and each token takes the best expert of every prototype.

    p^z = softmax of W x over the experts of prototype z alone; e_z = argmax p^z; g = p^z at e_z, not renormalised.
    There is no order among the choices, so nothing has to be found one after the other.

    The K weights of a token sum to up to K: compare with a router whose weights do too.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, the prototypes, 1 to E: neighbouring experts, E / K each, or one more in the first where that is no
            whole number. Of a prototype of one expert the weight is 1, and its row of W never learns.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.

    >>> router = Prototyping(2, 4, top_k=2)
    >>> _ = router.weight.data.copy_(torch.tensor([[9.0, 0.0], [8.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
    >>> router(torch.tensor([[1.0, 0.0]])).expert_R.tolist()
    [0, 3]

    Takes: 1 expert of each of K groups a token; 2 D E operations a token.

    Source: Yang et al., 2021, "M6-T: Exploring Sparse Expert Models and Beyond".
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        ``score_TE`` of the result has the K softmaxes side by side: a token's sum to K.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = self.logits(x_TD)
        parts = [softmax(part) for part in logit_TE.tensor_split(self.top_k, dim=1)]
        score_TE, first, index = torch.cat(parts, 1), 0, []
        for part in parts:
            index.append(largest(part, 1) + first)
            first += part.shape[1]
        index_TK = torch.cat(index, 1)
        return self.taken(index_TK, score_TE.gather(1, index_TK), score_TE, logit_TE)
