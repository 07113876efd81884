"""The exceptions, and the one function that words them.

    TurnoutError
    ├── UsageError            the caller passed something that cannot work        (also a ValueError)
    │   ├── UnknownNameError  a name that is not on the list; the nearest is offered
    │   └── ShapeError        tensors or sizes that do not fit each other
    ├── DataError             the input data is empty, binary, unreadable or inconsistent  (also a ValueError)
    ├── CheckpointError       a file is missing, truncated, altered or not ours   (also a ValueError)
    ├── StorageError          a disk that is full, a folder without permission     (also an OSError)
    ├── TrainingError         training cannot go on: a loss that is not finite  (also a RuntimeError)
    ├── Interrupted           the user stopped the run; everything was saved
    └── MissingExtraError     an optional dependency is needed                     (also an ImportError)

Every message says what was passed, what is allowed, where, and the nearest fix. The command line prints
these without a traceback; any other exception is a defect of turnout and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "Interrupted",
    "MissingExtraError",
    "ShapeError",
    "StorageError",
    "TrainingError",
    "TurnoutError",
    "UnknownNameError",
    "UsageError",
    "nearest",
    "word",
]


class TurnoutError(Exception):
    """Anything that turnout reports to its user on purpose."""


class UsageError(TurnoutError, ValueError):
    """The caller passed something that cannot work."""


class UnknownNameError(UsageError):
    """A name that is not on the list of names."""


class ShapeError(UsageError):
    """Tensors or sizes that do not fit each other."""


class DataError(TurnoutError, ValueError):
    """Input data that is empty, binary, unreadable or inconsistent."""


class CheckpointError(TurnoutError, ValueError):
    """A saved file that is missing, truncated, altered or not one of ours."""


class StorageError(TurnoutError, OSError):
    """A disk that is full, a folder that cannot be written, a path that is not what it should be."""


class TrainingError(TurnoutError, RuntimeError):
    """Training cannot go on."""


class Interrupted(TurnoutError):
    """The user stopped the run after everything was saved."""


class MissingExtraError(TurnoutError, ImportError):
    """An optional dependency is needed for this."""


def word(what: str, *, got: object, allowed: str, where: str, fix: str) -> str:
    """The sentence for an error: what is wrong, what was passed, what is allowed, where, and the fix.

    Args:
        what: the thing that is wrong, as the caller knows it: ``"top_k"``, ``"the data folder"``.
        got: what was passed; shown with ``repr`` unless it is already a ``str``.
        allowed: what would have been accepted, to follow the word "must": ``"be between 1 and 8"``.
        where: the function, field or file in question.
        fix: the nearest thing that would work, as an instruction.

    Returns:
        One line of text.

    >>> print(word("top_k", got=9, allowed="be between 1 and num_experts=8", where="turnout.decide.token.TopK",
    ...            fix="pass top_k=8"))
    top_k must be between 1 and num_experts=8 in turnout.decide.token.TopK; got 9. Nearest fix: pass top_k=8.

    Source: none; the four things that scikit-learn's messages say.
    """
    shown = got if isinstance(got, str) else repr(got)
    return f"{what} must {allowed} in {where}; got {shown}. Nearest fix: {fix}."


def nearest(name: str, names: Iterable[str], *, kind: str, where: str) -> UnknownNameError:
    """The error for an unknown name, with the nearest known one and the whole list.

    Args:
        name: what was passed.
        names: what exists.
        kind: what sort of thing is named: ``"recipe"``, ``"field"``.
        where: the function or command that looked it up.

    Returns:
        The exception, for the caller to raise.

    >>> print(nearest("tinny", ["tiny", "demo"], kind="recipe", where="turnout train"))
    unknown recipe 'tinny' in turnout train. Did you mean 'tiny'? Available: demo, tiny.

    Source: none; the same in other letters, or difflib's closest match. It is offered, never taken.
    """
    known = sorted(names)
    close = [one for one in known if one.lower() == name.lower()] or difflib.get_close_matches(
        name, known, n=1, cutoff=0.5
    )
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownNameError(f"unknown {kind} {name!r} in {where}.{hint} Available: {', '.join(known)}.")
