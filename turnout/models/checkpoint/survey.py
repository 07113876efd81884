"""What a folder of transformers holds, known from config.json and the headers of its weights."""

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from turnout.errors import CheckpointError, TurnoutError, word
from turnout.models.checkpoint import mxfp4
from turnout.models.checkpoint.own import check_names, check_shape, opened, outline, read_json
from turnout.models.checkpoint.sizes import check_sizes
from turnout.models.config import LMConfig
from turnout.models.families import FAMILIES
from turnout.models.families.express import family_of, obstacles
from turnout.models.families.family import Family, Keys, Names
from turnout.models.families.tensors import slots
from turnout.models.families.typed import check_types
from turnout.reading import check_fields, plain_name

__all__ = ["CORRECTION", "INDEX", "SINGLE", "Survey", "headers", "layer_of", "layout", "survey"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CORRECTION = ".e_score_correction_bias"
_SUFFIX = "ForCausalLM"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What would have to be built for well-known architectures that are not among ours.
_NEEDS = {
    "gemma2": "logit soft-capping and norms after attention and feed-forward",
    "gemma3_text": "norms after attention and feed-forward, and two rotary bases",
    "phi3": "one tensor for queries, keys and values, and long RoPE",
    "jamba": "state-space layers",
    "llama4_text": "experts in one transposed tensor, scaled inputs and chunked attention",
}


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a folder of transformers holds, known before any weight is read.

    Args:
        family: the architecture.
        config: ours.
        dtype: of the weights.
        names: how its tensors are named.
        where: tensor name -> file; of one that is packed in four bits, the file of its blocks.
        scales: name of a packed tensor -> the file of its scales.
    """

    family: Family
    config: LMConfig
    dtype: torch.dtype
    names: Names
    where: Mapping[str, str]
    scales: Mapping[str, str]


def survey(path: Path, dtype: torch.dtype | None = None) -> Survey:
    """Reads config.json and the headers of the weights: every file whole, every tensor there, of the right shape.

    Raises:
        CheckpointError: as ``from_hf``.
    """
    keys = read_json(path / "config.json", "turnout.models.checkpoint.from_hf")
    check_types(keys, str(path / "config.json"))
    family = _family(path, keys)
    where, dtypes, shapes = headers(path)
    _check_layers(path, keys, len(where))
    try:
        config = family.read(Keys(keys, family.defaults))
    except TurnoutError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    # Keys that transformers would not read in this architecture, but we did: nobody knows which was meant.
    if doubts := obstacles(config, family):
        raise CheckpointError(f"{path / 'config.json'} asks for what {family.architecture} is not: {'; '.join(doubts)}")
    scales = _unpacked(where, dtypes, shapes) if keys.get("quantization_config") else {}
    if keys.get("num_nextn_predict_layers") and any(layer_of(name) >= config.layers for name in where):
        warnings.warn(f"{path}: the layers for multi-token prediction, after the last, are left out", stacklevel=3)
        where = {name: file for name, file in where.items() if layer_of(name) < config.layers}
    names = layout(family, where)
    check_sizes(path, config, shapes)
    try:
        target = slots(outline(config), names)
    except TurnoutError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    tied = config.tie_embeddings and "lm_head.weight" in where
    check_names(path / (INDEX if len(set(where.values())) > 1 else SINGLE), set(target), set(where) - _also(tied))
    for name, tensor in target.items():
        check_shape(shapes[name], tensor.shape, f"{name} in {path / where[name]}")
    dtype = _common_dtype(path, {name: dtypes[name] for name in where}, dtype)
    return Survey(family, config, dtype, names, where, scales)


def _check_layers(path: Path, keys: Mapping[str, Any], tensors: int) -> None:
    """Refuses more layers than tensors, before a list of them is made."""
    if (keys.get("num_hidden_layers") or 0) > tensors:
        got, fix = f"{keys['num_hidden_layers']} layers", "use the config.json that belongs to these weights"
        allowed = f"have no more layers than the {tensors} tensors there"
        raise CheckpointError(word("config.json", got=got, allowed=allowed, where=str(path), fix=fix))


def _family(path: Path, keys: Mapping[str, Any]) -> Family:
    family = family_of(keys)
    names = keys.get("architectures") or []
    if family is None:
        kind = str(names[0] if names else keys.get("model_type"))
        needs = _NEEDS.get(str(keys.get("model_type")), "a file in turnout/models/families that reads its config.json")
        # All end in the same word: with it the nearest to Zzz would be Qwen3.
        stems = {each.architecture.removesuffix(_SUFFIX): each.architecture for each in FAMILIES}
        close = difflib.get_close_matches(kind.removesuffix(_SUFFIX), stems, n=1, cutoff=0.6)
        hint = f" Did you mean {stems[close[0]]!r}?" if close else ""
        known = ", ".join(sorted(stems.values()))
        where = path / "config.json"
        raise CheckpointError(
            f"unknown architecture {kind!r} in {where}.{hint} Available: {known}. It would need {needs}."
        )
    method = (keys.get("quantization_config") or {}).get("quant_method", "unknown")
    if keys.get("quantization_config") and method not in family.unpacks:
        fix = "load it with transformers, dequantise it, and save it in bfloat16"
        raise CheckpointError(
            word("the weights", got=f"{method!r}", allowed="not be quantised", where=f"{path / 'config.json'}", fix=fix)
        )
    return family


def _unpacked(where: dict[str, str], dtypes: dict[str, str], shapes: dict[str, list[int]]) -> dict[str, str]:
    """Puts each packed tensor in place of its blocks and scales, as it will be; gives the file of its scales."""
    scales = {}
    for name in mxfp4.unpacked(dtypes):
        blocks, beside = name + mxfp4.BLOCKS, name + mxfp4.SCALES
        where[name], scales[name] = where.pop(blocks), where.pop(beside)
        shapes[name], dtypes[name] = mxfp4.shape_of(shapes.pop(blocks), shapes.pop(beside)), "BF16"
    return scales


def headers(path: Path) -> tuple[dict[str, str], dict[str, str], dict[str, list[int]]]:
    """The shard, stored dtype and shape of every tensor, from the headers alone; every shard must be there."""
    if (path / INDEX).is_file():
        listed = weight_map(path)
        shards = sorted(set(listed.values()))
    else:
        listed, shards = {}, [SINGLE]
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        pickled = sorted(file.name for file in path.glob("*.bin"))
        fix = "copy or download the missing files again"
        if pickled and missing == [SINGLE]:
            fix = f"{pickled[0]} is pickled and never read: save the model again with transformers, as safetensors"
        got = f"{len(missing)} of {len(shards)} missing in {path}: {', '.join(missing[:3])}"
        raise CheckpointError(word("the weights", got=got, allowed="be complete", where="from_hf", fix=fix))
    where, dtypes, shapes = {}, {}, {}
    for shard in shards:
        with opened(path / shard) as file:
            for name in file.keys():
                if listed and listed.get(name) != shard:
                    got, fix = f"{name} in {path / shard}", "use the index that belongs to these shards"
                    raise CheckpointError(
                        word("a tensor", got=got, allowed=f"be where {INDEX} says", where="from_hf", fix=fix)
                    )
                stored = file.get_slice(name)
                where[name], dtypes[name], shapes[name] = shard, stored.get_dtype(), stored.get_shape()
    if listed:
        check_names(path / INDEX, set(listed), set(where))
    return where, dtypes, shapes


def weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file, as the index of a folder says; every file by its plain name."""

    def refuse(problem: str) -> CheckpointError:
        fix = "download the index again; if it comes so, do not trust the model"
        return CheckpointError(word("the index", got=problem, allowed="be sound", where=str(path / INDEX), fix=fix))

    body = read_json(path / INDEX, "from_hf")
    check_fields(body, {"weight_map": dict[str, str]}, refuse)
    for name in set(body["weight_map"].values()):
        plain_name(name, refuse)
    return body["weight_map"]


def layout(family: Family, names: Iterable[str]) -> Names:
    """How a folder with these tensors names those of its experts."""
    on_disk, in_memory = family.layouts
    fused = in_memory.fused is not None and any(name.endswith(in_memory.fused[0]) for name in names)
    return in_memory if fused else on_disk


def _common_dtype(path: Path, dtypes: Mapping[str, str], asked: torch.dtype | None) -> torch.dtype:
    """The dtype to read them all in: the one asked for, or the one that they have."""
    kinds = {kind for name, kind in dtypes.items() if not name.endswith(CORRECTION)}
    if kinds <= set(_DTYPES) and (asked is not None or len(kinds) == 1):
        return asked or _DTYPES[kinds.pop()]
    example = {kind: next(name for name in dtypes if dtypes[name] == kind) for kind in sorted(kinds)}
    got = ", ".join(f"{kind} ({name})" for kind, name in example.items())
    allowed = f"all be the same of {', '.join(_DTYPES)}"
    fix = "pass dtype=torch.float32 (turnout convert --dtype float32) to read them all as one"
    if not kinds <= set(_DTYPES):
        fix = "they are packed or quantised: load them with transformers, dequantise, and save in bfloat16"
    raise CheckpointError(word("the dtypes", got=got, allowed=allowed, where=str(path), fix=fix))


def layer_of(name: str) -> int:
    """The layer that a tensor belongs to, by its name; -1 for none."""
    number = name.removeprefix("model.layers.").partition(".")[0]
    return int(number) if name.startswith("model.layers.") and number.isdecimal() and len(number) < 10 else -1


def _also(tied: bool) -> set[str]:
    return {"lm_head.weight"} if tied else set()
