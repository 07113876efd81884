"""What a folder of transformers holds, known from config.json and the headers of its weights."""

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from turnout.errors import CheckpointError, TurnoutError, word
from turnout.models.checkpoint.own import check_names, check_shape, opened, outline, read_json
from turnout.models.checkpoint.packed import Packed, find_packed
from turnout.models.checkpoint.sizes import check_sizes
from turnout.models.checkpoint.zipped import plain_or_zipped
from turnout.models.config import LMConfig
from turnout.models.families import FAMILIES
from turnout.models.families.express import family_of, obstacles
from turnout.models.families.family import Family, Names
from turnout.models.families.foreign import refuse_foreign_windows
from turnout.models.families.tensors import slots
from turnout.models.families.typed import check_types
from turnout.reading import check_fields, plain_name

__all__ = [
    "AHEAD",
    "CORRECTION",
    "INDEX",
    "SINGLE",
    "Survey",
    "common_dtype",
    "headers",
    "layer_of",
    "layout",
    "plain_kinds",
    "survey",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CORRECTION = ".e_score_correction_bias"
_SUFFIX = "ForCausalLM"
# What old checkpoints hold beside their weights, worked out again whenever a model is built: everyone passes it over.
_WORKED_OUT = re.compile(
    r"(^|\.)(rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)|masked_bias|position_ids|h\.\d+\.attn\.bias)$"
)
_LAYER = re.compile(r"(?:model\.layers|(?:transformer\.)?h)\.(\d{1,9})\.", re.ASCII)
# How often transformers predicts further than the next token, by its several names.
AHEAD = ("num_nextn_predict_layers", "num_mtp_layers")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Why well-known architectures are not among ours.
_NEEDS = {
    "gemma3": "a part that sees images (docs/guides/convert.md says how to save its text part alone)",
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
        where: tensor name -> file; of one that is packed, the file of its bits.
        packed: those that are.
        others: name -> dtype, of tensors that are stored in another than ``dtype`` though none was asked for.
        wider_bytes: how much more those take on the disk.
    """

    family: Family
    config: LMConfig
    dtype: torch.dtype
    names: Names
    where: Mapping[str, str]
    packed: Packed
    others: Mapping[str, torch.dtype]
    wider_bytes: int

    def notes(self) -> tuple[str, ...]:
        """What is to be known of a model that is read from it and written again."""
        said = str(self.dtype).removeprefix("torch.")
        kinds = ", ".join(sorted({str(kind).removeprefix("torch.") for kind in self.others.values()}))
        some = ", ".join(sorted(self.others)[:2]) + (", ..." if len(self.others) > 2 else "")
        mixed = (
            f"stored in {kinds}, which a folder of transformers keeps: {some}; the model computes in {said}, as there"
        )
        plain = all(name.endswith(CORRECTION) for name in self.others)
        return (*self.packed.notes(self.dtype), *([] if plain else [mixed]))


def survey(path: Path, dtype: torch.dtype | None = None) -> Survey:
    """Reads config.json and the headers of the weights: every file whole, every tensor there, of the right shape.

    Raises:
        CheckpointError: as ``from_hf``.
    """
    keys = read_json(path / "config.json", "turnout.models.checkpoint.from_hf")
    check_types(keys, str(path / "config.json"))
    family = _family(path, keys)
    where, dtypes, shapes = headers(path, keys)
    packed = find_packed(path, family, keys.get("quantization_config"), where, dtypes, shapes)
    _check_layers(path, family.keys(keys).get("num_hidden_layers"), len(where))
    try:
        config = family.read(family.keys(keys))
        refuse_foreign_windows(family, family.keys(keys), config)
    except TurnoutError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    # Keys that transformers would not read in this architecture, but we did: nobody knows which was meant.
    if doubts := obstacles(config, family):
        raise CheckpointError(f"{path / 'config.json'} asks for what {family.architecture} is not: {'; '.join(doubts)}")
    if any(map(family.keys(keys).get, AHEAD)) and any(layer_of(name) >= config.layers for name in where):
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
    kinds = {name: dtypes[name] for name in where if name in dtypes}
    _check_kinds(path, kinds)
    common = dtype or common_dtype(path, keys, plain_kinds(kinds))
    others = {name: kind for name, kind in plain_kinds(kinds).items() if dtype is None and kind != common}
    wider = sum(math.prod(shapes[name]) * max(0, kind.itemsize - common.itemsize) for name, kind in others.items())
    return Survey(family, config, common, names, where, packed, others, wider)


def _check_layers(path: Path, layers: int | None, tensors: int) -> None:
    """Refuses more layers than tensors, before a list of them is made."""
    if (layers or 0) > tensors:
        got, fix = f"{layers} layers", "use the config.json that belongs to these weights"
        allowed = f"have no more layers than the {tensors} tensors there"
        raise CheckpointError(word("config.json", got=got, allowed=allowed, where=str(path), fix=fix))


def _family(path: Path, keys: Mapping[str, Any]) -> Family:
    family = family_of(keys)
    if family is None:
        raise _unknown(path, keys)
    code = dict(keys["auto_map"]).get("AutoModelForCausalLM") if isinstance(keys.get("auto_map"), dict) else None
    if code and str(code).rpartition(".")[2] != family.architecture and family.model_type == keys["model_type"]:
        got, fix = f"{code}, code of the folder's own", f"remove auto_map if {family.architecture} computes the same"
        allowed = f"name {family.architecture}, which is all that is known of here"
        raise CheckpointError(word("auto_map", got=got, allowed=allowed, where=str(path / "config.json"), fix=fix))
    return family


def _unknown(path: Path, keys: Mapping[str, Any]) -> CheckpointError:
    """Why a config.json is of none of our architectures, and what can be done with the model all the same."""
    where, names = path / "config.json", [str(name) for name in keys.get("architectures") or []]
    kind = str(keys.get("model_type"))
    types = {family.model_type: family for family in FAMILIES}
    classes = {family.architecture: family for family in FAMILIES}
    named = next((classes[name] for name in names if name in classes), None)
    if kind in types:
        fix = f"if it is one, set architectures to [{types[kind].architecture!r}] in a copy of the folder"
        allowed = f"be {types[kind].architecture}, as which transformers reads the model_type {kind!r}"
        return CheckpointError(
            word(f"unknown architecture: {', '.join(names)!r}", got=f"it in {where}", allowed=allowed,
                 where="from_hf", fix=fix)
        )  # fmt: skip
    if named is not None:
        fix = f"if its own code is {named.architecture}'s, set model_type to {named.model_type!r} in a copy of it"
        allowed = f"be {named.model_type!r} for {named.architecture}; transformers does not know that it is the same"
        return CheckpointError(word(f"model_type {kind!r}", got=f"it in {where}", allowed=allowed, where="from_hf",
                                    fix=fix))  # fmt: skip
    # All end in the same word: with it the nearest to Zzz would be Qwen3.
    stems = {name.removesuffix(_SUFFIX): name for name in classes}
    kind = names[0] if names else kind
    close = difflib.get_close_matches(kind.removesuffix(_SUFFIX), stems, n=1, cutoff=0.6)
    hint = f" Did you mean {stems[close[0]]!r}?" if close else ""
    needs = _NEEDS.get(str(keys.get("model_type")))
    return CheckpointError(
        f"unknown architecture {kind!r} in {where}.{hint} Available: {', '.join(sorted(stems.values()))}. "
        + (f"It has {needs}, which no model here has. " if needs else "")
        + "Nearest fix: load it with transformers; turnout.reshape.attach gives a model of any class adapters, and "
        "turnout.adopt runs the experts of one that has some."
    )


def headers(path: Path, keys: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], dict[str, list[int]]]:
    """The shard, stored dtype and shape of every tensor, from the headers alone; every shard must be there.

    Of several sets of weights it is the one that transformers takes: what config.json names, then the single file, then
    the shards of the index. What is no weight is passed over.
    """
    first = _first(path, keys)
    if first.endswith(".json"):
        listed = _weight_map(path / first)
        shards = sorted(set(listed.values()))
    else:
        listed, shards = {}, [first]
    missing = [shard for shard in shards if not plain_or_zipped(path / shard).is_file()]
    if missing:
        pickled = sorted(file.name for file in path.glob("*.bin"))
        others = sorted(file.name for file in path.glob("model.*.safetensors*"))
        fix = "copy or download the missing files again"
        if missing == [SINGLE] and others:
            fix = f"{others[0]} is a variant, which transformers reads on request only: rename it"
        elif pickled and missing == [SINGLE]:
            fix = f"{pickled[0]} is pickled and never read: save the model again with transformers, as safetensors"
        got = f"{len(missing)} of {len(shards)} missing in {path}: {', '.join(missing[:3])}"
        raise CheckpointError(word("the weights", got=got, allowed="be complete", where="from_hf", fix=fix))
    where, dtypes, shapes = {}, {}, {}
    for shard in shards:
        with opened(path / shard) as file:
            for name in filter(_is_weight, file.keys()):
                if listed and listed.get(name) != shard:
                    got, fix = f"{name} in {path / shard}", "use the index that belongs to these shards"
                    raise CheckpointError(
                        word("a tensor", got=got, allowed=f"be where {first} says", where="from_hf", fix=fix)
                    )
                stored = file.get_slice(name)
                where[name], dtypes[name], shapes[name] = shard, stored.get_dtype(), stored.get_shape()
    if listed:
        check_names(path / first, set(filter(_is_weight, listed)), set(where))
    return where, dtypes, shapes


def _is_weight(name: str) -> bool:
    return not _WORKED_OUT.search(name)


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file, as the index of a folder says; every file by its plain name."""

    def refuse(problem: str) -> CheckpointError:
        fix = "download the index again; if it comes so, do not trust the model"
        return CheckpointError(word("the index", got=problem, allowed="be sound", where=str(path), fix=fix))

    body = read_json(path, "from_hf")
    check_fields(body, {"weight_map": dict[str, str], "metadata": dict[str, Any] | None}, refuse)
    for name in set(body["weight_map"].values()):
        plain_name(name, refuse)
    return body["weight_map"]


def _first(path: Path, keys: Mapping[str, Any]) -> str:
    """The file to begin with, of all the weights that a folder may hold."""
    asked = keys.get("transformers_weights")
    if asked is not None:

        def refuse(problem: str) -> CheckpointError:
            fix, allowed = "remove the key, or name a .safetensors file or its index", "name a file of the folder"
            where = str(path / "config.json")
            return CheckpointError(word("transformers_weights", got=problem, allowed=allowed, where=where, fix=fix))

        if not plain_name(asked, refuse).endswith((".safetensors", ".safetensors.index.json")):
            raise refuse(repr(asked))
        return asked
    if (path / "adapter_config.json").is_file():
        fix = "move the adapter into a folder of its own, and attach it with turnout.reshape.attach"
        allowed = "be the model alone: transformers adds the adapter to it"
        raise CheckpointError(
            word("the folder", got=f"adapter_config.json beside config.json in {path}", allowed=allowed,
                 where="from_hf", fix=fix)
        )  # fmt: skip
    return INDEX if not plain_or_zipped(path / SINGLE).is_file() and (path / INDEX).is_file() else SINGLE


def layout(family: Family, names: Iterable[str]) -> Names:
    """How a folder with these tensors names those of its experts."""
    on_disk, in_memory = family.layouts
    names = tuple(names)
    if in_memory.root != on_disk.root:
        return on_disk if not names or any(name.startswith(on_disk.root) for name in names) else in_memory
    fused = in_memory.fused is not None and any(name.endswith(in_memory.fused[0]) for name in names)
    return in_memory if fused else on_disk


def common_dtype(path: Path, keys: Mapping[str, Any], kinds: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype to read all tensors in: the one that they have, or of several the one that config.json names.

    So does transformers. Which biases correct a router's choice is seen in no dtype but fp32, so they do not count.
    """
    found = {kind: name for name, kind in sorted(kinds.items(), reverse=True) if not name.endswith(CORRECTION)}
    if len(found) == 1:
        return next(iter(found))
    named = keys.get("dtype") or keys.get("torch_dtype")
    for kind in found:
        if str(kind) == f"torch.{named}":
            return kind
    got = ", ".join(sorted(f"{str(kind).removeprefix('torch.')} ({name})" for kind, name in found.items()))
    got, allowed = f"{got}, and {named!r} in config.json", "all be the same, or config.json name one of theirs"
    fix = "pass dtype=torch.float32 (turnout convert --dtype float32) to read them all as one"
    raise CheckpointError(word("the dtypes", got=got, allowed=allowed, where=str(path), fix=fix))


def _check_kinds(path: Path, kinds: Mapping[str, str]) -> None:
    """Refuses tensors that are no floating-point numbers as we know them."""
    strange = {kind: name for name, kind in sorted(kinds.items(), reverse=True) if kind not in _DTYPES}
    if strange:
        got = ", ".join(f"{kind} ({name})" for kind, name in sorted(strange.items()))
        fix = "they are packed or quantised: load them with transformers, dequantise, and save in bfloat16"
        allowed = f"be of {', '.join(_DTYPES)}"
        raise CheckpointError(word("the dtypes", got=got, allowed=allowed, where=str(path), fix=fix))


def plain_kinds(dtypes: Mapping[str, str]) -> dict[str, torch.dtype]:
    """The dtypes of those tensors that are plain floating-point numbers."""
    return {name: _DTYPES[kind] for name, kind in dtypes.items() if kind in _DTYPES}


def layer_of(name: str) -> int:
    """The layer that a tensor belongs to, by its name; -1 for none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _also(tied: bool) -> set[str]:
    return {"lm_head.weight"} if tied else set()
