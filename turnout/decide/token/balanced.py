"""BASE: in training every expert gets as many tokens as any other, and together they have the best there is."""

import numpy as np
import torch
from torch import Tensor, nn

from turnout.decide.token.gate import largest, sigmoid
from turnout.decide.token.linear_gate import LinearGate
from turnout.solve.transport import transport
from turnout.types import Routing
from turnout.types.invariant import refuse_invariant

__all__ = ["BASE", "even_assignment"]


class BASE(LinearGate):
    """In training the tokens are dealt out evenly, with the largest sum of affinities; in evaluation each goes its way.

    A = x C^T, C (E, D) the experts' centroids. Training: a = the assignment with T / E tokens an expert that maximises
    the sum of A_{t, a_t} (exact), without gradient; where E does not divide T, the floor or the ceiling of it.
    Evaluation: a_t = argmax_e A_te. g = sigmoid(A_{t, a_t}), through which alone the centroids learn.

    **In training it leaks the future**: where a token goes depends on all other tokens of the batch. It needs no
    balance loss, and wants none.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: 1.
        std: the centroids start as orthogonal rows, as long as normal ones of this standard deviation.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not 1, or a size is below 1.

    >>> router = BASE(2, 2)
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    >>> x_TD = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    >>> router(x_TD).expert_R[router(x_TD).token_R.argsort()].tolist(), router.eval()(x_TD).load_E.tolist()
    ([1, 0], [2, 0])

    Takes: 1 expert a token, in training T / E tokens an expert; 2 D E operations a token, in training an assignment
    too.

    Source: Lewis et al., 2021, "BASE Layers: Simplifying Training of Large, Sparse Models". Their expert adds to its
    input, y = x + alpha (E(x) - x), under a norm of its own; here the block's residual and norm do. The assignment is
    solved exactly where theirs is an auction, and capacities are whole numbers where E does not divide T.
    """

    sees_later_tokens = "training"

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        one_choice("BASE", top_k)
        with torch.no_grad():
            nn.init.orthogonal_(self.weight, gain=std * max(width, num_experts) ** 0.5, generator=generator)

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = self.logits(x_TD)
        score_TE = sigmoid(logit_TE)
        if self.training:
            refuse_invariant("an assignment of all tokens", "BASE", "call eval() first")
            index_T1 = even_assignment(logit_TE)[:, None]
        else:
            index_T1 = largest(logit_TE, 1)
        return self.taken(index_T1, score_TE.gather(1, index_T1), score_TE, logit_TE)


def one_choice(name: str, top_k: int) -> None:
    """Refuses more than one expert a token, on behalf of the router called ``name``."""
    from turnout.errors import ShapeError, word

    if top_k != 1:
        where, fix = f"turnout.decide.token.{name}", "pass top_k=1"
        raise ShapeError(word("top_k", got=top_k, allowed="be 1: a token has one expert", where=where, fix=fix))


def even_assignment(affinity_TE: Tensor) -> Tensor:
    """(T,) int64, the expert of each token in the even assignment with the largest sum of affinities.

    Each expert gets T / E tokens, or the floor or the ceiling of it.

    Args:
        affinity_TE: (T, E), finite; no gradient goes through it.

    >>> even_assignment(torch.tensor([[5.0, 0.0], [4.0, 0.0], [3.0, 2.0]])).tolist()
    [0, 0, 1]

    Source: Lewis et al., 2021, "BASE Layers"; solved by ``turnout.solve.transport``.
    """
    gain_TE = affinity_TE.detach().double().cpu().numpy()
    tokens, experts = gain_TE.shape
    each, more = divmod(tokens, experts)
    if not more:
        chosen_T = transport(gain_TE, np.full(experts, each), maximize=True).column_M
    else:
        # A second column of one place for each expert, which rows that stand for no token may have too: they fill what
        # is left of those, and never a place of the first ones.
        spare = experts - more
        low = -(1 + np.abs(gain_TE).max(initial=0.0)) * (4 * tokens + 4)
        gain = np.concatenate([gain_TE, gain_TE], 1)
        idle = np.concatenate([np.full((spare, experts), low), np.zeros((spare, experts))], 1)
        room = np.repeat([each, 1], experts)
        if not each:
            gain, idle, room = gain[:, experts:], idle[:, experts:], room[experts:]
        chosen_T = transport(np.concatenate([gain, idle]), room, maximize=True).column_M[:tokens] % experts
    return torch.from_numpy(chosen_T).to(affinity_TE.device)
