"""Texts: what stands between a request's words and a model's tokens, read once from a checkpoint's folder."""

import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from turnout.errors import DataError, UsageError
from turnout.serve.http.chat_template import ChatTemplate
from turnout.serve.http.errors import ApiError, invalid
from turnout.serve.http.grammar import Grammar, Grammars
from turnout.serve.http.spelling import Spelling
from turnout.train.data import load_tokenizer
from turnout.train.data.prompt import prompt_ids
from turnout.train.data.spaced import spaced
from turnout.train.data.tokenizer import encode, open_tokenizer

__all__ = ["Texts"]


class Texts:
    """Prompts and conversations as tokens, tokens as texts, and the form that answers are given in.

    Args:
        tokenizer: the model's, as it reads a prompt.
        vocab_size: V of the model.
        eos: the tokens that end a text.
        own: whether turnout trained the model; ``turnout.train.data.prompt``.
        template: the checkpoint's chat template; None where it has none.

    >>> from turnout.train.data import train_tokenizer
    >>> texts = Texts(train_tokenizer(["a cat, a cat"], vocab_size=258), vocab_size=258, eos=(0,), own=True)
    >>> texts.prompt("c", param="prompt", where="/v1/completions")
    (0, 67)

    Source: none; plain bookkeeping.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos: Sequence[int],
        own: bool,
        template: ChatTemplate | None = None,
    ) -> None:
        self.tokenizer, self.vocab_size, self.eos = tokenizer, vocab_size, tuple(eos)
        self._own, self.template = own, template
        self._table = spaced(tokenizer)
        self.spelling = Spelling(tokenizer)
        self._making = threading.Lock()

    @classmethod
    def load(cls, file: Path, *, vocab_size: int, eos: Sequence[int], own: bool) -> "Texts":
        """Those of a checkpoint.

        In a prompt for a model from elsewhere special tokens are what they are called, as transformers has it; one that
        turnout trained has never seen them within a text, and reads their names as plain text.

        Args:
            file: its ``tokenizer.json``; what is said of its chat template stands beside it.
            vocab_size: as above.
            eos: as above.
            own: as above.

        Raises:
            CheckpointError: a file that is not what it should be.
        """
        tokenizer = load_tokenizer(file) if own else open_tokenizer(file)
        return cls(tokenizer, vocab_size=vocab_size, eos=eos, own=own, template=ChatTemplate.load(file.parent))

    def prompt(self, text: str, *, param: str, where: str) -> tuple[int, ...]:
        """The tokens of a prompt.

        Raises:
            ApiError: an empty one where nothing says how a text begins, or a token that the model does not have.
        """
        try:
            ids = prompt_ids(text, self.tokenizer, own=self._own, table=self._table)
        except DataError as error:
            raise invalid(param, got="an empty text", allowed="have text in it", where=where, fix="add some") from error
        return self.known(ids, param=param, where=where)

    def known(self, ids: Sequence[int], *, param: str, where: str) -> tuple[int, ...]:
        """These tokens.

        Raises:
            ApiError: one that the model does not have.
        """
        if (most := max(ids)) >= self.vocab_size:
            allowed, fix = f"be tokens from 0 to {self.vocab_size - 1}", "use the model's own tokenizer"
            raise invalid(param, got=f"the token {most}", allowed=allowed, where=where, fix=fix)
        return tuple(ids)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], told: Mapping[str, Any] | None, *, param: str, where: str
    ) -> tuple[int, ...]:
        """The tokens of a conversation, as the checkpoint's chat template writes it.

        Raises:
            ApiError: there is no template, or it refuses.
        """
        if self.template is None:
            message = f"This model has no chat template, which {where} needs. Nearest fix: use /v1/completions."
            raise ApiError(message, 400, param, "no_chat_template")
        (ids,) = encode(self.tokenizer, [self.template(messages, told)])
        if not ids:
            raise invalid(param, got="no text", allowed="have text in it", where=where, fix="add some")
        return self.known(ids, param=param, where=where)

    def form(self, asked: Mapping[str, Any] | None, *, param: str, where: str) -> Grammar | None:
        """What keeps an answer in the form that ``response_format`` asks for; None for plain text.

        Raises:
            ApiError: a schema that cannot be kept to.
        """
        if asked is None or asked["type"] == "text":
            return None
        schema: Mapping[str, Any] = {"type": "object"}
        if asked["type"] == "json_schema":
            inside = asked.get("json_schema", asked)
            param = f"{param}.json_schema.schema" if "json_schema" in asked else f"{param}.schema"
            schema = inside["schema"]
        try:
            with self._making:
                grammars = self._grammars
        except UsageError as error:  # a tokenizer that cannot be kept to a form
            raise ApiError(str(error), 400, param, "unsupported_parameter") from error
        return grammars.of(schema, param=param, where=where)

    @functools.cached_property
    def _grammars(self) -> Grammars:
        """Made when first asked for: it takes about a second with a large vocabulary."""
        return Grammars(self.tokenizer, vocab_size=self.vocab_size, eos=self.eos)
