"""What a function must be given first: one check for all that take a model, a folder or numbers, and its words.

    @expects(lm=LM)
    def upcycle(lm: LM, *, num_experts: int) -> ...

A model of transformers where one of turnout belongs, a name where the model itself does, a model where its folder does:
each is told what it is, what would be right, and how to get from one to the other. Other arguments are the function's.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from turnout.errors import UsageError, word

__all__ = ["CALLED", "MODELS", "NUMBER", "PATH", "POLICY", "Kind", "expect", "expects", "several"]

P = ParamSpec("P")
R = TypeVar("R")
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an argument must be.

    Args:
        fits: whether a value is that.
        words: what it is called: "a path".
        fix: what to pass.

    >>> PATH.fits("models/x"), PATH.fits(3)
    (True, False)

    Source: none; plain bookkeeping.
    """

    fits: Callable[[object], bool]
    words: str
    fix: str


def _models(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(one, nn.Module) for one in value.values())
    return isinstance(value, Sequence | nn.ModuleList) and all(isinstance(one, nn.Module) for one in value)


PATH = Kind(lambda value: isinstance(value, str | os.PathLike), "a path", "pass the path as text or pathlib.Path")
MODELS = Kind(_models, "a list of models", "pass the loaded models: [model, other]")
NUMBER = Kind(lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number", "pass a number")
POLICY = Kind(lambda value: value is None or isinstance(value, nn.Module), "a router, a module", "pass a built router")
CALLED = Kind(callable, "a model or function", "pass the loaded model, or a function")


def several(*types: type, also: tuple[type, ...] = ()) -> Kind:
    """A list or tuple of values of these types, or one of ``also`` by itself.

    >>> several(int).fits([1, 2]), several(int).fits(3), several(int, also=(int,)).fits(3)
    (True, False, True)

    Source: none; plain bookkeeping.
    """
    names = " or ".join(one.__name__ for one in types)
    single = "".join(f"{_article(one.__name__)}, " for one in also)

    def fits(value: object) -> bool:
        whole = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return isinstance(value, also) or (whole and all(isinstance(one, types) for one in value))

    return Kind(fits, f"{single}{'or ' if also else ''}a list of {names}", f"pass a list of {names}")


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIO' or name.startswith('LM') else 'a'} {name}"


def expect(name: str, value: object, kind: "Kind | type | tuple[type, ...]", where: str, *, call: str = "") -> None:
    """Refuses a value that is not what it must be; for constructors, which ``expects`` would hide from type checkers.

    Args:
        name: of the parameter.
        value: what was passed.
        kind: a type, several of which one is enough, or a ``Kind``.
        where: the function or class.
        call: how it is called, where the order of arguments may be the mistake.

    Raises:
        UsageError: names what was passed, what is allowed, and how to get it.

    >>> expect("path", "models/x", PATH, "turnout.models.checkpoint.load")

    Source: none; plain bookkeeping.
    """
    if not (kind.fits(value) if isinstance(kind, Kind) else isinstance(value, kind)):
        raise _refusal(name, value, kind, where, call)


def expects(**kinds: "Kind | type | tuple[type, ...]") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The function, which first looks whether the named arguments are what they must be.

    Args:
        kinds: parameter -> a type, several of which one is enough, or a ``Kind``.

    Raises:
        UsageError: from the function, names what was passed, what is allowed, and how to get it.

    >>> @expects(model=nn.Module)
    ... def count(model: nn.Module) -> int:
    ...     return len(list(model.parameters()))
    >>> count(nn.Linear(2, 2))
    2
    >>> count("mixtral")
    Traceback (most recent call last):
    turnout.errors.UsageError: model must be a model in turnout.count; got the text 'mixtral'. Nearest fix: load the...

    Source: none; plain bookkeeping.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        places = {name: list(parameters).index(name) for name in kinds}
        rooms = function.__module__.split(".")[:-1]
        where = ".".join([*(rooms if rooms[:1] == ["turnout"] else ["turnout"]), function.__name__])

        call = _call(function.__name__, parameters) if PATH in kinds.values() and len(kinds) > 1 else ""

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for one, kind in kinds.items():
                value = args[places[one]] if len(args) > places[one] else kwargs.get(one, _MISSING)
                if value is not _MISSING:
                    expect(one, value, kind, where, call=call)
            return function(*args, **kwargs)

        return checked

    return wrap


def _call(name: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    shown = [one.name for one in parameters.values() if one.kind is not one.KEYWORD_ONLY]
    return f"{name}({', '.join(shown)})" if len(shown) > 1 else ""


def _refusal(name: str, value: object, kind: "Kind | type | tuple[type, ...]", where: str, call: str) -> UsageError:
    if isinstance(kind, Kind):
        words, fix = kind.words, kind.fix
        if isinstance(value, str | os.PathLike) and kind in (CALLED, MODELS):
            fix = f"load it first: {_loaded(value)}"
        elif isinstance(value, nn.Module) and kind is MODELS:
            fix = "pass several, as a list: [model, other]"
        elif kind is POLICY and isinstance(value, str | type):
            known = value if isinstance(value, str) else value.__name__
            fix = f"build it: turnout.decide.token.{known}(width, num_experts, ...); only MoEConfig takes names"
    elif kind is nn.Module or getattr(kind, "__name__", "") == "LM":
        words, fix = ("a model", _to_module(value)) if kind is nn.Module else ("a turnout LM", _to_lm(value))
    else:
        names = [one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,))]
        words = " or ".join(map(_article, names))
        fix = f"pass {words}"
    fix += f"; the order is {call}" if call and isinstance(value, nn.Module | str | os.PathLike) else ""
    return UsageError(word(name, got=_shown(value), allowed=f"be {words}", where=where, fix=fix))


def _to_module(value: object) -> str:
    if isinstance(value, str | os.PathLike):
        return f"load the model first: {_loaded(value)}"
    return "pass one model after the other" if isinstance(value, list | tuple) else "pass the loaded model itself"


def _to_lm(value: object) -> str:
    read = "turnout.models.checkpoint.from_hf"
    if isinstance(value, str | os.PathLike):
        return f"read it first: {read}({os.fspath(value)!r}), or checkpoint.load for a folder of turnout's own"
    for inside in ("_orig_mod", "module"):  # of torch.compile, and of DistributedDataParallel
        if isinstance(value, nn.Module) and type(getattr(value, inside, None)).__name__ == "LM":
            return f"pass what it wraps: {_name(value)}.{inside}"
    if _is_foreign(value):
        return f"write it to a folder with save_pretrained(FOLDER), and pass {read}(FOLDER)"
    return f"pass turnout.models.LM(config), or {read}(FOLDER) for a folder of transformers"


def _name(value: object) -> str:
    """The name of a value's class."""
    return type(value).__name__


def _loaded(value: "str | os.PathLike[str]") -> str:
    shown = repr(os.fspath(value))
    return f"transformers.AutoModelForCausalLM.from_pretrained({shown}), or turnout.models.checkpoint.from_hf({shown})"


def _is_foreign(value: object) -> bool:
    return isinstance(value, nn.Module) and hasattr(getattr(value, "config", None), "model_type")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r:.80}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, os.PathLike):
        return f"the path {os.fspath(value)!s:.80}"
    if isinstance(value, nn.Module):
        return _article(_name(value)) + (" of transformers" if _is_foreign(value) else "")
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {_name(value)} of {len(value)}" if isinstance(value, list | tuple | dict) else f"a {_name(value)}"
