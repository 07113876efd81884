"""Training checkpoints: model and optimizer as safetensors, the rest as json, a manifest of digests written last.

    checkpoints/step-00000100/model.safetensors       parameters and buffers (router biases are buffers), by the names
                                                      that they have in the model itself, whatever it is wrapped in
                              optimizer.safetensors   the optimizer's state, by parameter name
                              state.json              step, sums of the unfinished log window, configuration
                              manifest.json           size and SHA-256 of the three, written last

A checkpoint is written in a folder ``step-00000100.part``, every file is flushed, then the folder takes its name in
one step: a process killed at any moment leaves whole checkpoints and perhaps one ``.part``, which the next run
removes. A damaged checkpoint is never passed over in silence: the error names what is wrong with it and which
earlier one is whole, and the user decides by asking for that one by name. Random numbers need no room here, since
the loop derives every generator from (seed, step).
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from turnout.errors import CheckpointError, StorageError, word
from turnout.reading import check_fields, check_link, read_json
from turnout.storage import digest, flush, read_error, write_whole
from turnout.wrappers import plain_names, stripped

__all__ = [
    "FORMATS",
    "check_fit",
    "checkpoint_name",
    "choose",
    "clean",
    "damage",
    "find",
    "load",
    "newest_whole",
    "part_name",
    "places",
    "publish",
    "read",
    "save",
    "set_aside_after",
]

# Of one process; of several, whose files are in parts.
FORMATS = ("turnout.checkpoint/1", "turnout.checkpoint/2")
_FORMAT = FORMATS[0]
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_PART = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def checkpoint_name(step: int) -> str:
    """The folder's name: ``step-00000100``."""
    return f"step-{step:08d}"


def find(folder: Path) -> tuple[Path, ...]:
    """The checkpoints in ``folder`` (damaged ones too), earliest first."""
    if not folder.is_dir():
        return ()
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return tuple(folder / name for name in sorted(names) if name.startswith("step-") and name[5:].isdigit())


def clean(folder: Path) -> None:
    """Removes what an interrupted write or removal has left: everything named ``.part``."""
    for path in folder.glob("*.part"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, keep: int
) -> Path:
    """Writes a whole checkpoint of this step into ``folder``, then removes all but the last ``keep``.

    Args:
        folder: the ``checkpoints`` folder; made when missing.
        step: optimizer steps done.
        model: its parameters and persistent buffers are kept; tied tensors once.
        optimizer: over parameters of ``model``.
        state: what else is needed to go on; plain JSON values.
        keep: how many checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        StorageError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    from safetensors.torch import save_file

    path = folder / checkpoint_name(step)
    part = path.with_name(path.name + ".part")
    tensors, values = _optimizer_tensors(model, optimizer)
    body = {"step": step, "optimizer": values, **state}
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _owned(model).items()}
        write_whole(part / _FILES[0], lambda aside: save_file(weights, aside, metadata={"format": _FORMAT}))
        write_whole(part / _FILES[1], lambda aside: save_file(tensors, aside, metadata={"format": _FORMAT}))
        names = _FILES[:2]
        files = {name: {"bytes": (part / name).stat().st_size, "sha256": digest(part / name)} for name in names}
        publish(folder, step, files, body, keep=keep)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, StorageError):
            raise
        raise read_error(error, path, "turnout.train") from error
    return path


def part_name(kind: str, rank: int, world: int) -> str:
    """The file of one of several processes, of "model" or "optimizer": ``model-00001-of-00004.safetensors``."""
    return f"{kind}-{rank + 1:05d}-of-{world:05d}.safetensors"


def publish(
    folder: Path, step: int, files: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any], *, keep: int
) -> None:
    """Writes state.json and the manifest beside files that are in ``step-….part``, and gives the folder its name.

    Args:
        folder: the ``checkpoints`` folder.
        step: optimizer steps done.
        files: name -> size and SHA-256 of the files of tensors.
        state: what goes into state.json.
        keep: how many checkpoints to keep.

    Raises:
        StorageError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    path = folder / checkpoint_name(step)
    part = path.with_name(path.name + ".part")
    form, rest = FORMATS[_FILES[0] not in files], _FILES[2]
    try:
        write_whole(part / rest, json.dumps({"format": form, **state}, indent=1) + "\n")
        whole = {**files, rest: {"bytes": (part / rest).stat().st_size, "sha256": digest(part / rest)}}
        write_whole(part / "manifest.json", json.dumps({"format": form, "step": step, "files": whole}, indent=1))
        if path.exists():
            _set_aside(path)
        part.rename(path)
        flush(folder)
        for old in find(folder)[:-keep]:
            _remove(old)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, StorageError):
            raise
        raise read_error(error, path, "turnout.train") from error


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, as a phrase that names the file; None when every byte is as written."""
    try:
        manifest = read_json(path / "manifest.json", refuse=CheckpointError)
        form = Literal["turnout.checkpoint/1", "turnout.checkpoint/2"]
        check_fields(manifest, {"format": form, "files": dict[str, dict[str, Any]]}, CheckpointError)
        names = _expected(manifest["files"])
        check_fields(manifest["files"], dict.fromkeys(names, dict), CheckpointError)
        for name in names:
            check_fields(manifest["files"][name], {"bytes": int, "sha256": str}, CheckpointError)
        written = {name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in names}
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, CheckpointError) as error:
        return f"manifest.json cannot be read ({error})"
    for name, (size, sha256) in written.items():
        try:
            check_link(path / name, CheckpointError)
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes of {size:,}: " + ("truncated" if found < size else "altered")
            if digest(path / name) != sha256:
                return f"{name} was altered: its SHA-256 is not the one in manifest.json"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        except CheckpointError as error:
            return f"{name} is {error}"
    return None


def _expected(files: Mapping[str, Any]) -> tuple[str, ...]:
    """The files that a checkpoint must have, by those that its manifest names."""
    counts = {int(found[2]) for name in files if (found := _PART.fullmatch(name))}
    if len(counts) != 1:
        return _FILES
    world = counts.pop()
    return (*(part_name(kind, rank, world) for kind in ("model", "optimizer") for rank in range(world)), _FILES[2])


# Of a tensor in a checkpoint: its file, its name there, its shape.
Place = tuple[Path, str, tuple[int, ...]]


def places(path: Path, kind: str) -> dict[str, Place]:
    """Where the tensors of "model" or of "optimizer" are, in a checkpoint that ``damage`` finds whole."""
    from safetensors import safe_open

    found: dict[str, Place] = {}
    files = read_json(path / "manifest.json", refuse=CheckpointError)["files"]
    for file in (name for name in _expected(files) if name.startswith(kind)):
        with safe_open(path / file, "pt") as opened:
            found |= {name: (path / file, name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()}
    return found


def read(place: Place) -> Tensor:
    """The tensor that is there."""
    from safetensors import safe_open

    with safe_open(place[0], "pt") as opened:
        return opened.get_tensor(place[1])


def newest_whole(paths: Sequence[Path]) -> Path | None:
    """The last of these checkpoints that has no damage."""
    return next((path for path in reversed(paths) if damage(path) is None), None)


def choose(folder: Path, wanted: str) -> Path | None:
    """The checkpoint to go on from: the one named, or for ``"latest"`` the last; None when there is none at all.

    Raises:
        CheckpointError: the named one does not exist, or the one to use is damaged; names the last whole one.
    """
    known = find(folder)
    if not known and wanted == "latest":
        return None
    path = known[-1] if wanted == "latest" else folder / wanted
    if path not in known:
        names = ", ".join(one.name for one in known) or "none"
        raise CheckpointError(
            word(
                "resume",
                got=wanted,
                allowed=f"be 'latest' or a checkpoint in {folder} ({names})",
                where="turnout.train",
                fix=f"resume from {known[-1].name}" if known else "start the run again in another folder",
            )
        )
    wrong = damage(path)
    if wrong is not None:
        before = newest_whole([one for one in known if one != path])
        raise CheckpointError(
            word(
                "the checkpoint",
                got=f"{path}: {wrong}",
                allowed="be whole",
                where="turnout.train",
                fix=f"go on from the whole one before it with --resume {before.name} (resume={before.name!r})"
                if before
                else "no other checkpoint here is whole; start the run again in another folder",
            )
        )
    return path


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    check: Callable[[Mapping[str, Any]], None] = lambda body: None,
) -> dict[str, Any]:
    """Puts a whole checkpoint into the model and the optimizer, and returns what ``save`` was given as ``state``.

    Everything is checked before anything is changed.

    Args:
        path: a checkpoint that ``damage`` finds whole.
        model: of the same shape as the one that was saved.
        optimizer: over its parameters; hyperparameters stay its own.
        check: called with state.json first; raises when the run must not go on from there.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    held = _owned(model)

    def known(name: str) -> str:  # what was saved before names were plain
        return name if name in held else stripped(name)

    weights = {known(name): read(place) for name, place in places(path, "model").items()}
    tensors = {name: read(place) for name, place in places(path, "optimizer").items()}
    body = read_json(path / _FILES[2], finite=False)
    check(body)
    check_fit(path, {name: tuple(t.shape) for name, t in weights.items()}, {n: tuple(t.shape) for n, t in held.items()})
    optimized = _optimized(model, optimizer)
    index = {name: i for i, (name, _) in enumerate(optimized)}
    states: dict[int, dict[str, Any]] = {index[known(name)]: dict(items) for name, items in body["optimizer"].items()}
    for key, tensor in tensors.items():
        name, _, item = key.rpartition("|")
        name = known(name)
        parameter = optimized[index[name]][1]
        # In the parameter's own strides: fused AdamW on the CPU goes through the memory of all four without looking.
        like = torch.empty_like(
            parameter if tensor.shape == parameter.shape else tensor, dtype=tensor.dtype, device="cpu"
        )
        states.setdefault(index[name], {})[item] = like.detach().copy_(tensor)
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(weights[name])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return body


def set_aside_after(folder: Path, step: int) -> tuple[str, ...]:
    """Renames the checkpoints later than ``step`` to ``.replaced``: the run goes on from there another way.

    Returns:
        Their new names.
    """
    return tuple(_set_aside(path).name for path in find(folder) if int(path.name[5:]) > step)


def _set_aside(path: Path) -> Path:
    aside = path.with_name(path.name + ".replaced")
    count = 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.replaced-{count}")
    return path.rename(aside)


def _remove(path: Path) -> None:
    # Renamed first: a process killed half-way must not leave half a checkpoint under a whole one's name.
    part = path.with_name(path.name + ".part")
    path.rename(part)
    shutil.rmtree(part, ignore_errors=True)


def _owned(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict by plain name, each tied tensor under its first name only."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    owned, tensors = {}, model.state_dict()
    for name, tensor in zip(plain_names(model, tensors).values(), tensors.values(), strict=True):
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        owned[name] = tensor
    return owned


def _optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters with their plain names, in the order that its state dict numbers them."""
    named = dict(model.named_parameters())
    plain = plain_names(model, named)
    names = {id(parameter): plain[name] for name, parameter in named.items()}
    return [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in _optimized(model, optimizer):
        for item, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{item}"] = value.detach().cpu().contiguous()
            else:
                values.setdefault(name, {})[item] = value
    return tensors, values


def check_fit(path: Path, saved: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a checkpoint whose tensors are not those of the model, by name and shape.

    Raises:
        CheckpointError: names the first that differs.
    """
    if saved == held:
        return
    name = next(name for name in [*held, *saved] if saved.get(name) != held.get(name))
    raise CheckpointError(
        word(
            "the checkpoint",
            got=f"{path}, where {name} is {saved.get(name, 'absent')}",
            allowed=f"be of the model that is being trained, where {name} is {held.get(name, 'absent')}",
            where="turnout.train",
            fix="resume with the configuration in the folder's run.json, or train in another folder",
        )
    )
