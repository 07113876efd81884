"""The checkpoint's own chat template: messages as the text that its model was taught to answer."""

import datetime
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from turnout.errors import CheckpointError, MissingExtraError, word
from turnout.reading import read_json, read_text
from turnout.serve.http.errors import ApiError

__all__ = ["ChatTemplate"]

_WHERE = "turnout serve"
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
# Those of transformers' special_tokens_map.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A chat template as transformers renders it, in Jinja's sandbox, where it reaches nothing but what it is told.

    Args:
        source: the template.
        told: what it is told besides the messages: special tokens by their names.

    Raises:
        CheckpointError: it is not one.
        MissingExtraError: Jinja2 is not installed.

    >>> template = ChatTemplate("{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}{{ eos_token }}",
    ...                         {"eos_token": "</s>"})
    >>> template([{"role": "user", "content": "Hi"}])
    '<user>Hi</s>'

    Source: ``apply_chat_template`` of transformers.
    """

    def __init__(self, source: str, told: Mapping[str, Any]) -> None:
        self.source, self._told = source, dict(told)
        self._render, self._errors = _compiled(source)

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """That of a checkpoint: ``chat_template.jinja``, or what ``tokenizer_config.json`` says; None without one.

        Raises:
            CheckpointError: what is there is no template.
        """
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        source = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            source = read_text(folder / "chat_template.jinja")
        if isinstance(source, list):  # several by name, as for tools and for documents
            named = {one.get("name"): one.get("template") for one in source if isinstance(one, Mapping)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise _refusal(f"a {type(source).__name__} in {folder}", "correct chat_template in tokenizer_config.json")
        return cls(source, _special_tokens(folder, config))

    def __call__(self, messages: Sequence[Mapping[str, Any]], told: Mapping[str, Any] | None = None) -> str:
        """The text that a model goes on from to answer.

        Args:
            messages: each with a role and a content.
            told: what this template is told besides; ``{"enable_thinking": False}`` for some.

        Raises:
            ApiError: the template refuses them, or is told what is not the caller's to say.
        """
        if taken := [name for name in told or {} if name in _RESERVED]:
            got, allowed = f"{taken[0]!r}", "name what the template is told besides the messages"
            raise _unrendered("chat_template_kwargs", got, allowed, "leave it out")
        # A template that knows no developer would pass such a message over, or stumble.
        known = "developer" in self.source
        chat = [
            {**one, "role": "system"} if one["role"] == "developer" and not known else dict(one) for one in messages
        ]
        # Under both names, in the order of transformers, which a template shows that writes messages as JSON.
        chat = [
            {"thinking": one["reasoning_content"], **one} if one.get("reasoning_content") is not None else one
            for one in chat
        ]
        fixed = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self._render(**{**self._told, **(told or {}), **fixed})
        except self._errors as error:
            allowed = "be a conversation that the checkpoint's chat template takes"
            raise _unrendered(
                "messages", f"its refusal: {error!s:.300}", allowed, "change their order or roles"
            ) from error


def _compiled(source: str) -> tuple[Callable[..., str], tuple[type[Exception], ...]]:
    """What renders a template, and what it raises."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise MissingExtraError(f"{_WHERE} needs Jinja2. Nearest fix: pip install 'turnout[serve]'.") from error

    class Generation(jinja2.ext.Extension):
        """``{% generation %}``, which marks what the assistant says for training: here its text alone."""

        tags = frozenset({"generation"})  # type: ignore[assignment] - Jinja only looks names up in it

        def parse(self, parser: Any) -> Any:
            """What stands between it and its end."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Callable[[], str]) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """One on which nothing of Python's own can be written."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not write {name!r}")
            super().__setitem__(name, value)

    def refuse(message: str) -> typing.NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    def namespace(*args: Any, **values: Any) -> Namespace:
        made = Namespace()
        for key, value in dict(*args, **values).items():
            made[key] = value
        return made

    extensions = [Generation, jinja2.ext.loopcontrols]
    world = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    world.filters["tojson"] = _to_json
    told: Any = world.globals
    told.update({"raise_exception": refuse, "strftime_now": _now, "namespace": namespace})
    try:
        render = world.from_string(source).render
    except jinja2.exceptions.TemplateError as error:
        raise _refusal(f"{error!s:.200} (line {getattr(error, 'lineno', '?')})", "correct it") from error
    # Of what a template does with a conversation that it was not written for; undefined names among them.
    return render, (jinja2.exceptions.TemplateError, TypeError, ValueError, LookupError, ArithmeticError)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter ``tojson`` without the escapes for HTML that Jinja's own makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name, as a template is told them."""
    older = folder / "special_tokens_map.json"
    known = {**(read_json(older) if older.is_file() else {}), **config}
    found = {name: known.get(name) for name in _SPECIAL}
    texts = {name: one.get("content") if isinstance(one, Mapping) else one for name, one in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _refusal(got: str, fix: str) -> CheckpointError:
    what, allowed = "the checkpoint's chat template", "be a template of Jinja"
    return CheckpointError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))


def _unrendered(param: str, got: str, allowed: str, fix: str) -> ApiError:
    return ApiError(
        word(param, got=got, allowed=allowed, where="the chat template", fix=fix), 400, param, "chat_template"
    )
