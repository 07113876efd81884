"""Mistakes that can be known before torch loads, which takes seconds: paths that are not there."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from turnout.errors import UsageError, word
from turnout.hub import is_hub_id, located, offline

__all__ = ["check_data", "check_folder", "check_seed", "check_there", "check_writable"]


def check_there(what: str, paths: Iterable[str | None], where: str, *, hub: bool = False) -> None:
    """Refuses a path that does not exist, with the nearest name beside it.

    Args:
        what: the path as the user knows it: ``"RUN"``, ``"--prompts"``.
        paths: what was given; None is passed over.
        where: the command.
        hub: whether it may also be a model of the hub; where nobody may ask that, it must be in the cache.

    Raises:
        UsageError: one of them is not there.

    >>> check_there("RUN", ["/", None], "turnout eval")

    Source: none; plain bookkeeping.
    """
    for given in filter(None, paths):
        path = Path(given)
        if path.exists():
            continue
        folder = path.parent
        names = [one.name for one in folder.iterdir()] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        fix = f"did you mean {folder / close[0]}?" if close else "check the spelling of the path"
        if hub and is_hub_id(given):
            try:
                if offline():
                    located(given, where=where)
                continue
            except UsageError:
                if not close:
                    raise
        if hub and len(path.parts) == 1:
            if located(given, where=where).repo is not None:
                continue
            fix += "" if close else f"; a model of the hub has an owner before its name: ORG/{given}"
        got = f"{path}, which does not exist"
        raise UsageError(word(what, got=got, allowed="exist", where=where, fix=fix.rstrip("?") if close else fix))


def check_seed(seed: int, where: str) -> None:
    """Refuses a seed that torch's generators do not take.

    Raises:
        UsageError: it has more than 64 bits.

    >>> check_seed(0, "turnout convert")

    Source: none; the range of torch.Generator.manual_seed.
    """
    if not -(1 << 63) <= seed < 1 << 64:
        allowed = "be a whole number of 64 bits"
        raise UsageError(word("--seed", got=seed, allowed=allowed, where=where, fix="pass --seed 0"))


def check_writable(where: str, **paths: str | None) -> None:
    """Refuses files that cannot be written, before the work whose result they are for, and two that are one.

    Args:
        where: the command.
        paths: of each option (``out`` of ``--out``) what was given; None is passed over.

    Raises:
        UsageError: a folder is there, or a file where its folder should be; or both have one name.

    >>> check_writable("turnout plan", out="new/plan.json", html=None)

    Source: none; plain bookkeeping.
    """
    seen: dict[Path, str] = {}
    for name, given in paths.items():
        if given is None:
            continue
        path, fix = Path(given), "choose another path"
        above = next((each for each in path.absolute().parents if each.exists()), None)
        got = f"{path}, which is a folder" if path.is_dir() else ""
        got = f"{path}, and {above} is a file" if above is not None and not above.is_dir() else got
        if path.absolute() in seen:
            got = f"{path}, which --{seen[path.absolute()]} is too"
        if got:
            raise UsageError(word(f"--{name}", got=got, allowed="be a file of its own", where=where, fix=fix))
        seen[path.absolute()] = name


def check_folder(out: str | None, where: str) -> None:
    """Refuses a folder to write that is, or lies below, a file."""
    path = Path(out or ".").absolute()
    if not (above := next(each for each in (path, *path.parents) if each.exists())).is_dir():
        got, fix = f"{out}, and {above} is a file", "choose another path"
        raise UsageError(word("--out", got=got, allowed="be a folder", where=where, fix=fix))


def check_data(texts: Iterable[str], where: str) -> None:
    """The same for ``--data [NAME=]PATH``; names of data sets are left to whoever loads them.

    Raises:
        UsageError: a path is not there.
    """
    paths = [text if "=" not in text or "/" in text.partition("=")[0] else text.partition("=")[2] for text in texts]
    check_there("--data", [path for path in paths if not path.startswith("hf:")], where)
