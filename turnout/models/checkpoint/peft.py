"""LoRA adapters in the folders of PEFT, in and out: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from turnout.errors import CheckpointError, ShapeError, word
from turnout.models.checkpoint.own import read_json
from turnout.reading import check_safetensors
from turnout.storage import digest, write_whole

__all__ = ["GATES_FILE", "PeftAdapter", "read_adapter", "write_adapter", "write_gates"]

_WHERE = "turnout.models.checkpoint.read_adapter"
_WEIGHTS = "adapter_model.safetensors"
GATES_FILE = "phatgoose.safetensors"
_GATES_FORMAT = "turnout.phatgoose/1"
_PREFIX = "base_model.model."
# Settings under which an adapter is something else than B A x: what it must be, and in words what it would mean.
_PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": ((False, None), "DoRA, which also rescales the base weight"),
    "bias": (("none", None), "trained biases of the base model"),
    "lora_bias": ((False, None), "a bias of its own"),
    "fan_in_fan_out": ((False, None), "a base layer that stores (in, out), as GPT-2 does"),
    "modules_to_save": ((None, []), "whole modules trained beside the adapter"),
    "target_parameters": ((None, []), "adapted parameters that are no linear layer"),
    "trainable_token_indices": ((None, []), "trained token embeddings"),
    "layer_replication": ((None, []), "layers used several times"),
    "alora_invocation_tokens": ((None, []), "an adapter that starts at a token"),
    "use_qalora": ((False, None), "a quantised input"),
    "use_bdlora": ((None, False), "block-diagonal factors"),
    "velora_config": ((None,), "a compressed input"),
    "monteclora_config": ((None,), "factors drawn anew at every call"),
    "kasa_config": ((None,), "singular values beside the factors"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class PeftAdapter:
    """One LoRA adapter of a model: for every linear map that it changes, its factors and their scale.

    Args:
        name: of the adapter; that of its folder.
        base: the model it was trained on, as its configuration names it; None when it does not.
        factor: module -> (A (r, D), B (O, r), scale); the map's weight gains scale * B A.
        gate: module -> the gate (D,) that PHATGOOSE trained for the adapter there; empty when it has none.

    >>> import torch
    >>> PeftAdapter("math", None, {"q_proj": (torch.zeros(2, 8), torch.zeros(4, 2), 1.0)}).params
    24

    Source: Hu et al., 2021, "LoRA"; the folder format of PEFT.
    """

    name: str
    base: str | None
    factor: Mapping[str, tuple[Tensor, Tensor, float]]
    gate: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> int:
        """How many numbers the factors hold."""
        return sum(a.numel() + b.numel() for a, b, _ in self.factor.values())


def read_adapter(path: str | Path) -> PeftAdapter:
    """The LoRA adapter in a folder of PEFT. Ranks and scales may differ between modules (patterns, rsLoRA).

    Args:
        path: the folder.

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
    path = Path(path)
    if not (path / "adapter_config.json").is_file():
        there = "has none" if path.is_dir() else "does not exist"
        raise _bad(path, "adapter_config.json", f"a folder that {there}", "be there", "name a folder that PEFT wrote")
    config = read_json(path / "adapter_config.json", _WHERE)
    _plain(path, config)
    tensors = _tensors(path)
    factor: dict[str, tuple[Tensor, Tensor, float]] = {}
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    for module in sorted(modules):
        a, b = tensors.pop(f"{module}.lora_A.weight", None), tensors.pop(f"{module}.lora_B.weight", None)
        if a is None or b is None or a.ndim != 2 or a.shape[:1] != b.shape[1:]:
            shapes = [None if one is None else tuple(one.shape) for one in (a, b)]
            allowed = "have lora_A (r, in) and lora_B (out, r)"
            raise _bad(path, f"{module} in adapter_model.safetensors", f"shapes {shapes}", allowed, "save it again")
        name = module.removeprefix(_PREFIX)
        factor[name] = (a, b, _scale(path, config, name, a.shape[0]))
    if tensors or not factor:
        got = f"{sorted(tensors)[0]!r}, and {len(tensors) - 1} others" if tensors else "no factor"
        allowed = "hold pairs of lora_A and lora_B, and nothing else"
        raise _bad(path, "adapter_model.safetensors", got, allowed, "train the adapter with bias='none', without DoRA")
    gate = _gates(path, {name: a.shape[1] for name, (a, _, _) in factor.items()})
    return PeftAdapter(path.resolve().name, config.get("base_model_name_or_path") or None, factor, gate)


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
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
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
    from safetensors.torch import save_file

    path = Path(path)
    metadata = {"format": _GATES_FORMAT, "adapter": digest(path / _WEIGHTS)}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in gate.items()}
    write_whole(path / GATES_FILE, lambda aside: save_file(tensors, aside, metadata=metadata))


def _gates(path: Path, width: Mapping[str, int]) -> dict[str, Tensor]:
    """The gates in an adapter's folder, none where there is no such file."""
    from safetensors import SafetensorError, safe_open

    file = path / GATES_FILE
    if not file.exists():
        return {}
    fix = f"train them again with turnout.reshape.train_gates, or remove {GATES_FILE}"
    try:
        check_safetensors(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            gate = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError, CheckpointError) as error:
        raise _bad(path, GATES_FILE, str(error), "be a whole safetensors file", fix) from error
    if metadata.get("format") != _GATES_FORMAT or metadata.get("adapter") != digest(path / _WEIGHTS):
        got = (
            f"{metadata.get('format')}, of other weights" if metadata.get("format") == _GATES_FORMAT else str(metadata)
        )
        raise _bad(path, GATES_FILE, got, f"be {_GATES_FORMAT}, of these very weights", fix)
    if {name: tuple(tensor.shape) for name, tensor in gate.items()} != {name: (size,) for name, size in width.items()}:
        raise _bad(path, GATES_FILE, "other modules or sizes", "have a gate (in,) for each module", fix)
    return gate


def _plain(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses an adapter that is more, or something else, than B A x."""
    kind = str(config.get("peft_type"))
    if kind.upper() != "LORA":
        raise _bad(path, "peft_type", kind, "be LORA", "train a LoRA adapter")
    for name, (allowed, meaning) in _PLAIN.items():
        if config.get(name) not in allowed:
            got = f"{config[name]!r} ({meaning})"
            raise _bad(path, name, got, f"be {allowed[0]!r}", f"train the adapter with {name}={allowed[0]!r}")


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / _WEIGHTS
    if not file.exists():
        pickled = (path / "adapter_model.bin").exists()
        got = "adapter_model.bin, a pickle, which may run anything when it is opened" if pickled else "no such file"
        fix = "save the adapter again with safe_serialization=True, the default of PEFT since 0.6"
        raise _bad(path, "the weights", got, "be in adapter_model.safetensors", fix)
    try:
        check_safetensors(file)
        return load_file(file)
    except (SafetensorError, OSError, CheckpointError) as error:
        allowed, fix = "be a whole safetensors file", "copy the file again"
        raise _bad(path, file.name, str(error), allowed, fix) from error


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns of PEFT: the end of the module's name decides."""
    stated = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    if int(stated) != rank:
        got = f"{rank} at {module}, where the configuration says {stated}"
        raise _bad(path, "the rank", got, "be what adapter_config.json says", "restore that file of this adapter")
    alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _bad(path: Path, what: str, got: object, allowed: str, fix: str) -> CheckpointError:
    return CheckpointError(word(f"{what} of the adapter", got=str(got), allowed=allowed, where=str(path), fix=fix))


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
