"""A choice of adapters on disk: their folders as PEFT wrote them, and which router takes which of them."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from turnout.errors import CheckpointError, UsageError, nearest, word
from turnout.expects import PATH, Kind, expects
from turnout.hub import located
from turnout.models.checkpoint.own import read_json
from turnout.models.checkpoint.peft import read_adapter
from turnout.models.checkpoint.whole_folder import whole_folder
from turnout.reading import check_fields, check_link, plain_name
from turnout.reshape.adapters.attach import attach
from turnout.reshape.adapters.routers import ROUTERS, Site, check_options
from turnout.reshape.adapters.save import FILE, FORMAT, adapters_of, describe, refuse_names, writer
from turnout.reshape.adapters.shards import SHARDS_FILE, load_shards
from turnout.reshape.adapters.trained import ROUTERS_FILE, load_routers
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["adapters_of", "attach_folder", "save_adapters", "save_attached"]

_WHERE = "turnout.reshape.attach_folder"


# What save_adapters copies: a live model has no folders, and the text of one path is no list of them.
_FOLDERS = Kind(
    lambda value: isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(PATH.fits, value)),
    "a list of folders of PEFT",
    "pass [FOLDER, FOLDER]; save_attached writes the adapters of a live model",
)


@expects(path=PATH, adapters=_FOLDERS)
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
    places = [located(one, where=where).folder for one in adapters]
    found = [(folder, read_adapter(folder)) for folder in places]
    names = [one.name for _, one in found]
    refuse_names(names, where)
    if router not in ROUTERS:
        raise nearest(router, ROUTERS, kind="router", where=where)
    check_options(router, router_options or {}, len(names), where=where)
    every = {name: _files(folder) for (folder, _), name in zip(found, names, strict=True)}
    with whole_folder(path, where) as aside:
        for name, files in every.items():
            place = aside / "adapters" / name
            place.mkdir(parents=True)
            for file in files:
                shutil.copyfile(file, place / file.name)
        describe(aside, base, router, router_options, names)
    return Report("save_adapters", {"adapters": names, "router": router})


@expects(path=PATH, model=nn.Module)
def save_attached(path: str | Path, model: nn.Module) -> Report:
    """Writes the adapters and the routers of a model as they are now to a folder that ``attach_folder`` reads.

    What ``save_adapters`` writes, with each adapter a folder of PEFT, and ``routers.safetensors`` beside them. The
    folder is made aside and takes its name when it is whole.

    Args:
        path: the new folder.
        model: one that ``attach`` changed. Where its router was a function, ``attach_folder`` is to be given that
            again.

    Returns:
        A report: the adapters, the router, and how many numbers the routers hold.

    Raises:
        UsageError: no such model, or the folder exists.
        StorageError: the folder cannot be written.

    >>> import tempfile, torch
    >>> from turnout.models.checkpoint import PeftAdapter
    >>> one = PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 0.5)})
    >>> model, _ = attach(nn.Sequential(nn.Linear(8, 4)), [one], router="smear")
    >>> place = Path(tempfile.mkdtemp()) / "out"
    >>> save_attached(place, model)["adapters"], attach_folder(nn.Sequential(nn.Linear(8, 4)), place)[1]["router"]
    (['a'], 'smear')

    Source: none; the folder format of PEFT, several times.
    """
    path, where = Path(path), "turnout.reshape.save_attached"
    _refuse_existing(path, where)
    write = writer(model, {})
    with whole_folder(path, where) as aside:
        report = write(aside)
    return report


def _files(folder: Path) -> list[Path]:
    """What of an adapter's folder is copied; not what a stranger's folder points at elsewhere."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors", ".md")]
    for file in files:
        check_link(file)
    return [file for file in files if file.is_file()]


def _refuse_existing(path: Path, where: str) -> None:
    """Refuses to write into anything but a new or an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        fix = "choose a new folder"
        raise UsageError(
            word("the folder", got=f"{path}, which exists", allowed="be new or empty", where=where, fix=fix)
        )


@expects(model=nn.Module, path=PATH)
def attach_folder(
    model: Model,
    path: str | Path,
    *,
    any_base: bool = False,
    freeze: bool = True,
    router: Callable[[Site], nn.Module] | None = None,
) -> tuple[Model, Report]:
    """The same model with what a folder has for it: adapters and their router, or shards; changed in place.

    Args:
        model: a live model of the architecture that the adapters were trained on.
        path: what ``save_adapters`` or ``save_attached`` wrote, ``turnout convert --adapters``, or the
            ``save_pretrained`` of a live model; then ``model`` may be what ``from_pretrained(path)`` gives.
        any_base: as in ``attach``.
        freeze: as in ``attach``.
        router: the function that built the routers, for a folder of a model where it was one.

    Returns:
        What ``attach`` gives, or ``attach_shards``.

    Raises:
        CheckpointError: the folder is not whole.
        UsageError: its router was a function, and none is given.

    >>> import tempfile, torch
    >>> from turnout.models.checkpoint import PeftAdapter, write_adapter
    >>> place = Path(tempfile.mkdtemp())
    >>> write_adapter(place / "a", PeftAdapter("a", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}))
    >>> _ = save_adapters(place / "out", [place / "a"], router="arrow")
    >>> attach_folder(nn.Sequential(nn.Linear(8, 4)), place / "out")[1]["modules"]
    ['0']

    Source: none; ``attach``.
    """
    path = located(path, where=_WHERE).folder
    any_base = any_base or _is_from(model, path)
    if (path / SHARDS_FILE).exists() and not (path / FILE).exists():
        return load_shards(model, path, any_base=any_base)
    body, folders = _described(path)
    if body.get("router") is None and router is None:
        got, fix = "none", "pass router=BUILD, the function that attach was given"
        allowed = "be given: those of this folder were built by a function"
        raise UsageError(word("the router", got=got, allowed=allowed, where=_WHERE, fix=fix))
    build, options = str(body["router"]) if router is None else router, body.get("router_options") or {}
    found = attach(model, folders, router=build, router_options=options, any_base=any_base, freeze=freeze)
    if (path / ROUTERS_FILE).exists():  # what they learned: save_routers
        load_routers(model, path)
    return found


def _described(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """What ``adapters.json`` says, every field of its type, and the folders of the adapters, all within this one."""
    if not (path / FILE).exists():
        got, fix = f"{path}, which does not exist", "name a folder that save_adapters or save_pretrained wrote"
        if path.exists():
            got = f"{path}, which has none"
        if (path / "adapter_config.json").exists():
            got += ": it is one adapter of PEFT"
            fix = f"call turnout.reshape.attach(model, [{str(path)!r}])"
        raise CheckpointError(word("the folder", got=got, allowed=f"hold {FILE}", where=_WHERE, fix=fix))
    body = read_json(path / FILE, _WHERE)

    def refuse(problem: str) -> CheckpointError:
        got, fix = f"{path / FILE} ({problem})", "name a folder that save_adapters wrote"
        return CheckpointError(word("the adapters", got=got, allowed=f"be {FORMAT}", where=_WHERE, fix=fix))

    kinds = {"format": Literal["turnout.adapters/1"], "adapters": list[str], "router": str | None}
    check_fields(body, kinds | {"router_options": dict[str, Any] | None}, refuse)
    folders = [path / "adapters" / plain_name(name, refuse) for name in body["adapters"]]
    for folder in (path / "adapters", *folders):
        check_link(folder, refuse)
    return body, folders


def _is_from(model: nn.Module, path: Path) -> bool:
    """Whether the model was read from this very folder, whose adapters may name the base that it was before."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return bool(name) and Path(name).exists() and Path(name).resolve() == path.resolve()
