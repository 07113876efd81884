"""Answers of a given form: a JSON schema as the tokens that may come next."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from turnout.errors import MissingExtraError, UsageError, word
from turnout.serve.http.errors import invalid

__all__ = ["Grammar", "Grammars"]

_WHERE = "turnout serve"
# Without a bound a model may go on with spaces for ever, each of which the grammar allows.
_SPACE = r"[ \n]{0,24}"
# By this name the matcher knows where a text may end.
_END = "<|turnout: the end of a form|>"
# The most that a schema is written with; what it may become is bounded by llguidance's own limits.
_SCHEMA_BYTES = 1 << 18


class Grammars:
    """Makes the grammar of one request after the other, for one tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: V of the model.
        eos: the tokens that end a text, special or plain; none of the other special ones is ever allowed.

    Source: llguidance, which both vLLM and SGLang use too.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            why = f"{_WHERE} needs llguidance for response_format"
            raise MissingExtraError(f"{why}. Nearest fix: pip install 'turnout[serve]'.") from error
        self._library = llguidance
        try:
            # It is told of an end that is none of the model's: it would take a plain token that ends texts, a digit
            # say, for the end within a text too.
            known = Tokenizer.from_str(_bare(tokenizer.to_str()))
            known.add_special_tokens([_END])
            self._end = known.get_vocab(with_added_tokens=True)[_END]
            size = max(vocab_size, self._end + 1)
            self._tokens = llguidance.LLTokenizer(known.to_str(), n_vocab=size, eos_token=[self._end])
        except Exception as error:  # the library raises whatever its parts do
            got, allowed = f"one that llguidance does not read ({error!s:.200})", "be of a kind that it reads"
            fix = "leave response_format out"
            raise UsageError(word("the tokenizer", got=got, allowed=allowed, where=_WHERE, fix=fix)) from error
        self._ends_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._ends_V[list(eos)] = True

    def of(self, schema: Mapping[str, Any], *, param: str, where: str) -> "Grammar":
        """The grammar of JSON by a schema.

        Args:
            schema: what the JSON must be; ``{"type": "object"}`` for any object.
            param: the field that it was passed in.
            where: the endpoint.

        Raises:
            ApiError: it is no schema, or has what llguidance does not do.
        """
        text = json.dumps(schema)
        if len(text) > _SCHEMA_BYTES:
            allowed = f"have at most {_SCHEMA_BYTES} characters"
            raise invalid(param, got=f"{len(text)}", allowed=allowed, where=where, fix="pass a smaller one")
        matcher = self._library.LLMatcher
        made: Any = None
        try:
            form = matcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _SPACE})
            made = matcher(self._tokens, form, log_level=0)
            problem = made.get_error() if made.is_error() else ""
        except ValueError as error:
            problem = str(error)
        if problem:
            allowed = "be a JSON schema of what llguidance does"
            raise invalid(param, got=f"one it refuses: {problem:.300}", allowed=allowed, where=where, fix="simplify it")
        return Grammar(made, self._ends_V, self._end)


def _bare(text: str) -> str:
    """The tokenizer without the space that it begins texts with: for llguidance, which cannot tell it from a text's.

    What tokens are in bytes stays, and no more is asked of it.
    """
    body = json.loads(text)
    first = body.get("pre_tokenizer") or {}
    for each in (first, *first.get("pretokenizers", ())):
        if each.get("type") == "ByteLevel":
            each["add_prefix_space"] = False
    return json.dumps(body)


class Grammar:
    """A ``TokenMask``: which tokens keep the text within a grammar.

    Args:
        matcher: of llguidance.
        ends_V: (V,) bool, the tokens that end a text, once it is whole; the matcher does not know that they do.
        end: the token that is an end to the matcher, and nothing to the model.

    Source: none; ``LLMatcher`` of llguidance.
    """

    def __init__(self, matcher: Any, ends_V: Tensor, end: int) -> None:
        self._matcher, self._ends_V, self._end, self._ended = matcher, ends_V, end, False

    def copy(self) -> "Grammar":
        """The same, for another text that begins where this one is."""
        return Grammar(self._matcher.deep_copy(), self._ends_V, self._end)

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""
        return self._ended or self._matcher.is_stopped()

    @property
    def whole(self) -> bool:
        """Whether the text is all that the grammar asks for."""
        return self._matcher.is_accepting()

    def allowed(self) -> Tensor:
        """(V,) bool, the tokens that may come next; within a text also a plain one that elsewhere ends texts.

        Raises:
            UsageError: the grammar grew beyond llguidance's limits, or no token goes on within it.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        count = max(len(self._ends_V), self._end + 1)
        allowed_X = torch.from_numpy(np.unpackbits(bits, count=count, bitorder="little").astype(bool))
        whole, allowed_X[self._end] = bool(allowed_X[self._end]), False
        allowed_V = allowed_X[: len(self._ends_V)]
        if whole:
            allowed_V |= self._ends_V
        if not bool(allowed_V.any()):
            fix = "allow more in the schema, or leave response_format out"
            got, allowed = "a text that none of its tokens goes on with", "be of what the model's tokens can write"
            raise UsageError(word("response_format", got=got, allowed=allowed, where=_WHERE, fix=fix))
        return allowed_V

    def took(self, token: int) -> None:
        """Goes on from this token.

        Raises:
            UsageError: it was not allowed.
        """
        if bool(self._ends_V[token]) and self.whole:
            self._ended = True
            return
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            allowed, fix = "be within llguidance's limits", "simplify the schema"
            got = f"{self._matcher.get_error():.200}"
            raise UsageError(word("response_format", got=got, allowed=allowed, where=_WHERE, fix=fix))
