"""CIGT: a router of images that learns to say as much as it can about their class."""

import dataclasses

import torch
from torch import Tensor, nn

from turnout.decide.token.balanced import one_choice
from turnout.decide.token.correction import refuse_evaluation
from turnout.decide.token.gate import check, draw, largest, linear, standard
from turnout.errors import UsageError, word
from turnout.types import Given, Routing
from turnout.types.called import Called

__all__ = ["CIGT", "information_gain"]

_WHERE = "turnout.decide.token.CIGT"


def information_gain(score_TE: Tensor, label_T: Tensor, *, evenness: float = 1.0) -> Tensor:
    """The information gain of a soft choice about labels, in nats: evenness H(n) + H(c) - H(c, n).

    p(c, n) = (1/T) sum_t 1[label_t = c] p_t(n). With evenness 1 it is the mutual information; more also asks for even
    use of the choices. It is of a batch, so the gain of two batches is not the mean of theirs.

    Args:
        score_TE: (T, E) the probabilities of the choices.
        label_T: (T,) int64.
        evenness: the weight of H(n).

    >>> halves_TE = torch.eye(2).repeat(2, 1)
    >>> round(float(information_gain(halves_TE, torch.tensor([0, 1, 0, 1]))), 4)
    0.6931

    Source: Bicici & Akarun, 2024, "Conditional Information Gain Trellis".
    """
    classes = int(label_T.max()) + 1 if label_T.numel() else 1
    joint_CE = score_TE.new_zeros(classes, score_TE.shape[1]).index_add(0, label_T, score_TE) / max(len(score_TE), 1)

    def entropy(share: Tensor) -> Tensor:
        return -torch.xlogy(share, share).sum()

    return evenness * entropy(joint_CE.sum(0)) + entropy(joint_CE.sum(1)) - entropy(joint_CE)


class CIGT(Called):
    """Each row goes to one block of the next layer, with weight 1; the choice learns to tell the class.

    a = W2 dropout(norm(relu(W1 x + b1))) + b2; p = softmax(a / tau); n = argmax a. In training, for ``warmup`` steps n
    is drawn evenly, and later with probability ``explore``; beside the loss it then asks for -strength IG of p and the
    labels that ``turnout.layers.given(label_B=...)`` says, one a sequence. tau = max(end, start decay^steps). No
    gradient of the loss reaches the router.

    Args:
        width: D, of the rows.
        num_experts: E, the blocks.
        top_k: 1.
        hidden: of the router.
        dropout: in [0, 1).
        strength: weight of what it asks for, 0 or more.
        evenness: as of ``information_gain``.
        warmup: steps of even draws, 0 or more.
        explore: probability of one afterwards, in [0, 1].
        start: tau at the beginning, above 0.
        end: the least tau, above 0.
        decay: of tau a step, above 0 and at most 1.
        std: standard deviation of the normal distribution that W1 and W2 start from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not 1, or a size is below 1.
        UsageError: one of the others out of range, or no labels in training.

    >>> router = CIGT(4, 2).eval()
    >>> router(torch.randn(3, 4), given=Given.of(3, 3)).num_entries
    3

    Takes: 1 expert a token; 2 H (D + E) operations a token.

    Source: Bicici & Akarun, 2024, "Conditional Information Gain Trellis". A norm without statistics of batches stands
    where theirs has batch normalisation.
    """

    needs_given = True
    done: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        hidden: int = 128,
        dropout: float = 0.0,
        strength: float = 1.0,
        evenness: float = 1.0,
        warmup: int = 0,
        explore: float = 0.0,
        start: float = 25.0,
        end: float = 0.1,
        decay: float = 0.9999,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("CIGT", width, num_experts, top_k, None)
        one_choice("CIGT", top_k)
        fits = hidden >= 1 and 0 <= dropout < 1 and strength >= 0 and evenness >= 0 and warmup >= 0
        if not (fits and 0 <= explore <= 1 and 0 < end <= start < float("inf") and 0 < decay <= 1):
            got = f"{hidden}, {dropout}, {strength}, {evenness}, {warmup}, {explore}, {start}, {end} and {decay}"
            what = "hidden, dropout, strength, evenness, warmup, explore, start, end and decay"
            fix = "pass hidden=128, dropout=0.0, explore=0.0, start=25.0, end=0.1 and decay=0.9999"
            raise UsageError(word(what, got=got, allowed="be within their ranges", where=_WHERE, fix=fix))
        self.width, self.num_experts, self.top_k, self.hidden, self.dropout = width, num_experts, top_k, hidden, dropout
        self.strength, self.evenness, self.warmup, self.explore = strength, evenness, warmup, explore
        self.start, self.end, self.decay = start, end, decay
        self.hidden_weight = nn.Parameter(torch.empty(hidden, width).normal_(0, std, generator=generator))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.out_weight = nn.Parameter(torch.empty(num_experts, hidden).normal_(0, std, generator=generator))
        self.out_bias = nn.Parameter(torch.zeros(num_experts))
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    @property
    def temperature(self) -> float:
        """tau, as the next batch is scored with."""
        return max(self.end, self.start * self.decay ** int(self.done))

    def forward(
        self,
        x_TD: Tensor,
        *,
        given: Given,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The routing of these rows; in training ``generator`` draws. ``token_id_T`` is not used.

        Raises:
            ShapeError: x_TD is not (T, width).
            UsageError: no labels in training.
        """
        hidden_TH = standard(linear(x_TD, self.hidden_weight, self.hidden_bias).relu())
        if self.training and self.dropout > 0:
            keep_TH = draw(torch.rand, hidden_TH.detach(), generator) >= self.dropout
            hidden_TH = hidden_TH * keep_TH / (1 - self.dropout)
        logit_TE = linear(hidden_TH, self.out_weight, self.out_bias)
        score_TE = (logit_TE / self.temperature).softmax(1)
        index_T1 = largest(logit_TE, 1)
        share = 1.0 if int(self.done) < self.warmup else self.explore
        if self.training and share > 0:
            uniform_T2 = draw(torch.rand, logit_TE.detach().new_empty(len(x_TD), 2), generator)
            even_T1 = (uniform_T2[:, :1] * self.num_experts).long().clamp_max(self.num_experts - 1)
            index_T1 = torch.where(uniform_T2[:, 1:] < share, even_T1, index_T1)
        weight_T1 = logit_TE.new_ones(len(x_TD), 1)
        tables = {"score_TE": score_TE, "logit_TE": logit_TE}
        routing = Routing.from_topk(index_T1, weight_T1, num_experts=self.num_experts, **tables)
        if not self.training or self.strength == 0:
            return routing
        label_T = given.need("label_B", _WHERE)[given.sequence_T]
        gain = information_gain(score_TE, label_T, evenness=self.evenness)
        return dataclasses.replace(routing, penalty=-self.strength * gain)

    def after_step(self, load_E: Tensor) -> None:
        """Counts one step; the training loop calls it once per optimizer step. The load does not matter.

        Raises:
            UsageError: the router is in evaluation mode.
        """
        refuse_evaluation(self.training)
        self.done.add_(1)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, hidden={self.hidden}"
