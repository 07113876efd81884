"""What becomes of the texts of one request: their tokens so far, how they ended, and what that took."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from turnout.serve.engine import Finished, Token
from turnout.serve.http.errors import ApiError
from turnout.serve.http.spelling import Spelling

__all__ = ["Made", "Usage", "chat_logprobs", "completion_logprobs", "trouble"]


@dataclasses.dataclass(eq=False)
class Made:
    """One of the texts of a request.

    Args:
        index: which.
        prompt: which of the request's prompts it goes on from.
        tokens: so far.
        end: how it ended; None while it goes on.

    >>> Made(0, 0, [Token(1, "a"), Token(2, "b")]).text
    'ab'

    Source: none; plain bookkeeping.
    """

    index: int
    prompt: int
    tokens: list[Token] = dataclasses.field(default_factory=list)
    end: Finished | None = None

    @property
    def text(self) -> str:
        """What it says."""
        return "".join(token.text for token in self.tokens)

    @property
    def reason(self) -> str | None:
        """OpenAI's ``finish_reason``."""
        return None if self.end is None else self.end.reason


@dataclasses.dataclass(frozen=True)
class Usage:
    """The tokens of a request; a prompt of which several texts are made counts once.

    Source: the usage object of OpenAI's API.
    """

    prompt: int
    cached: int
    output: int

    @classmethod
    def of(cls, texts: Sequence[Made]) -> "Usage":
        """That of these texts, as far as they have ended."""
        first = {made.prompt: made.end for made in reversed(texts) if made.end is not None}
        ends = [made.end for made in texts if made.end is not None]
        return cls(
            sum(end.prompt_tokens for end in first.values()),
            sum(end.cached_tokens for end in first.values()),
            sum(end.output_tokens for end in ends),
        )

    def completion(self) -> dict[str, Any]:
        """As chat and completions have it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def response(self) -> dict[str, Any]:
        """As responses have it."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": 0},
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.output,
        }


def trouble(end: Finished) -> ApiError | None:
    """What a request is answered with that ended otherwise than at its end; None for one that did not."""
    if end.reason == "error":
        return ApiError(f"The model could not go on: {end.message}", 500, code="engine_error")
    if end.reason == "cancelled":
        return ApiError("The server ended before this answer did. Nearest fix: ask again.", 503, code="cancelled")
    return None


def chat_logprobs(tokens: Sequence[Token], spelling: Spelling) -> list[dict[str, Any]]:
    """The log-probabilities of tokens as chat and responses have them; the token that ends a text is none of it."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": spelling.text(token), "logprob": _finite(logprob), "bytes": list(spelling.bytes_of(token))}

    return [
        {**entry(token.id, token.logprob or 0.0), "top_logprobs": [entry(*pair) for pair in token.top]}
        for token in tokens
        if not token.ends
    ]


def completion_logprobs(tokens: Sequence[Token], spelling: Spelling, offset: int) -> dict[str, list[Any]]:
    """The log-probabilities of tokens as completions have them; ``offset`` is where in the text the first begins."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        if not token.ends:
            logprob = _finite(token.logprob or 0.0)
            found["tokens"].append(spelling.text(token.id))
            found["token_logprobs"].append(logprob)
            top: dict[str, float] = {}
            for one, value in token.top:  # of those that are spelt alike the likeliest
                top.setdefault(spelling.text(one), _finite(value))
            found["top_logprobs"].append({**top, spelling.text(token.id): logprob})
            found["text_offset"].append(offset)
        offset += len(token.text)
    return found


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI says for tokens that cannot be."""
    return max(logprob, -9999.0)
