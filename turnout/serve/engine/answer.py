"""Answer: what a request becomes, token by token, from the scores that a model gives."""

import secrets
import time
from typing import Any

import torch
from torch import Tensor

from turnout.models.draw import chances
from turnout.models.generated import refusal
from turnout.models.pieces import Pieces, Reader
from turnout.serve.engine.request import Finished, Reason, Token
from turnout.serve.engine.ticket import Ticket

__all__ = ["Answer"]

Routes = tuple[tuple[int, ...], ...]


class Answer:
    """One request under way: how its next token is drawn, what can be shown of it, and whether it has ended.

    Nothing in here knows of other requests: what is drawn depends on the scores, the request and its seed. It draws
    what ``turnout.generate`` draws for this prompt, seed and number of tokens.

    Args:
        ticket: whom it is told to.
        reader: what turns tokens into text; None for no text.
        vocab_size: V.
    """

    def __init__(self, ticket: Ticket, reader: Reader | None, vocab_size: int) -> None:
        request = ticket.request
        self.ticket, self.request = ticket, request
        self.ids = list(request.prompt)  # and what was drawn since
        self.cached = 0
        self.began_s = time.monotonic()
        self._pieces = None if reader is None else Pieces(reader, self.ids, request.stop, request.keep_stop)
        self._chance_1N: Tensor | None = None
        if request.drawing.temperature != 0:
            seed = secrets.randbits(63) if request.seed is None else request.seed
            self._chance_1N = chances([request.prompt], request.tokens, seed)
        self._drawn_1V = torch.zeros(1, vocab_size, dtype=torch.int32) if request.drawing.counts else None
        self._seen_1V: Tensor | None = None
        if request.drawing.repetition_penalty != 1:
            self._seen_1V = torch.zeros(1, vocab_size, dtype=torch.bool)
            self._seen_1V[0, list(request.prompt)] = True

    @property
    def drawn(self) -> int:
        """How many tokens there are."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        asked = self.request
        return asked.drawing.is_plain and asked.mask is None and asked.logprobs is None

    def take(self, score_V: Tensor, routes: Routes | None = None, *, best: int | None = None) -> bool:
        """Draws the next token from its scores and tells it; whether the request ends with it.

        Args:
            score_V: (V,) of the model, which is not changed.
            routes: the experts that were taken.
            best: the likeliest token, where ``is_plain`` and somebody has looked already.

        Raises:
            UsageError: scores that are no numbers.
        """
        token = self._likeliest(score_V) if best is None else best
        self.ids.append(token)
        if self._seen_1V is not None:
            self._seen_1V[0, token] = True
        if self._drawn_1V is not None:
            self._drawn_1V[0, token] += 1
        mask = self.request.mask
        ends = token in self.request.eos and (mask is None or mask.whole)
        if mask is not None:
            mask.took(token)
        why = self._why(ends)
        text = ""
        if self._pieces is not None:
            if ends:
                text = self._pieces.add_end(token)
            else:
                text = self._pieces.add(token) + ("" if why is None else self._pieces.end())
            why = "stop" if self._pieces.stopped else why
        logprob, top = self._chances(score_V, token)
        self.ticket.put(Token(token, text, logprob, top, routes if self.request.routes else None, ends))
        if why is not None:
            self.end(why)
        return why is not None

    def end(self, reason: Reason, message: str = "") -> None:
        """Says that it has ended."""
        prompt = len(self.request.prompt)
        self.ticket.put(Finished(reason, prompt, self.cached, self.drawn, message))

    def _why(self, ends: bool) -> Reason | None:
        mask = self.request.mask
        if ends or (mask is not None and mask.done):
            return "stop"
        return "length" if self.drawn == self.request.tokens else None

    def _likeliest(self, score_V: Tensor) -> int:
        """The token that is drawn."""
        if not bool(score_V.amax().isfinite()):
            fix = "look at the weights; in float16 large values overflow: try bfloat16 or float32"
            got = f"infinity or no number at new token {self.drawn}"
            raise refusal("the model's scores", got, "be finite numbers", fix)
        score_1V: Any = score_V.unsqueeze(0)
        if self.request.mask is not None:
            score_1V = score_1V.masked_fill(~self.request.mask.allowed(), -torch.inf)
        drawn = self.drawn
        chance_1 = torch.zeros(1) if self._chance_1N is None else self._chance_1N[:, drawn]
        return int(self.request.drawing.pick(score_1V, chance_1, self._seen_1V, self._drawn_1V))

    def _chances(self, score_V: Tensor, token: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """The log-probability of a token, and the likeliest ones."""
        count = self.request.logprobs
        if count is None:
            return None, ()
        logprob_V = score_V.float().unsqueeze(0).log_softmax(1)[0]
        top = logprob_V.topk(min(count, len(logprob_V)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return float(logprob_V[token]), tuple(pairs)
