"""LoRA adapters in the folders of PEFT, in and out: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from turnout.errors import CheckpointError, ShapeError, word
from turnout.expects import PATH, expects
from turnout.hub import located
from turnout.models.checkpoint.lora_config import LoraSettings
from turnout.models.checkpoint.own import read_json
from turnout.reading import check_safetensors, open_regular
from turnout.storage import digest, load_tensors, save_tensors, write_whole

__all__ = ["GATES_FILE", "PeftAdapter", "read_adapter", "write_adapter", "write_gates"]

_WHERE = "turnout.models.checkpoint.read_adapter"
_WEIGHTS = "adapter_model.safetensors"
GATES_FILE = "phatgoose.safetensors"
_GATES_FORMAT = "turnout.phatgoose/1"
_PREFIX = "base_model.model."
# The end of the name of a module's factors; the rest of a key is "base_model.model." and the module's name.
_FACTOR = re.compile(r"base_model\.model\.(.{1,1000})\.lora_([AB])\.weight")
# A weight of the base model itself, which PEFT adds where it was resized, or stands under a map with an adapter.
_COPY = re.compile(r"base_model\.model\.(.{1,1000}?)(?:\.base_layer)?\.weight")
# Parts of names that PEFT adds around a module of the model.
_PARTS = r"\.(base_layer|original_module|modules_to_save|token_adapter|trainable_tokens_\w+)\b"
# What PEFT writes beside the factors, by what is in the key, and what it means. The first that fits names it.
_OTHERS: Sequence[tuple[str, str, str]] = (
    (r"\.lora_embedding_[AB]", "LoRA of an embedding", "train the adapter without the embeddings in target_modules"),
    (r"\.lora_magnitude_vector", "DoRA", "train the adapter without use_dora"),
    (r"\.lora_B\.bias$", "a bias of the adapter", "train the adapter without lora_bias"),
    (
        r"\.lora_[AB]\.[^.]+\.weight$",
        "the adapter's name is left in the key, and PEFT does not read such a key",
        "save the adapter with PEFT's save_pretrained, which leaves the name out",
    ),
    (
        _PARTS,
        "weights of the base model, or a whole module trained beside the adapter",
        "put them into the base model and save that, and the adapter again without them",
    ),
    (r"\.lora_", "a factor of another kind than LoRA of a linear map", "train the adapter for linear maps alone"),
    (r"\.bias$", "a trained bias of the base model", "train the adapter with bias='none'"),
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class PeftAdapter:
    """One LoRA adapter of a model: for every linear map that it changes, its factors and their scale.

    Args:
        name: of the adapter; that of its folder.
        base: the model it was trained on, as its configuration names it; None when it does not.
        factor: module -> (A (r, D), B (O, r), scale); the map's weight gains scale * B A.
        gate: module -> the gate (D,) that PHATGOOSE trained for the adapter there; empty when it has none.
        copies: module -> a weight of the base model that the folder holds too; ``attach`` asks for a base with it.
        settings: what its configuration says; None for one that comes from no folder.

    >>> import torch
    >>> PeftAdapter("math", None, {"q_proj": (torch.zeros(2, 8), torch.zeros(4, 2), 1.0)}).params
    24

    Source: Hu et al., 2021, "LoRA"; the folder format of PEFT.
    """

    name: str
    base: str | None
    factor: Mapping[str, tuple[Tensor, Tensor, float]]
    gate: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    settings: LoraSettings | None = None

    @property
    def params(self) -> int:
        """How many numbers the factors hold."""
        return sum(a.numel() + b.numel() for a, b, _ in self.factor.values())


@expects(path=PATH)
def read_adapter(path: str | Path) -> PeftAdapter:
    """The LoRA adapter in a folder of PEFT. Ranks and scales may differ between modules (patterns, rsLoRA).

    Args:
        path: the folder, or the adapter's name on the hub: see ``turnout.hub.located``.

    Raises:
        CheckpointError: the folder is not whole, or the adapter is more than B A x (DoRA, trained biases, whole
            modules); the message says which setting.

    >>> import tempfile, torch
    >>> one = PeftAdapter("math", "tiny", {"layers.0.q_proj": (torch.ones(2, 8), torch.ones(4, 2), 0.5)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_adapter(folder, one)
    ...     read_adapter(folder).factor["layers.0.q_proj"][2]
    0.5

    Source: Hu et al., 2021, "LoRA"; the folder format of PEFT.
    """
    found = located(path, where=_WHERE)
    path, name = found.folder, (found.repo or found.folder.resolve().name).rpartition("/")[2]
    if not (path / "adapter_config.json").is_file():
        raise _no_config(path)

    def bad(what: str, got: object, allowed: str, fix: str) -> NoReturn:
        raise _bad(path, what, got, allowed, fix)

    settings = LoraSettings(read_json(path / "adapter_config.json", _WHERE), bad)
    pairs: dict[str, dict[str, Tensor]] = {}
    copies, others = {}, []
    for key, tensor in sorted(_tensors(path).items()):
        found, copy = _FACTOR.fullmatch(key), _COPY.fullmatch(key)
        if found is not None and not re.search(_PARTS, f".{found[1]}"):
            pairs.setdefault(found[1], {})[found[2]] = _checked(path, key, tensor)
        elif copy is not None and not re.search(rf"{_PARTS}|\.lora_", f".{copy[1]}"):
            copies[copy[1]] = tensor
        else:
            others.append(key)
    if others:
        raise _other(path, others)
    factor: dict[str, tuple[Tensor, Tensor, float]] = {}
    for module, pair in pairs.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.ndim != 2 or a.shape[:1] != b.shape[1:] or not a.numel() or not b.numel():
            shapes = [None if one is None else tuple(one.shape) for one in (a, b)]
            allowed = "have lora_A (r, in) and lora_B (out, r), none of them empty"
            raise _bad(path, f"{module} in {_WEIGHTS}", f"shapes {shapes}", allowed, "save it again")
        if not settings.targeted(module):
            fix = f"restore adapter_config.json, or remove the factors of {module}"
            got = f"factors of {module}, which target_modules, exclude_modules and layers_to_transform leave out"
            allowed = "name every module with factors: PEFT ignores others"
            raise _bad(path, "target_modules", got, allowed, fix)
        factor[module] = (a, b, settings.scale(module, a.shape[0]))
    if not factor:
        allowed = "hold pairs of lora_A and lora_B, and nothing else"
        raise _bad(path, _WEIGHTS, "no factor", allowed, "save the adapter again")
    gate = _gates(path, {name: a.shape[1] for name, (a, _, _) in factor.items()})
    return PeftAdapter(name, settings.base, factor, gate, copies, settings)


def _no_config(path: Path) -> CheckpointError:
    """What to say of a folder without a configuration; PEFT puts adapters of other names than "default" one deeper."""
    there, fix = "has none" if path.is_dir() else "does not exist", "name a folder that PEFT wrote"
    deeper = [file for place in ("*", "adapters/*") for file in sorted(path.glob(f"{place}/adapter_config.json"))[:3]]
    if deeper:
        fix = f"name {' or '.join(str(file.parent) for file in deeper)}"
    return _bad(path, "adapter_config.json", f"a folder that {there}", "be there", fix)


def _other(path: Path, keys: list[str]) -> CheckpointError:
    """What to say of tensors that are no factors of a linear map: what the most telling of them means."""
    strange = [key for key in keys if not key.startswith(_PREFIX)]
    first, meaning, fix = keys[0], "not a factor of LoRA", "remove it, if the adapter means nothing by it"
    if strange:
        first, fix = strange[0], "save the adapter with PEFT"
        meaning = f"without {_PREFIX!r} at its start: PEFT does not read such a key"
    for pattern, said, mend in () if strange else _OTHERS:
        if found := [key for key in keys if re.search(pattern, key)]:
            first, meaning, fix = found[0], said, mend
            break
    rest = [key[-60:] for key in keys if key != first]
    more = f", and {len(rest)} others: {', '.join(rest[:4])}" if rest else ""
    got = f"{first[:200]!r} ({meaning}){more}"
    return _bad(path, _WEIGHTS, got, "hold pairs of lora_A and lora_B of linear maps, and nothing else", fix)


def _checked(path: Path, key: str, tensor: Tensor) -> Tensor:
    """A tensor of finite floating-point numbers."""
    if tensor.dtype not in _FLOATS:
        allowed = f"be of {', '.join(str(one).removeprefix('torch.') for one in _FLOATS)}"
        raise _bad(path, f"{key} in {_WEIGHTS}", str(tensor.dtype), allowed, "save the adapter in one of these")
    if not bool(tensor.isfinite().all()):
        got = f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers that are not"
        fix = "take a checkpoint from before its training diverged"
        raise _bad(path, f"{key} in {_WEIGHTS}", got, "be finite", fix)
    return tensor


@expects(path=PATH, adapter=PeftAdapter)
def write_adapter(path: str | Path, adapter: PeftAdapter) -> None:
    """Writes the adapter as a folder that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        path: the folder; made where it is missing. The weights are written last.
        adapter: what to write.

    Raises:
        StorageError: the folder cannot be written.

    >>> import tempfile, torch
    >>> one = PeftAdapter("math", "tiny", {"layers.0.q_proj": (torch.ones(2, 8), torch.ones(4, 2), 0.5)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_adapter(folder, one)
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']

    Source: the folder format of PEFT.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    ranks = {name: a.shape[0] for name, (a, _, _) in adapter.factor.items()}
    alphas = {name: scale * ranks[name] for name, (_, _, scale) in adapter.factor.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    tensors = {}
    for name, (a, b, _) in adapter.factor.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    write_whole(path / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    write_whole(path / _WEIGHTS, lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))


def _pattern(value: Mapping[str, float], otherwise: float) -> dict[str, float]:
    """The values that differ, the longest name first: PEFT takes the first that is the end of a module's name."""
    differ = {name for name, one in value.items() if one != otherwise}
    found = differ | {name for name in value if any(name.endswith(f".{one}") for one in differ)}
    return {name: value[name] for name in sorted(found, key=len, reverse=True)}


@expects(path=PATH)
def write_gates(path: str | Path, gate: Mapping[str, Tensor]) -> None:
    """Writes PHATGOOSE's gates into the folder of the adapter that they were trained for, where PEFT ignores them.

    The file carries the digest of the adapter's weights, so that gates of other weights are not taken for its own.

    Args:
        path: the adapter's folder.
        gate: module -> (D,).

    Raises:
        StorageError: the folder cannot be written.

    >>> import tempfile, torch
    >>> one = PeftAdapter("math", "tiny", {"layers.0.q_proj": (torch.ones(2, 8), torch.ones(4, 2), 0.5)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_adapter(folder, one)
    ...     write_gates(folder, {"layers.0.q_proj": torch.ones(8)})
    ...     read_adapter(folder).gate["layers.0.q_proj"].shape
    torch.Size([8])

    Source: Muqeeth et al., 2024, "Learning to Route Among Specialized Experts for Zero-Shot Generalization"; the
    file is our own.
    """
    path = Path(path)
    metadata = {"format": _GATES_FORMAT, "adapter": digest(path / _WEIGHTS)}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in gate.items()}
    save_tensors(path / GATES_FILE, tensors, metadata)


def _gates(path: Path, width: Mapping[str, int]) -> dict[str, Tensor]:
    """The gates in an adapter's folder, none where there is no such file."""
    file = path / GATES_FILE
    if not file.exists() and not file.is_symlink():
        return {}
    fix = f"train them again with turnout.reshape.train_gates, or remove {GATES_FILE}"

    def refuse(problem: str) -> CheckpointError:
        return _bad(path, GATES_FILE, problem, "be a whole safetensors file, as it was written", fix)

    metadata, gate = load_tensors(file, refuse, ("format", "adapter"))
    if metadata.get("format") != _GATES_FORMAT or metadata.get("adapter") != digest(path / _WEIGHTS):
        got = (
            f"{metadata.get('format')}, of other weights" if metadata.get("format") == _GATES_FORMAT else str(metadata)
        )
        raise _bad(path, GATES_FILE, got, f"be {_GATES_FORMAT}, of these very weights", fix)
    if {name: tuple(tensor.shape) for name, tensor in gate.items()} != {name: (size,) for name, size in width.items()}:
        raise _bad(path, GATES_FILE, "other modules or sizes", "have a gate (in,) for each module", fix)
    for name, tensor in gate.items():
        if tensor.dtype not in _FLOATS or not bool(tensor.isfinite().all()):
            raise _bad(path, GATES_FILE, f"{tensor.dtype} at {name}, or not finite", "hold finite numbers", fix)
    return gate


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / _WEIGHTS
    if not file.exists() and not file.is_symlink():
        pickled = (path / "adapter_model.bin").exists()
        got = "adapter_model.bin, a pickle, which may run anything when it is opened" if pickled else "no such file"
        fix = "save the adapter again with safe_serialization=True, the default of PEFT since 0.6"
        raise _bad(path, "the weights", got, "be in adapter_model.safetensors", fix)

    def refuse(problem: str) -> CheckpointError:
        return _bad(path, file.name, problem, "be a file of this folder", "copy the file itself there")

    try:
        open_regular(file, refuse=refuse).close()
        check_safetensors(file)
        return load_file(file)
    except (SafetensorError, OSError, CheckpointError) as error:
        allowed, fix = "be a whole safetensors file", "copy the file again"
        raise _bad(path, file.name, str(error), allowed, fix) from error


def _bad(path: Path, what: str, got: object, allowed: str, fix: str) -> CheckpointError:
    said = str(got)
    said = said if len(said) <= 500 else f"{said[:500]}..."
    return CheckpointError(word(f"{what} of the adapter", got=said, allowed=allowed, where=str(path), fix=fix))


def same_base(adapters: list[PeftAdapter], base: str | None) -> None:
    """Refuses adapters that say they were trained on different models, or on another than ``base``.

    Names are compared by their last part, so that a local folder may stand for a repository of the same name.
    """
    names = {adapter.name: adapter.base.rstrip("/").rpartition("/")[2] for adapter in adapters if adapter.base}
    wanted = base.rstrip("/").rpartition("/")[2] if base else next(iter(names.values()), None)
    wrong = {name: found for name, found in names.items() if found != wanted}
    if wrong:
        got = ", ".join(f"{name}: {found}" for name, found in wrong.items())
        fix = "use adapters of this model; where the name alone differs, pass any_base=True (--any-base)"
        allowed = f"have been trained on {wanted}"
        raise ShapeError(word("the adapters", got=got, allowed=allowed, where="turnout.reshape.attach", fix=fix))
