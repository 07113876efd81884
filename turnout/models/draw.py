"""Which token comes next: scores filtered as transformers filters them, and one drawn from what is left."""

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from turnout.errors import UsageError, word

__all__ = ["Drawing", "chances"]

# Divisors and factors beyond these have the effect of these: scores would be infinite, or no numbers.
_LEAST, _MOST = 1e-15, 1e15


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a token is drawn from its scores, in the order of transformers: penalties, temperature, top-k, top-p, min-p.

    Args:
        temperature: scores are divided by it; 0 takes the likeliest token, and nothing after the penalty counts.
        top_k: only the k likeliest stay, and those that tie with the last of them; at least 1; None for all.
        top_p: only the fewest likeliest stay that together have this share, from 0 (the likeliest alone) to 1 (all);
            None for all.
        min_p: only those stay that are at least this share, from 0 to 1, of the likeliest; None for all.
        repetition_penalty: above 0; the scores of tokens that stand in the text, prompt included, are divided by it
            where they are positive and multiplied where they are negative. 1 changes nothing.
        frequency_penalty: is taken from the score of a token as often as it was drawn already; the prompt does not
            count. Below 0 it asks for repetition.
        presence_penalty: is taken once from the scores of tokens that were drawn already.
        logit_bias: what is added to the scores of tokens, by their ids, before any penalty; None for nothing.
        where: the function that was given them, for errors.

    Raises:
        UsageError: a setting out of its range; the message names it.

    >>> drawing, scores_BV = Drawing(temperature=0.5, top_k=2), torch.tensor([[1.0, 3.0, 2.0]])
    >>> drawing.processed(scores_BV)
    tensor([[-inf, 6., 4.]])
    >>> drawing.pick(scores_BV, torch.tensor([0.9]))
    tensor([2])

    Source: Keskar et al., 2019, "CTRL" (the penalty); Fan et al., 2018, "Hierarchical Neural Story Generation" (top-k);
    Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration" (top-p); Nguyen et al., 2025, "Turning Up the
    Heat: Min-p Sampling"; each as transformers 5 has it. Of scores that tie at the border of top-p the lower ids stay.
    OpenAI's API for the penalties of what was drawn and the bias, in the order that vLLM applies them in: bias,
    repetition, frequency, presence.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    where: str = "turnout.generate"

    def __post_init__(self) -> None:
        whole = self.top_k is None or (isinstance(self.top_k, int) and not isinstance(self.top_k, bool))
        if not whole or (self.top_k is not None and self.top_k < 1):
            raise self._refusal("top_k", self.top_k, "be a whole number of at least 1, or None", "pass top_k=50")
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise self._refusal(
                "temperature", self.temperature, "be a finite number of at least 0", "pass temperature=1.0"
            )
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                fix = "pass top_p=0.95" if name == "top_p" else "pass min_p=0.05"
                raise self._refusal(name, value, "be a number from 0 to 1, or None", fix)
        penalty = self.repetition_penalty
        if not _is_number(penalty) or not 0 < penalty < math.inf:
            raise self._refusal(
                "repetition_penalty", penalty, "be a finite number above 0", "pass repetition_penalty=1.1"
            )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not math.isfinite(value):
                raise self._refusal(name, value, "be a finite number", f"pass {name}=0.5")
        self._check_bias()
        idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and idle and self.top_k != 1:
            has = "have no effect" if len(idle) > 1 else "has no effect"
            warnings.warn(f"{' and '.join(idle)} {has} at temperature 0, which takes the likeliest token", stacklevel=5)

    def _check_bias(self) -> None:
        allowed, fix = "be finite numbers by token ids of at least 0, or None", "pass logit_bias={7: -1.5}"
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise self._refusal("logit_bias", self.logit_bias, allowed, fix)
        for token, value in self.logit_bias.items():
            whole = isinstance(token, int) and not isinstance(token, bool) and token >= 0
            if not whole or not _is_number(value) or not math.isfinite(value):
                raise self._refusal("logit_bias", {token: value}, allowed, fix)

    @property
    def is_plain(self) -> bool:
        """Whether the token with the highest score is all that is drawn."""
        return self.temperature == 0 and self.repetition_penalty == 1 and not self.counts and not self.logit_bias

    @property
    def counts(self) -> bool:
        """Whether it matters how often a token was drawn."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    def check_ids(self, vocab_size: int) -> None:
        """Refuses a bias of what is no token.

        Args:
            vocab_size: V.

        Raises:
            UsageError: an id of V or more.
        """
        if self.logit_bias and (most := max(self.logit_bias)) >= vocab_size:
            allowed = f"be of tokens from 0 to {vocab_size - 1}"
            raise self._refusal("logit_bias", f"the token {most}", allowed, "use the model's own tokenizer")

    def _refusal(self, name: str, got: object, allowed: str, fix: str) -> UsageError:
        return UsageError(word(name, got=got, allowed=allowed, where=self.where, fix=fix))

    def processed(self, score_BV: Tensor, seen_BV: Tensor | None = None, drawn_BV: Tensor | None = None) -> Tensor:
        """(B, V) the scores whose softmax a token is drawn from: -inf at tokens that were left out.

        Args:
            score_BV: (B, V) floating-point, of the model.
            seen_BV: (B, V) bool, which tokens stand in the text; None for no repetition penalty.
            drawn_BV: (B, V) how often each token was drawn; None for never.
        """
        kept_BC, index_BC = self._kept(self._penalised(score_BV, seen_BV, drawn_BV))
        if index_BC is None:
            return kept_BC
        return torch.full_like(score_BV, -math.inf, dtype=kept_BC.dtype).scatter_(1, index_BC, kept_BC)

    def pick(
        self,
        score_BV: Tensor,
        chance_B: Tensor,
        seen_BV: Tensor | None = None,
        drawn_BV: Tensor | None = None,
    ) -> Tensor:
        """(B,) the tokens drawn: in the order of their ids, the one within whose share ``chance_B`` falls.

        Args:
            score_BV: as in ``processed``.
            chance_B: (B,) from 0 to below 1; does not count at temperature 0.
            seen_BV: as in ``processed``.
            drawn_BV: as in ``processed``.
        """
        score_BV = self._penalised(score_BV, seen_BV, drawn_BV)
        if self.temperature == 0:
            return score_BV.argmax(1)
        kept_BC, index_BC = self._kept(score_BV)
        if kept_BC.device.type == "mps":  # which has no float64
            kept_BC = kept_BC.cpu()
        below_BC = kept_BC.softmax(1).cumsum(1, dtype=torch.float64)
        most_B1 = below_BC[:, -1:]
        # Below the sum, whatever rounding did: a token of no share is never drawn.
        at_B1 = torch.minimum(chance_B.to(below_BC)[:, None] * most_B1, most_B1.nextafter(torch.zeros_like(most_B1)))
        place_B1 = torch.searchsorted(below_BC, at_B1, right=True).to(score_BV.device)
        return (place_B1 if index_BC is None else index_BC.gather(1, place_B1)).squeeze(1)

    def _penalised(self, score_BV: Tensor, seen_BV: Tensor | None, drawn_BV: Tensor | None) -> Tensor:
        score_BV, by = score_BV.float() if score_BV.dtype != torch.float64 else score_BV, self.repetition_penalty
        by = min(max(by, _LEAST), _MOST)
        if self.logit_bias:
            place_N = torch.tensor(list(self.logit_bias), device=score_BV.device)
            bias_N = score_BV.new_tensor([_bounded(value) for value in self.logit_bias.values()])
            score_BV = score_BV.index_add(1, place_N, bias_N.expand(len(score_BV), -1))
        if by != 1 and seen_BV is not None:
            score_BV = torch.where(seen_BV, torch.where(score_BV < 0, score_BV * by, score_BV / by), score_BV)
        if self.counts and drawn_BV is not None:
            less_BV = _bounded(self.frequency_penalty) * drawn_BV + _bounded(self.presence_penalty) * (drawn_BV > 0)
            score_BV = score_BV - less_BV.to(score_BV)
        return score_BV

    def _kept(self, score_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C) scores after everything, and the tokens that they are of, by id; None where they are of all V."""
        if self.temperature != 1 and self.temperature != 0:
            score_BV = score_BV / min(max(self.temperature, _LEAST), _MOST)
        kept_BC, index_BC = score_BV, None
        if self.top_k is not None and self.top_k < score_BV.shape[1]:
            kept_BC, index_BC = _likeliest(score_BV, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            kept_BC = _nucleus(kept_BC, self.top_p)
        if self.min_p is not None and self.min_p > 0:
            least_B1 = kept_BC.amax(1, keepdim=True) + math.log(self.min_p)
            kept_BC = kept_BC.masked_fill(kept_BC < least_B1, -math.inf)
        return kept_BC, index_BC


def chances(prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> Tensor:
    """(B, tokens) numbers from 0 to below 1, of each row those that it would have alone.

    They depend on the seed, the prompt, and how many rows before it have the same prompt: so copies of a prompt go on
    differently, and the first of them as the prompt does alone.

    Args:
        prompts: the token ids of each row.
        tokens: how many numbers each needs.
        seed: any whole number.

    >>> together = chances([[1, 2], [3], [3]], 4, seed=0)
    >>> torch.equal(together[1:], chances([[3], [3]], 4, seed=0)), torch.equal(together[1], together[2])
    (True, False)

    Source: none; a generator for each row, seeded with BLAKE2.
    """
    before: dict[tuple[int, ...], int] = {}
    rows = []
    for prompt in map(tuple, prompts):
        copy = before[prompt] = before.get(prompt, -1) + 1
        digest = hashlib.blake2b(repr((seed, copy, prompt)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand(tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _bounded(value: float) -> float:
    return min(max(value, -_MOST), _MOST)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _likeliest(score_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, C) the scores of at least the ``count``-th largest of each row, and whose they are, by id; -inf fills up."""
    least_B1 = score_BV.topk(count, dim=1).values[:, -1:]
    kept_BV = score_BV >= least_B1
    most = max(1, int(kept_BV.sum(1).max()))
    # Those of each row before all others, each in the order of the ids: which of equal scores come first is certain.
    index_BC = torch.topk(kept_BV.to(torch.uint8), most, dim=1).indices.sort(1).values
    kept_BC = score_BV.gather(1, index_BC)
    return kept_BC.masked_fill(kept_BC < least_B1, -math.inf), index_BC


def _nucleus(score_BC: Tensor, top_p: float) -> Tensor:
    """The scores without those above which ``top_p`` of the whole lies already; the likeliest always stays."""
    whole_B1, count = score_BC.logsumexp(1, keepdim=True), score_BC.shape[1]
    # All that have less than this share have less than 1 - top_p together: none stays, and few are to be sorted.
    some = int((score_BC >= whole_B1 + math.log((1 - top_p) / (2 * count))).sum(1).max())
    sorted_BC = score_BC.topk(some, dim=1).values if 8 * some < count else _sorted(score_BC)
    share_BC = (sorted_BC - whole_B1).exp()
    count_B1 = (share_BC.cumsum(1) - share_BC < top_p).sum(1, keepdim=True).clamp(min=1)
    least_B1 = sorted_BC.gather(1, count_B1 - 1)
    above_BC, tie_BC = score_BC > least_B1, score_BC == least_B1
    tie_BC &= tie_BC.cumsum(1) <= count_B1 - above_BC.sum(1, keepdim=True)
    return score_BC.masked_fill(~(above_BC | tie_BC), -math.inf)


def _sorted(score_BC: Tensor) -> Tensor:
    """Each row, the largest first. Of values alone numpy's sort takes a tenth of the time of torch's on a CPU."""
    if score_BC.device.type != "cpu":
        return score_BC.sort(dim=1, descending=True).values
    return torch.from_numpy(np.sort(score_BC.numpy(), axis=1)).flip(1)
