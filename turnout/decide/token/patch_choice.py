"""pMoE: of every sample each expert takes the few patches that suit it."""

import math

import torch
from torch import Tensor

from turnout.decide.token.gate import largest
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import UsageError, word
from turnout.types import Given, Routing

__all__ = ["PatchChoice"]


class PatchChoice(LinearGate):
    """Expert choice within each sequence: every expert takes its l best tokens of every sequence.

    For expert e and sequence b: J = the l tokens of b with the largest (W x)_e; g = softmax over J of (W x)_e, or of
    all tokens of b without ``renormalize``. A sequence of less than l tokens gives all of them. No expert is left
    without, and sequences do not see each other; ``ExpertChoice`` chooses among the tokens of the whole call.

    **It leaks the future** within a sequence: use it for patches of an image, not for causal generation.

    Args:
        width: D, of the tokens (patches).
        num_experts: E.
        top_k: how many experts a token gets in the mean, where ``per_sample`` is None: l = ceil(K n / E) of n tokens.
        per_sample: l, at least 1.
        renormalize: whether the l weights of an expert in a sequence sum to 1.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from. The paper's is 1e-4:
            large random routers miss the patch that matters.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: per_sample is below 1.

    >>> router, x_TD = PatchChoice(1, 2, per_sample=1), torch.tensor([[1.0], [2.0], [3.0], [0.0]])
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> router(x_TD, given=Given.of(2, 4)).dense().tolist()
    [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]

    Takes: l tokens of each sequence an expert; 2 D E operations a token.

    Source: Chowdhury et al., 2023, "Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for
    Convolutional Neural Networks". Weights by the softmax of the chosen, as in their MNIST code.
    """

    needs_given = True
    sees_later_tokens = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        per_sample: int | None = None,
        renormalize: bool = True,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        if per_sample is not None and per_sample < 1:
            where, fix = "turnout.decide.token.PatchChoice", "pass per_sample=2, or None"
            raise UsageError(word("per_sample", got=per_sample, allowed="be at least 1", where=where, fix=fix))
        self.per_sample, self.renormalize = per_sample, renormalize

    def forward(
        self,
        x_TD: Tensor,
        *,
        given: Given,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = self.logits(x_TD)
        tables = {"score_TE": logit_TE.softmax(1), "logit_TE": logit_TE}
        sizes = {"num_tokens": len(x_TD), "num_experts": self.num_experts}
        token_N, expert_N, weight_N = [], [], []
        start_T = given.sequence_T
        for sequence in range(given.num_sequences):
            place_n = (start_T == sequence).nonzero()[:, 0]
            if not len(place_n):
                continue
            wanted = self.per_sample or math.ceil(self.top_k * len(place_n) / self.num_experts)
            own_En = logit_TE[place_n].t()
            index_El = largest(own_En, min(wanted, len(place_n)))
            weight_El = own_En.gather(1, index_El).softmax(1)
            if not self.renormalize:
                weight_El = own_En.softmax(1).gather(1, index_El)
            token_N.append(place_n[index_El].flatten())
            weight_N.append(weight_El.flatten())
            expert_N.append(torch.arange(self.num_experts, device=x_TD.device).repeat_interleave(index_El.shape[1]))
        if not token_N:
            none = torch.zeros(0, dtype=torch.int64, device=x_TD.device)
            return Routing.from_entries(none, none, logit_TE.new_zeros(0), **sizes, **tables)
        entries = torch.cat(token_N), torch.cat(expert_N), torch.cat(weight_N)
        return Routing.from_entries(*entries, **sizes, **tables)
