"""What routers of adapters may know of a call: what ``given`` says, and what the model was called with."""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.types import Given
from turnout.types.recall import in_backward, recall

__all__ = ["given"]

_WHERE = "turnout.layers.Adapter"
_WAS = "_turnout_was"  # the class of a model before it listened
# The parameters of a model that hold its tokens, each with the one that says which of them are padding.
_TOKENS = {
    "input_ids": "attention_mask",
    "inputs_embeds": "attention_mask",
    "decoder_input_ids": "decoder_attention_mask",
    "decoder_inputs_embeds": "decoder_attention_mask",
    "encoder_hidden_states": "encoder_attention_mask",
    "encoder_outputs": "attention_mask",
    "labels": "decoder_attention_mask",
}
# And those of pictures and sounds: what comes in has another length than what the layers see.
_SIGNALS = ("pixel_values", "input_features", "input_values")


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What one call of a model was told: the lengths of its sequences, and of each what masks them."""

    batch: int | None
    parts: tuple[tuple[int | None, Any], ...]
    outer: "_Call | None"
    position: Any = None  # of each token, as the model was told


@dataclasses.dataclass(frozen=True, eq=False)
class _Said:
    """What ``given`` said, in the shapes of the model's own input, and the innermost call of a model."""

    mask_BS: Tensor | None = None
    task_B: Tensor | None = None
    query_BQ: Tensor | None = None
    kind_BS: Tensor | None = None
    label_B: Tensor | None = None
    batch: int | None = None
    call: _Call | None = None
    backward: int = -1  # the backward pass that it was said in


_NOTHING = _Said()
# One a thread, and put back by ``finally``: two calls at once, or one that was interrupted, never hear each other.
_SAID: contextvars.ContextVar[_Said] = contextvars.ContextVar("turnout_given", default=_NOTHING)


@contextlib.contextmanager
def given(
    *,
    mask_BS: Tensor | None = None,
    task_B: Tensor | None = None,
    query_BQ: Tensor | None = None,
    kind_BS: Tensor | None = None,
    label_B: Tensor | None = None,
    batch: int | None = None,
) -> Iterator[None]:
    """Says, for all calls inside, what routers of adapters may want to know about the sequences of the batch.

    What an inner ``given`` leaves out holds as the outer one said it. It holds in this thread, and in what
    ``torch.utils.checkpoint`` runs again of the calls inside, wherever and whenever their backward pass is.

    Args:
        mask_BS: (B, S) true at tokens, false at padding; with a KV cache the last columns belong to the new tokens.
            A model that ``turnout.reshape.attach`` changed reads it from ``attention_mask`` by itself.
        task_B: (B,) int64, the number of each sequence's task.
        query_BQ: (B, Q) an embedding of each sequence's request.
        kind_BS: (B, S) int64, the kind of each token (its modality); with a KV cache the last columns belong to the new
            tokens.
        label_B: (B,) int64, what each sequence is labelled as, for routers that learn from it; say it in training only.
        batch: B, needed only where linear maps see tokens without a batch axis.

    >>> import torch
    >>> with given(task_B=torch.tensor([0])):
    ...     pass

    Source: none; plain bookkeeping.
    """
    outer = _SAID.get()
    inner = _Said(
        outer.mask_BS if mask_BS is None else mask_BS,
        outer.task_B if task_B is None else task_B,
        outer.query_BQ if query_BQ is None else query_BQ,
        outer.kind_BS if kind_BS is None else kind_BS,
        outer.label_B if label_B is None else label_B,
        outer.batch if batch is None else batch,
        outer.call,
        in_backward(),
    )
    try:
        _SAID.set(inner)  # inside, so that no interrupt falls between
        yield
    finally:
        _SAID.set(outer)


# ---- what a model is called with


class Listening:
    """What ``listening`` adds to a model's class.

    Source: none; plain bookkeeping.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the class that the model had: classes made while running cannot be pickled by name."""
        made = super().__reduce_ex__(max(int(protocol), 2))
        was, extra = getattr(type(self), _WAS)
        return (_again, (was, extra), *made[2:])


def listens(module: nn.Module) -> bool:
    """Whether a module is a model in itself: one that is told its tokens and their mask, or is shown something."""
    names = _parameters(type(module).forward)
    told = "attention_mask" in names and any(name in names for name in ("input_ids", "inputs_embeds"))
    return told or any(name in names for name in _SIGNALS)


def listen(module: nn.Module, extra: tuple[type, ...] = ()) -> None:
    """From now on the layers in this module know what it is called with; until ``unlisten``.

    Its class gets a subclass whose ``forward`` says it: a hook is passed over by whoever calls ``forward`` itself, and
    by an interrupt; a function set on the instance would be shared by its copies and replicas.

    Raises:
        UsageError: the module's ``forward`` was replaced on the instance.
    """
    if "forward" in vars(module):
        got, allowed = "a forward that was set on the instance", "have the forward of its class"
        fix = "attach first, and let accelerate or others wrap the model after that"
        raise UsageError(word("the model", got=got, allowed=allowed, where="turnout.reshape.attach", fix=fix))
    if not hasattr(type(module), _WAS):
        module.__class__ = listening(type(module), extra)


def unlisten(module: nn.Module) -> None:
    """Gives the module the class back that it had."""
    if (was := getattr(type(module), _WAS, None)) is not None:
        module.__class__ = was[0]


@functools.cache
def listening(was: type[nn.Module], extra: tuple[type, ...]) -> type[nn.Module]:
    """The class of models that say to their layers what they are called with; named as the class they had."""
    body = {"__module__": was.__module__, "__qualname__": was.__qualname__, "__doc__": was.__doc__}
    body |= {"forward": _telling(was.forward), _WAS: (was, extra)}  # pyrefly: ignore[unsupported-operation]
    return type(was)(was.__name__, (Listening, *extra, was), body)


def _again(was: type[nn.Module], extra: tuple[type, ...]) -> nn.Module:
    made = listening(was, extra)
    return made.__new__(made)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names that a forward's arguments are bound to, in their order, without ``self``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [one for one in inspect.signature(forward).parameters.values() if one.kind in kinds]
    return tuple(one.name for one in named[1:])


def _telling(forward: Callable[..., Any]) -> Callable[..., Any]:
    names = _parameters(forward)

    @functools.wraps(forward)
    def told(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        outer = _SAID.get()
        bound = {**dict.fromkeys(names), **dict(zip(names, arguments, strict=False)), **keywords}
        call = _call(bound, arguments, outer.call)
        try:
            _SAID.set(dataclasses.replace(outer, call=call, backward=in_backward()))
            return forward(self, *arguments, **keywords)
        finally:
            _SAID.set(outer)

    return told


def _call(told: Mapping[str, Any], arguments: Sequence[Any], outer: _Call | None) -> _Call:
    """What these arguments say. A call without a mask has none, whatever the calls around it were told."""
    parts: list[tuple[int | None, Any]] = []
    batch: int | None = None
    decodes = any(told.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    for name, mask in _TOKENS.items():
        tokens = told.get(name)
        if name == "encoder_outputs" and tokens is not None and not isinstance(tokens, Tensor):
            tokens = tokens[0]
        if not isinstance(tokens, Tensor) or tokens.ndim < 2 or (name == "labels" and mask not in told):
            continue
        batch = tokens.shape[0] if batch is None else batch
        if name != "labels" or not decodes:
            parts.append((tokens.shape[1], told.get(mask)))
    if isinstance(kept := told.get("logits_to_keep"), int) and kept and parts:  # what the head sees
        parts.append((min(kept, parts[-1][0] or kept), parts[-1][1]))
    if batch is None:  # no model of transformers: the first tensor has the batch, and what its lengths are is open
        first = next((one for one in (*arguments, *told.values()) if isinstance(one, Tensor) and one.ndim), None)
        batch = None if first is None else first.shape[0]
        mask, signal = told.get("attention_mask"), any(told.get(name) is not None for name in _SIGNALS)
        parts = [(mask.shape[-1] if signal and isinstance(mask, Tensor) else None, mask)]
    return _Call(batch, tuple(parts), outer, told.get("position_ids"))


# ---- what a layer asks


def about(x: Tensor) -> Given:
    """What ``given`` and the call of the model said, for the flattened tokens of x (..., D).

    Raises:
        UsageError: how many sequences there are is not known, or what was said in the forward pass.
        ShapeError: what was said does not fit x.
    """
    return _given(recall(("given", tuple(x.shape)), _now), x)


def real(x: Tensor) -> Tensor | None:
    """(T,) bool, false where the tokens of x (..., D) are padding, as was said; None where nothing is.

    Raises:
        UsageError: what was said in the forward pass is not known.
        ShapeError: it does not fit x.
    """
    said = recall(("given", tuple(x.shape)), _now)
    heard = said.call is not None and any(mask is not None for _, mask in said.call.parts)
    keep_T = _given(said, x).keep_T if heard or said.mask_BS is not None else None
    return None if keep_T is None or bool(keep_T.all()) else keep_T


def _given(said: _Said, x: Tensor) -> Given:
    tokens, call = x.shape[:-1].numel(), said.call
    batch = x.shape[0] if x.ndim > 2 else _batch(said)
    if batch is None:
        if x.ndim > 1:
            fix = "pass x with a batch axis, or call inside `with turnout.layers.given(batch=...):`"
            allowed = "have a batch axis, (B, S, D), for a router of sequences"
            got = f"shape {tuple(x.shape)}"
            raise UsageError(word("x", got=got, allowed=allowed, where=_WHERE, fix=fix))
        batch = 1
    each = tokens // max(batch, 1)
    lengths = [length for length, _ in (() if call is None else call.parts) if length is not None]
    if each * batch != tokens or (x.ndim == 2 and lengths and each not in lengths):
        raise _misfit(f"x {tuple(x.shape)}, batch {batch}, sequences of {lengths or 'any'} tokens")
    mask_BS = _mask(said, batch, each)
    keep_T = None
    if mask_BS is not None and each:
        keep_T = mask_BS[:, mask_BS.shape[1] - each :].reshape(-1).to(x.device).bool()
    if call is not None:
        _refuse_packed(call.position, keep_T, batch, each)
    told = {"task_B": said.task_B, "query_BQ": said.query_BQ, "label_B": said.label_B}
    if said.kind_BS is not None:
        if said.kind_BS.ndim != 2 or said.kind_BS.shape[0] != batch or said.kind_BS.shape[1] < each:
            raise _misfit(f"{batch} sequences of {each} tokens, kind_BS {tuple(said.kind_BS.shape)}")
        told["kind_T"] = said.kind_BS[:, said.kind_BS.shape[1] - each :].reshape(-1).to(x.device)
    return Given.of(batch, tokens, keep_T=keep_T, **told, device=x.device)


def _refuse_packed(position: Any, keep_T: Tensor | None, batch: int, each: int) -> None:
    """Refuses rows of several sequences each, whose positions begin anew: attention keeps those apart."""
    if not isinstance(position, Tensor) or position.ndim != 2 or position.shape[1] != each or each < 2:
        return
    back_BS = position[:, 1:] <= position[:, :-1]
    if keep_T is not None:
        keep_BS = keep_T.view(batch, each)
        back_BS = back_BS & (keep_BS[:, 1:] & keep_BS[:, :-1]).to(back_BS.device)
    if bool(back_BS.any()):
        got, fix = (
            "rows whose positions begin anew",
            "give each sequence a row of its own, padded, with its attention_mask",
        )
        allowed = "hold one sequence a row for a router of sequences, which would take several for one"
        raise UsageError(word("the batch", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _now() -> _Said:
    """What holds here and now; a backward pass that torch.utils.checkpoint knows nothing of is refused."""
    said, backward = _SAID.get(), in_backward()
    if backward not in (-1, said.backward):
        got, allowed = "run again by something else", "be recomputed by torch.utils.checkpoint"
        fix = "use torch.utils.checkpoint, or call the whole model, inside given(...), in what is recomputed"
        raise UsageError(word("a layer in a backward pass", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return said


def _batch(said: _Said) -> int | None:
    """How many sequences there are, where x does not show it."""
    if said.call is not None and said.call.batch is not None:
        return said.call.batch
    if said.batch is not None or said.mask_BS is None:
        return said.batch
    return said.mask_BS.shape[0]


def _mask(said: _Said, batch: int, each: int) -> Tensor | None:
    """(B, S) which tokens count, for a layer that sees ``each`` tokens of each sequence; None where all do."""
    mask = said.mask_BS if said.call is None else _heard(said.call, said.mask_BS, batch, each)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        allowed = "be (B, S), true at tokens"
        fix = "pass the tokenizer's attention_mask, or say it with turnout.layers.given(mask_BS=...)"
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ShapeError(word("the mask", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if mask.shape[0] != batch or mask.shape[1] < each:
        raise _misfit(f"{batch} sequences of {each} tokens, mask {tuple(mask.shape)}")
    if mask.is_floating_point() and bool((mask < 0).any()):
        got, allowed = "numbers below 0, as are added to scores", "be 1 at tokens and 0 at padding"
        raise ShapeError(word("the mask", got=got, allowed=allowed, where=_WHERE, fix="pass the tokenizer's mask"))
    return mask


def _heard(call: _Call, otherwise: Tensor | None, batch: int, each: int) -> Any:
    """The mask of the call's sequences of this length; ``otherwise`` where it was told none."""
    found: list[Any] = []
    for length, mask in call.parts:
        if length in (None, each) and not any(mask is one for one in found):
            found.append(_flat(mask, call, otherwise, batch, each))
    if len(found) == 1:
        return otherwise if found[0] is None else found[0]
    masks = [mask for _, mask in call.parts if mask is not None]
    if otherwise is not None or all(isinstance(mask, Tensor) and bool((mask > 0).all()) for mask in masks):
        return otherwise  # nothing is padding, whichever it is
    lengths = [length for length, _ in call.parts]
    raise _misfit(f"{batch} sequences of {each} tokens in a call with sequences of {lengths}, some of it padding")


def _flat(mask: Any, call: _Call, otherwise: Tensor | None, batch: int, each: int) -> Any:
    """A mask that says who sees whom does not say what is padding: then the call around, or ``given``, has said it."""
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if otherwise is not None:
        return otherwise
    around = call.outer
    while around is not None and around.batch == batch:
        for length, outer in around.parts:
            if length == each and (outer is None or (isinstance(outer, Tensor) and outer.ndim == 2)):
                return outer
        around = around.outer
    return mask


def _misfit(got: str) -> ShapeError:
    fix = "give the mask of this very batch; a router of sequences cannot choose where their tokens are mixed or cut"
    allowed = "be of the same sequences"
    return ShapeError(word("x and given", got=got, allowed=allowed, where=_WHERE, fix=fix))
