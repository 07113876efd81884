"""Our own format: a folder with config.json and model.safetensors, whose SHA-256 the former holds."""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from turnout import reading
from turnout.errors import CheckpointError, TurnoutError, UsageError, word
from turnout.expects import PATH, expects
from turnout.hub import located
from turnout.measure.memory import free_memory
from turnout.models.checkpoint.mapped import MappedFile
from turnout.models.checkpoint.sizes import check_sizes
from turnout.models.checkpoint.zipped import ZippedFile, plain_or_zipped
from turnout.models.lm import LM, LMConfig
from turnout.paths import Bank, LowRank, OffloadedBank
from turnout.reading import check_fields
from turnout.run.pages import in_large_pages
from turnout.storage import check_seal, digest, read_error, sealed, write_whole
from turnout.wrappers import plain_names, stripped, unwrapped

__all__ = ["load", "save"]

_FORMAT = "turnout.lm/1"
_WHERE, _LOAD = "turnout.models.checkpoint.save", "turnout.models.checkpoint.load"
_DTYPES = ("float64", "float32", "float16", "bfloat16")
WEIGHTS = "model.safetensors"
# Where the small files of the folder that a model came from are kept: its tokenizer, its configuration.
ORIGIN = "origin"
# Where transformers keeps the chat templates beside the first; the size over which a file holds data, not settings.
_TEMPLATES, _SMALL = "additional_chat_templates", 1 << 20
_RESTORE = "restore it from a copy; for a run, turnout resumes from a checkpoint in its checkpoints folder"


@expects(path=PATH, lm=nn.Module)
def save(path: str | Path, lm: nn.Module) -> None:
    """Writes a model as a folder: config.json and model.safetensors.

    The weights are written first and config.json, with their digest, last: what a crash leaves in between is refused by
    ``load``. The tokenizer and configuration of a model that came from another folder go along, in ``origin/``.

    Args:
        path: the folder; made when missing.
        lm: the model, on any device; also a compiled or otherwise wrapped one, which is written as what it is inside.

    Raises:
        UsageError: there is no LM in it.
        StorageError: the disk is full, or the folder is not writable.

    >>> import tempfile
    >>> lm = LM(LMConfig(vocab_size=8, width=8, layers=1, heads=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, lm)
    ...     torch.equal(load(folder).embedding, lm.embedding)
    True

    Source: none; safetensors and json.
    """
    path, lm = Path(path), bare(lm)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored(lm).items()}
    write_whole(path / WEIGHTS, lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))
    if lm.origin is not None and lm.origin != path and lm.origin != path / ORIGIN:
        carry(lm.origin, path / ORIGIN, with_config=True)
    body = {
        "format": _FORMAT,
        "model": lm.config.to_json_dict(),
        "dtype": str(lm.embedding.dtype).removeprefix("torch."),
        "files": {WEIGHTS: {"bytes": (path / WEIGHTS).stat().st_size, "sha256": digest(path / WEIGHTS)}},
    }
    write_whole(path / "config.json", json.dumps(sealed(body), indent=2) + "\n")


@expects(path=PATH)
def load(path: str | Path) -> LM:
    """The model that ``save`` wrote, on the CPU, in evaluation mode.

    Args:
        path: the folder, or its name on the hub: see ``turnout.hub.located``.

    Raises:
        CheckpointError: a file is missing, truncated, altered, or not of this model; the message names it.
        UsageError: there is no memory for it.

    >>> load("no/such/folder")
    Traceback (most recent call last):
    turnout.errors.CheckpointError: the model's folder must hold config.json in turnout.models.checkpoint.load; ...

    Source: none; safetensors and json.
    """
    path = located(path, where=_LOAD).folder
    config, dtype, sha256 = _described(path)
    (size, found), free = _measured(path / WEIGHTS), free_memory()
    if free is not None and size > free:
        got, fix = f"{free:,} bytes free", "close other programs, or use a larger machine"
        raise UsageError(word("the memory", got=got, allowed=f"hold the {size:,} of {path}", where=_LOAD, fix=fix))
    if (found or digest(path / WEIGHTS)) != sha256:
        raise _other(path)
    _check_header(path / WEIGHTS, config)
    lm = empty(config, dtype)
    with opened(path / WEIGHTS) as file, torch.no_grad():
        slots = stored(lm)
        for name, key in keys_of(file.keys(), slots).items():
            fill(slots[name], file.get_tensor(key), f"{name} in {path / WEIGHTS}")
    lm.origin = origin_of(path)
    return lm.eval()


def origin_of(path: Path) -> Path:
    """Where the small files of the model in this folder are."""
    reading.check_link(path / ORIGIN)
    return path / ORIGIN if (path / ORIGIN).is_dir() else path


def check_digest(path: Path) -> None:
    """Refuses plain weights that are not as they were written.

    Raises:
        CheckpointError: another SHA-256 than config.json says.
    """
    if digest(path / WEIGHTS) != _described(path)[2]:
        raise _other(path)


def _other(path: Path) -> CheckpointError:
    return _refusal("the weights", f"{path / WEIGHTS} with another SHA-256", "be as they were written", _RESTORE)


def describe(path: Path) -> tuple[LMConfig, torch.dtype]:
    """The configuration and dtype of the model in a folder; of the weights, the size and the header are read.

    Raises:
        CheckpointError: as ``load``, save for what only their digest tells.
    """
    config, dtype, _ = _described(path)
    _check_header(path / WEIGHTS, config)
    return config, dtype


def _described(path: Path) -> tuple[LMConfig, torch.dtype, str]:
    """The configuration, the dtype, and the digest that the weights must have; their size is right."""
    body = read_json(path / "config.json", "turnout.models.checkpoint.load")
    if body.get("format") != _FORMAT:
        foreign = "model_type" in body or "architectures" in body
        raise _refusal(
            "config.json",
            f"{path / 'config.json'} with format {body.get('format')!r}",
            f"be of format {_FORMAT!r}",
            "it is a transformers folder: use from_hf" if foreign else "name a folder that save wrote",
        )
    refuse = functools.partial(_altered, path)
    check_fields(body, {"model": dict, "dtype": str, "files": dict[str, dict]}, refuse)
    check_seal(body, refuse, ("format", "model", "dtype", "files"))
    check_fields(body["files"], {WEIGHTS: dict}, refuse)
    check_fields(body["files"][WEIGHTS], {"bytes": int, "sha256": str}, refuse)
    if body["dtype"] not in _DTYPES:
        raise refuse(f"the dtype {body['dtype']!r:.40}")
    try:
        config = LMConfig.from_json_dict(body["model"])
    except TurnoutError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    size, sha256 = body["files"][WEIGHTS]["bytes"], body["files"][WEIGHTS]["sha256"]
    weights = path / WEIGHTS
    if not plain_or_zipped(weights).is_file():
        raise _refusal("the weights", f"{weights}, which does not exist", "be there", _RESTORE)
    if (there := _measured(weights)[0]) != size:
        raise _refusal("the weights", f"{weights} of {there} bytes", f"have {size} bytes", _RESTORE)
    return config, getattr(torch, body["dtype"]), sha256


def _measured(weights: Path) -> tuple[int, str | None]:
    """The size of the weights; and where they are zipped, whose pieces are checked as they are read, their digest."""
    zipped = plain_or_zipped(weights)
    if zipped == weights:
        return weights.stat().st_size, None
    with ZippedFile(zipped) as file:
        return file.bytes, file.sha256


def _altered(path: Path, problem: str) -> CheckpointError:
    return _refusal("config.json", f"{path / 'config.json'} ({problem})", "be whole", "restore it from a copy")


def _check_header(weights: Path, config: LMConfig) -> None:
    """Refuses weights whose names or shapes are not those of the configuration."""
    with opened(weights) as file:
        shapes = {stripped(name): file.get_slice(name).get_shape() for name in file.keys()}
        check_sizes(weights.parent, config, shapes)
        slots = stored(outline(config))
        keys = keys_of(file.keys(), slots)
        check_names(weights, set(slots), set(keys))
        for name, slot in slots.items():
            check_shape(file.get_slice(keys[name]).get_shape(), slot.shape, f"{name} in {weights}")


def keys_of(found: Iterable[str], slots: Mapping[str, Tensor]) -> dict[str, str]:
    """The name of each tensor in the file -> what it is called there, perhaps after a wrapper."""
    return {key if key in slots else stripped(key): key for key in found}


def bare(lm: nn.Module) -> LM:
    """The LM inside all wrappers.

    Raises:
        UsageError: there is none.
    """
    inside = unwrapped(lm)
    if not isinstance(inside, LM):
        got, fix = type(lm).__name__, "pass a turnout.models.LM; others are written by their own libraries"
        raise UsageError(word("the model", got=got, allowed="be an LM, or one wrapped", where=_WHERE, fix=fix))
    refuse_adapters(inside, _WHERE)
    for module in inside.modules():
        if isinstance(module, OffloadedBank):
            raise module.refusal("written")
    return inside


def refuse_adapters(lm: LM, where: str) -> None:
    """Refuses a model with adapters beside its weights, where they would be lost.

    Raises:
        UsageError: it has some.
    """
    if any(isinstance(module, LowRank) for module in lm.modules()):
        got, fix = "one with adapters beside its weights", "call turnout.reshape.fold_low_rank(lm) first"
        raise UsageError(word("the model", got=got, allowed="be by itself", where=where, fix=fix))


def stored(lm: LM) -> dict[str, Tensor]:
    """The model's tensors by name, those of expert banks in the order of ExpertWeights whatever the bank's own is."""
    tensors: dict[str, Tensor] = dict(lm.state_dict(keep_vars=True))
    for name, module in lm.named_modules():
        if isinstance(module, Bank):
            tensors |= {f"{name}.up": module.up_EDH, f"{name}.down": module.down_EFD}
    return {plain: tensors[name] for name, plain in plain_names(lm, tensors).items()}


class Unset(TorchFunctionMode):
    """Leaves out the drawing of starting weights, which on the meta device would load torch's compiler: 150 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.normal_ else func(*args, **(kwargs or {}))


def outline(config: LMConfig) -> LM:
    """The model on the meta device: names, shapes and cost, without memory or time."""
    with torch.device("meta"), Unset():
        return LM(config)


def empty(config: LMConfig, dtype: torch.dtype) -> LM:
    """A model whose weights are not set yet, without the time and memory of setting them."""
    lm = outline(config).to(dtype).to_empty(device="cpu")
    in_large_pages((*lm.parameters(), *lm.buffers()))
    return lm


def carry(source: Path, target: Path, *, with_config: bool = False) -> None:
    """Copies the small files beside a model's weights: tokenizer, processors, generation configuration, templates.

    Code goes along where one of them names it (a tokenizer of the folder's own); it is copied, never run.
    """
    files = sorted(source.iterdir()) if source.is_dir() else []
    kept = [file for file in files if is_carried(file) or (with_config and file.name == "config.json")]
    small = [file for file in kept if file.suffix == ".json" and file.stat().st_size < _SMALL]
    if any(b'"auto_map"' in file.read_bytes() for file in small if file.name != "config.json"):
        kept += [file for file in files if file.suffix == ".py" and file.is_file()]
    templates = source / _TEMPLATES
    kept += sorted(templates.glob("*.jinja")) if templates.is_dir() else []
    if source.is_symlink() and source.name == ORIGIN:
        reading.check_link(source)
    for file in kept:
        reading.check_link(file)
        place = target / file.relative_to(source)
        write_whole(place, lambda aside, file=file: shutil.copyfile(file, aside) and None)


def is_carried(file: Path) -> bool:
    """Whether a file belongs to the model but is neither weights nor their configuration nor code."""
    names = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE", "NOTICE")
    starts = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "LICENSE", "NOTICE")
    starts += ("tekken", "sentencepiece", "spiece", "bpe")
    kinds = (".json", ".txt", ".model", ".jinja", ".md", ".vocab", ".codes")
    named = file.name in names or (file.name.startswith(starts) and file.suffix in kinds)
    return file.is_file() and (named or file.suffix in (".model", ".tiktoken", ".spm", ".jinja"))


def read_json(path: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object.
    """

    def refuse(problem: str) -> CheckpointError:
        return _refusal(path.name, f"{path} ({problem})", "be JSON and hold an object", "restore it from a copy", where)

    try:
        return reading.read_json(path, refuse=refuse)
    except FileNotFoundError as error:
        what, allowed = "the model's folder", f"hold {path.name}"
        raise _refusal(what, str(path.parent), allowed, "name a folder that holds a model", where) from error
    except OSError as error:
        raise read_error(error, path, where) from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its tensors read one at a time; where it is not there and zipped it is, that.

    Raises:
        CheckpointError: not a whole safetensors file.
    """

    def refuse(problem: str) -> CheckpointError:
        fix = "it is truncated or damaged: copy or download it again"
        return _refusal("the weights", f"{path} ({problem})", "be a whole safetensors file", fix)

    try:
        if (zipped := plain_or_zipped(path)) != path:
            with ZippedFile(zipped) as file:
                yield file
            return
        reading.check_safetensors(path, refuse)
        yield MappedFile(path, refuse)
    except FileNotFoundError as error:
        raise _refusal("the weights", f"{path}, which does not exist", "be there", "copy the file again") from error
    except IsADirectoryError as error:
        raise refuse("a folder") from error
    except SafetensorError as error:
        raise refuse(str(error)) from error


def check_names(path: Path, wanted: set[str], found: set[str]) -> None:
    """Refuses weights with tensors missing or left over."""
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("left over", extra))
            if names
        ]
        fix = "use the config.json that belongs to these weights, or copy the missing ones"
        raise _refusal("the weights", f"{path}: {'; '.join(parts)}", "hold the tensors of config.json", fix)


def fill(slot: Tensor, tensor: Tensor, name: str) -> None:
    """Copies a tensor that was read into its place.

    Raises:
        CheckpointError: another shape.
    """
    check_shape(tensor.shape, slot.shape, name)
    slot.copy_(tensor)


def check_shape(found: Sequence[int], wanted: Sequence[int], name: str) -> None:
    """Refuses a tensor of another shape."""
    if tuple(found) != tuple(wanted):
        got, allowed = f"shape {tuple(found)} for {name}", f"have the shape {tuple(wanted)} of config.json"
        raise _refusal("a tensor", got, allowed, "use the config.json that belongs to these weights")


def _refusal(what: str, got: str, allowed: str, fix: str, where: str = "turnout.models.checkpoint") -> CheckpointError:
    return CheckpointError(word(what, got=got, allowed=allowed, where=where, fix=fix))
