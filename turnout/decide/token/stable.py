"""StableMoE: first the router learns with the experts, then a small copy of it decides by token ids for good."""

import dataclasses

import torch
from torch import Tensor, nn

from turnout.decide.token.balanced import one_choice
from turnout.decide.token.correction import refuse_evaluation
from turnout.decide.token.gate import largest, linear, sigmoid
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import UsageError, word
from turnout.types import Routing

__all__ = ["StableMoE"]

_WHERE = "turnout.decide.token.StableMoE"


class StableMoE(LinearGate):
    """A token's expert is that of its affinities, and from step ``freeze_after`` on that of its id, which stays.

    Stage 1: a_t = argmax_e A_te, A = x C^T. Beside the loss it asks for balance * L_bal + distil * L_dis:
    L_bal = (1/T) sum_e (n_e - T/E) / (T/E) * (sum of alpha_t over e's tokens), which lowers the weights of experts with
    too many, and L_dis the mean cross entropy of softmax(u d_id) with a_t. Stage 2: a_t = argmax_e u_e d_id as they
    were then, kept as one expert for each id, and nothing is asked for. g = alpha_t = sigmoid(A_{t, a_t}) in both. The
    stage holds in evaluation too.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: 1.
        vocab_size: V, how many token ids there are; a model's own, where it builds its routers.
        rank: of d (V, R) and u (E, R).
        freeze_after: optimizer steps of stage 1, at least 1; a tenth of all in the paper.
        balance: weight of L_bal, 0 or more.
        distil: weight of L_dis, 0 or more.
        std: standard deviation of the normal distribution that ``weight`` (E, D), d and u start from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not 1, or a size is below 1.
        UsageError: vocab_size, rank, freeze_after or a weight out of range.

    >>> router, id_T = StableMoE(4, 8, vocab_size=16, freeze_after=1), torch.tensor([5, 6, 5])
    >>> router.after_step(torch.zeros(8))
    >>> a, b = (router(torch.randn(3, 4), token_id_T=id_T).expert_R for _ in range(2))
    >>> torch.equal(a, b)
    True

    Takes: 1 expert a token, in the end by its id; 2 D E operations a token.

    Source: Dai et al., 2022, "StableMoE: Stable Routing Strategy for Mixture of Experts", rank 50, both weights 0.3. In
    their code evaluation in stage 1 uses the copy already, and momentum and weight decay go on moving the frozen copy.
    """

    done: Tensor
    expert_V: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        vocab_size: int = 65_536,
        rank: int = 50,
        freeze_after: int = 1000,
        balance: float = 0.3,
        distil: float = 0.3,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        one_choice("StableMoE", top_k)
        if min(vocab_size, rank, freeze_after) < 1 or not (balance >= 0 and distil >= 0):
            got = f"{vocab_size}, {rank}, {freeze_after}, {balance} and {distil}"
            fix = "pass rank=50, freeze_after=1000, balance=0.3 and distil=0.3"
            what, allowed = "vocab_size, rank, freeze_after, balance and distil", "be at least 1, and not negative"
            raise UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))
        self.vocab_size, self.rank, self.freeze_after = vocab_size, rank, freeze_after
        self.balance, self.distil = balance, distil
        self.id_VR = nn.Parameter(torch.empty(vocab_size, rank).normal_(0, std, generator=generator))
        self.expert_ER = nn.Parameter(torch.empty(num_experts, rank).normal_(0, std, generator=generator))
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self.register_buffer("expert_V", torch.zeros(vocab_size, dtype=torch.int64))

    @property
    def frozen(self) -> bool:
        """Whether stage 2 has come."""
        return int(self.done) >= self.freeze_after

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``generator`` is not used.

        Raises:
            ShapeError: x_TD is not (T, width).
            UsageError: no token ids, in training or once frozen; or one outside the vocabulary.
        """
        logit_TE = self.logits(x_TD)
        score_TE = sigmoid(logit_TE)
        if not self.frozen and not self.training:
            index_T1 = largest(logit_TE, 1)
            return self.taken(index_T1, score_TE.gather(1, index_T1), score_TE, logit_TE)
        id_T = self._ids(token_id_T)
        index_T1 = self.expert_V[id_T][:, None] if self.frozen else largest(logit_TE, 1)
        alpha_T1 = score_TE.gather(1, index_T1)
        routing = self.taken(index_T1, alpha_T1, score_TE, logit_TE)
        if self.frozen or not len(x_TD):
            return routing
        over_E = routing.load_E.to(alpha_T1.dtype) * (self.num_experts / len(x_TD)) - 1
        uneven = (over_E[index_T1] * alpha_T1).mean()
        apart = nn.functional.cross_entropy(linear(self.id_VR[id_T], self.expert_ER), index_T1[:, 0])
        return dataclasses.replace(routing, penalty=self.balance * uneven + self.distil * apart)

    def _ids(self, token_id_T: Tensor | None) -> Tensor:
        if token_id_T is None:
            fix = "pass token_id, as turnout.models.LM does"
            raise UsageError(word("token_id_T", got=None, allowed="be given", where=_WHERE, fix=fix))
        if token_id_T.device.type == "cpu" and token_id_T.numel():
            least, most = (int(bound) for bound in token_id_T.aminmax())
            if least < 0 or most >= self.vocab_size:
                allowed, fix = f"be below vocab_size={self.vocab_size}", f"pass vocab_size={most + 1}"
                raise UsageError(word("token_id_T", got=f"{least} to {most}", allowed=allowed, where=_WHERE, fix=fix))
        return token_id_T

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """Counts one step, and freezes after the last of stage 1; the training loop calls it once per optimizer step.

        Raises:
            UsageError: the router is in evaluation mode.
        """
        refuse_evaluation(self.training)
        self.done.add_(1)
        if int(self.done) == self.freeze_after:
            self.expert_V.copy_(largest(linear(self.id_VR, self.expert_ER), 1)[:, 0])
