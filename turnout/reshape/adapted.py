"""A choice of adapters on disk: their folders as PEFT wrote them, and which router takes which of them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from turnout.errors import CheckpointError, UsageError, nearest, word
from turnout.layers import Adapter
from turnout.models.checkpoint.own import read_json
from turnout.models.checkpoint.peft import PeftAdapter, read_adapter, write_adapter
from turnout.reshape.attach import CHOICE, attach
from turnout.reshape.learned import ROUTERS_FILE, load_routers, save_routers
from turnout.reshape.routers import GATED, ROUTERS, check_options
from turnout.storage import read_error, write_whole
from turnout.types import Report

__all__ = ["adapters_of", "attach_folder", "save_adapters", "save_attached"]

_FORMAT = "turnout.adapters/1"
_FILE = "adapters.json"
_WHERE = "turnout.reshape.attach_folder"


def save_adapters(
    path: str | Path,
    adapters: Sequence[str | Path],
    *,
    router: str,
    router_options: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> Report:
    """Writes a folder that ``attach_folder`` puts on a model: copies of the adapters, and the name of the router.

    Each ``adapters/NAME`` in it is still a folder of PEFT. ``adapters.json`` is written last, so that a folder that was
    not finished never passes for whole.

    Args:
        path: the new folder.
        adapters: folders of PEFT.
        router: by name, as in ``attach``.
        router_options: keywords of the router; only what JSON can hold, and tensors.
        base: the path or name of the model they belong to.

    Returns:
        A report; there is no model here to change.

    Raises:
        CheckpointError: an adapter's folder is not whole.
        UsageError: the folder holds something, two adapters have one name, or the router takes no such options.

    >>> import tempfile, torch
    >>> from turnout.models.checkpoint import PeftAdapter, write_adapter
    >>> place = Path(tempfile.mkdtemp())
    >>> write_adapter(place / "a", PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}))
    >>> save_adapters(place / "out", [place / "a"], router="arrow")["adapters"]
    ['a']

    Source: none; the folder format of PEFT, several times.
    """
    path, where = Path(path), "turnout.reshape.save_adapters"
    _refuse_existing(path, where)
    found = [(folder, read_adapter(folder)) for folder in adapters]
    names = [one.name for _, one in found]
    _refuse_names(names, where)
    if router not in ROUTERS:
        raise nearest(router, ROUTERS, kind="router", where=where)
    check_options(router, router_options or {}, len(names), where=where)
    for folder, one in found:
        place = path / "adapters" / one.name
        place.mkdir(parents=True)
        for file in sorted(Path(folder).iterdir()):
            if file.is_file() and file.suffix in (".json", ".safetensors", ".md"):
                shutil.copyfile(file, place / file.name)
    _describe(path, base, router, router_options, names)
    return Report("save_adapters", {"adapters": names, "router": router})


def adapters_of(model: nn.Module) -> list[PeftAdapter]:
    """The adapters of an attached model as they are now, for instance after training; copies.

    Args:
        model: one that ``attach`` gave adapters.

    Raises:
        UsageError: it has none.

    >>> import torch
    >>> one = PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 0.5)})
    >>> model, _ = attach(nn.Sequential(nn.Linear(8, 4)), [one])
    >>> [(one.name, one.factor["0"][2]) for one in adapters_of(model)]
    [('a', 0.5)]

    Source: none; plain bookkeeping.
    """
    factor: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    if not layers:
        fix, where = "call turnout.reshape.attach first", "turnout.reshape.adapters_of"
        raise UsageError(word("model", got="no adapters", allowed="have adapters", where=where, fix=fix))
    for module, layer in layers.items():
        for n, name in enumerate(layer.names):
            a, b, scale = layer.paths.factors(n)
            factor.setdefault(name, {})[module] = (a.detach().clone(), b.detach().clone(), scale)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return [PeftAdapter(name, base, found) for name, found in factor.items()]


def save_attached(path: str | Path, model: nn.Module) -> Report:
    """Writes the adapters and the routers of a model as they are now to a folder that ``attach_folder`` reads.

    What ``save_adapters`` writes, with each adapter a folder of PEFT, and ``routers.safetensors`` beside them. The
    folder is made aside and takes its name when it is whole.

    Args:
        path: the new folder.
        model: ``attach``-ed with a router by name that needs nothing else from the adapters' folders: not "phatgoose"
            or "glider".

    Returns:
        A report: the adapters, the router, and how many numbers the routers hold.

    Raises:
        UsageError: no such model, or the folder exists.
        StorageError: the folder cannot be written.

    >>> import tempfile, torch
    >>> one = PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 0.5)})
    >>> model, _ = attach(nn.Sequential(nn.Linear(8, 4)), [one], router="smear")
    >>> place = Path(tempfile.mkdtemp()) / "out"
    >>> save_attached(place, model)["adapters"], attach_folder(nn.Sequential(nn.Linear(8, 4)), place)[1]["router"]
    (['a'], 'smear')

    Source: none; the folder format of PEFT, several times.
    """
    path, where = Path(path), "turnout.reshape.save_attached"
    router, options = getattr(model, CHOICE, (None, {}))
    if router is None or router in GATED:
        fix = "attach with a router by name, such as router='poly'; for gates, turnout.reshape.save_adapters"
        got, allowed = f"the router {router!r}", "have been chosen by name, and need no gates in the adapters' folders"
        raise UsageError(word("the model's router", got=got, allowed=allowed, where=where, fix=fix))
    _refuse_existing(path, where)
    adapters = adapters_of(model)
    _refuse_names([one.name for one in adapters], where)
    aside = path.with_name(path.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for one in adapters:
            write_adapter(aside / "adapters" / one.name, one)
        learned = save_routers(aside, model)
        names = [one.name for one in adapters]
        _describe(aside, adapters[0].base, router, options, names)
        if path.is_dir():
            path.rmdir()  # empty, or it would have been refused
        aside.rename(path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise read_error(error, path, where) from error
        raise
    return Report("save_attached", {"adapters": names, "router": router, "params_router": learned["params"]})


def _refuse_existing(path: Path, where: str) -> None:
    """Refuses to write into anything but a new or an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        fix = "choose a new folder"
        raise UsageError(
            word("the folder", got=f"{path}, which exists", allowed="be new or empty", where=where, fix=fix)
        )


def _refuse_names(names: Sequence[str], where: str) -> None:
    """Refuses adapters that cannot each have a folder of their name."""
    plain = [name for name in names if name and name not in (".", "..") and Path(name).name == name]
    if not names or len(set(plain)) < len(names):
        got, fix = ", ".join(map(repr, names)) or "none", "rename the adapters' folders"
        allowed = "be at least one, each of its own name, which may be a folder's"
        raise UsageError(word("the adapters", got=got, allowed=allowed, where=where, fix=fix))


def _describe(
    path: Path, base: str | None, router: str, options: Mapping[str, Any] | None, names: Sequence[str]
) -> None:
    """Writes ``adapters.json``, the last of a folder's files."""
    body = {"format": _FORMAT, "base": base, "router": router, "router_options": dict(options or {})}
    write_whole(path / _FILE, json.dumps(body | {"adapters": list(names)}, indent=2, default=_numbers) + "\n")


def _numbers(value: object) -> list[Any]:
    """A tensor in JSON; fp32 numbers come back to the bit."""
    if not isinstance(value, Tensor):
        allowed, fix = "be what JSON can hold, or tensors", "leave it out here, and attach with it in code"
        got, where = type(value).__name__, "turnout.reshape.save_adapters"
        raise UsageError(word("router_options", got=got, allowed=allowed, where=where, fix=fix))
    return value.detach().cpu().tolist()


def attach_folder(model: nn.Module, path: str | Path, *, any_base: bool = False) -> tuple[nn.Module, Report]:
    """The same model with the adapters and the router of a folder that ``save_adapters`` wrote; changed in place.

    Args:
        model: a live model of the architecture that the adapters were trained on.
        path: the folder, for instance what ``turnout convert --adapters`` wrote.
        any_base: as in ``attach``.

    Returns:
        What ``attach`` gives.

    Raises:
        CheckpointError: the folder is not whole.

    >>> import tempfile, torch
    >>> from turnout.models.checkpoint import PeftAdapter, write_adapter
    >>> place = Path(tempfile.mkdtemp())
    >>> write_adapter(place / "a", PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}))
    >>> _ = save_adapters(place / "out", [place / "a"], router="arrow")
    >>> attach_folder(nn.Sequential(nn.Linear(8, 4)), place / "out")[1]["modules"]
    ['0']

    Source: none; ``attach``.
    """
    path = Path(path)
    body = read_json(path / _FILE, _WHERE)
    names = body.get("adapters")
    if body.get("format") != _FORMAT or not isinstance(names, list) or any(Path(name).name != name for name in names):
        got = f"{path / _FILE} of format {body.get('format')!r} with {names!r}"
        fix = "name a folder that save_adapters wrote"
        raise CheckpointError(word("the adapters", got=got, allowed=f"be {_FORMAT}", where=_WHERE, fix=fix))
    folders = [path / "adapters" / name for name in names]
    options = body.get("router_options") or {}
    model, report = attach(model, folders, router=str(body["router"]), router_options=options, any_base=any_base)
    if (path / ROUTERS_FILE).exists():  # what they learned: save_routers
        load_routers(model, path)
    return model, report
