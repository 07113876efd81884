"""From the fields of a request, once they are checked, to what the engine is asked."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from turnout.models.draw import Drawing
from turnout.serve.engine import Request
from turnout.serve.http.errors import ApiError, invalid
from turnout.serve.http.texts import Texts

__all__ = ["check_choices", "drawing", "fitting", "requests"]


def drawing(body: Mapping[str, Any], *, vocab_size: int, where: str) -> Drawing:
    """How tokens are drawn: OpenAI's fields, and vLLM's names for what OpenAI has none for.

    Args:
        body: the request.
        vocab_size: V of the model.
        where: the endpoint.

    Raises:
        ApiError: a bias of what is no token.

    >>> drawing({"temperature": 0, "top_p": 0.5}, vocab_size=9, where="/v1/completions").top_p is None
    True
    >>> drawing({"top_k": -1, "logit_bias": {"3": -100}}, vocab_size=9, where="/v1/completions").logit_bias
    {3: -100}

    Source: none; the fields of OpenAI's API.
    """
    temperature, penalty = _given(body, "temperature", 1.0), _given(body, "repetition_penalty", 1.0)
    further = {name: _given(body, name, 0.0) for name in ("frequency_penalty", "presence_penalty")}
    further |= {"repetition_penalty": penalty, "logit_bias": _bias(body.get("logit_bias"), vocab_size, where)}
    if temperature == 0:  # the others have no effect there, and clients send them all the same
        return Drawing(temperature=temperature, **further)
    top_k, top_p, min_p = (_given(body, name, None) for name in ("top_k", "top_p", "min_p"))
    top_k = top_k if top_k is not None and top_k > 0 else None
    return Drawing(temperature, top_k, None if top_p == 1 else top_p, min_p or None, **further)


def _bias(given: Mapping[str, float] | None, vocab_size: int, where: str) -> dict[int, float] | None:
    """By token; None for none. JSON has texts alone for names."""
    for name in given or ():
        if not (name.isascii() and name.isdecimal() and len(name) < 12 and str(int(name)) == name) or (
            int(name) >= vocab_size
        ):
            allowed, fix = f"be by token ids from 0 to {vocab_size - 1}", 'pass {"7": -1.5}'
            raise invalid("logit_bias", got=f"{name!r:.80}", allowed=allowed, where=where, fix=fix)
    return {int(name): value for name, value in given.items()} if given else None


def fitting(prompt: Sequence[int], asked: int | None, default: int | None, max_seq: int | None, name: str) -> int:
    """How many tokens are added at most.

    Args:
        prompt: its tokens.
        asked: what the caller said; None for nothing.
        default: what it is then, if that fits; None for all that fit.
        max_seq: the longest text that the model takes; None where none is known.
        name: of the field that says how many.

    Raises:
        ApiError: the model does not take that many.

    >>> fitting([1, 2], None, 16, 10, "max_tokens"), fitting([1, 2], None, None, 10, "max_tokens")
    (8, 8)

    Source: none; OpenAI's ``context_length_exceeded``.
    """
    if max_seq is None:
        return asked or default or 16
    room = max_seq - len(prompt)
    if room >= (asked or 1):
        return asked or min(default or room, room)
    fix = f"pass {name}={room}" if room > 0 else f"shorten the prompt to at most {max_seq - 1} tokens"
    message = (
        f"This model's maximum context length is {max_seq} tokens. However, {len(prompt)} are in the prompt and "
        f"{asked or 'at least 1'} asked for in the completion. Nearest fix: {fix}."
    )
    raise ApiError(message, 400, name if room > 0 else "prompt", "context_length_exceeded")


def requests(
    body: Mapping[str, Any],
    prompts: Sequence[tuple[int, ...]],
    texts: Texts,
    *,
    tokens: Sequence[int],
    logprobs: int | None,
    form: Mapping[str, Any] | None,
    form_param: str,
    adapter: str | None,
    tenant: str,
    where: str,
) -> list[Request]:
    """What the engine is asked: of each prompt ``n`` texts, which differ where they are drawn.

    Args:
        body: the request.
        prompts: their tokens.
        texts: of the model.
        tokens: how many are added to each prompt at most.
        logprobs: how many of the likeliest tokens each comes with.
        form: what ``response_format`` says.
        form_param: what that is called here.
        adapter: who answers.
        tenant: who asks.
        where: the endpoint.

    Raises:
        ApiError: a setting that cannot be.

    Source: none; plain bookkeeping.
    """
    stop = body.get("stop")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    found, seed = list[Request](), body.get("seed")
    how = drawing(body, vocab_size=texts.vocab_size, where=where)
    grammar = texts.form(form, param=form_param, where=where)
    for prompt, most in zip(prompts, tokens, strict=True):
        for copy in range(_given(body, "n", 1)):
            found.append(
                Request(
                    prompt,
                    most,
                    drawing=how,
                    eos=() if body.get("ignore_eos") else texts.eos,
                    stop=stops,
                    keep_stop=bool(body.get("include_stop_str_in_output")),
                    seed=None if seed is None else _seed(seed, copy),
                    logprobs=logprobs,
                    mask=None if grammar is None else grammar.copy(),
                    adapter=adapter,
                    tenant=tenant,
                    routes=bool(body.get("routes")),
                )
            )
    return found


def check_choices(count: int, most: int, where: str) -> None:
    """Refuses more texts at once than one request may ask for.

    Raises:
        ApiError: there are more.
    """
    if count > most:
        allowed, fix = f"be at most {most} texts in all", "ask for fewer, in several requests"
        raise invalid("n", got=f"{count} of all prompts together", allowed=allowed, where=where, fix=fix)


def _given(body: Mapping[str, Any], name: str, default: Any) -> Any:
    """What a field says; null is nothing."""
    found = body.get(name)
    return default if found is None else found


def _seed(seed: int, copy: int) -> int:
    """The seed of one of several texts; of the first that which was passed."""
    if copy == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}:{copy}".encode(), digest_size=7).digest(), "little")
