"""What came of one request: when its pieces arrived, and whether it is an answer at all."""

import dataclasses
import itertools

__all__ = ["Answer"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One request and what came back; times are in seconds of one clock.

    Args:
        due_s: when it should have been sent. All that its user waits counts from here, so that a client that is late
            does not hide a server that is slow.
        sent_s: when it was.
        ended_s: when it was over.
        asked_tokens: the most that it might answer.
        piece_s: when each piece with text arrived.
        text: all of it.
        finish: the ``finish_reason``; empty without one.
        prompt_tokens: as the server counted; None where it does not say.
        output_tokens: likewise.
        cached_tokens: of the prompt, that it need not read; None where it does not say.
        error: the kind of failure; empty for an answer that is whole.
        message: what was said of it.
        retry_after: seconds that a refusal asked to wait; None where it did not.

    >>> Answer(0.0, 0.0, 2.0, 3, piece_s=(1.0, 1.5, 2.0), output_tokens=3, finish="length").tpot_s
    0.5

    Source: none; plain bookkeeping.
    """

    due_s: float
    sent_s: float
    ended_s: float
    asked_tokens: int
    piece_s: tuple[float, ...] = ()
    text: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    error: str = ""
    message: str = ""
    retry_after: float | None = None

    @property
    def tokens(self) -> int:
        """As the server counted them, or as many as there were pieces."""
        return len(self.piece_s) if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float:
        """Until the first piece of text; of an answer without text, until its end."""
        return (self.piece_s[0] if self.piece_s else self.ended_s) - self.due_s

    @property
    def gap_s(self) -> list[float]:
        """Between each piece and the next."""
        return [after - before for before, after in itertools.pairwise(self.piece_s)]

    @property
    def tpot_s(self) -> float:
        """For each token after the first, from the first piece to the last."""
        return (self.piece_s[-1] - self.piece_s[0]) / max(self.tokens - 1, 1) if self.piece_s else 0.0

    @property
    def e2e_s(self) -> float:
        """Until the end."""
        return self.ended_s - self.due_s

    def judged(self, *, fixed: bool) -> "Answer":
        """With the kind of its failure, where it looked whole and is not.

        Args:
            fixed: whether it had to have exactly the tokens that were asked for.

        >>> Answer(0.0, 0.0, 1.0, 8, piece_s=(0.5,), output_tokens=3, finish="length").judged(fixed=False).error
        'short'
        """
        if self.error:
            return self
        error = message = ""
        given, asked = self.output_tokens, self.asked_tokens
        if self.finish not in ("stop", "length"):
            error, message = "cut", f"it ended with finish_reason {self.finish or 'missing'}"
        elif given is not None and given > asked:
            error, message = "miscounted", f"usage says {given} tokens of at most {asked}"
        elif given is not None and given < asked and (fixed or self.finish == "length"):
            error, message = "short", f"{given} of {asked} tokens, finish_reason {self.finish}"
        elif given is not None and len(self.piece_s) > given:
            error, message = "miscounted", f"usage says {given} tokens, {len(self.piece_s)} pieces came"
        elif self.finish == "length" and not self.piece_s:
            error, message = "empty", f"{given} tokens without text"
        return dataclasses.replace(self, error=error, message=message) if error else self
