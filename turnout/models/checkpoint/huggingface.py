"""Folders of transformers, in and out: config.json, sharded safetensors, and the small files beside them."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from turnout.errors import CheckpointError, UsageError, word
from turnout.expects import PATH, expects
from turnout.hub import located
from turnout.models.checkpoint import mxfp4
from turnout.models.checkpoint.few_bits import Held, held_config, held_slots, packed_tensors
from turnout.models.checkpoint.own import bare, carry, check_shape, empty, opened, outline, read_json
from turnout.models.checkpoint.survey import (
    AHEAD,
    CORRECTION,
    INDEX,
    SINGLE,
    common_dtype,
    headers,
    layer_of,
    layout,
    plain_kinds,
    survey,
)
from turnout.models.checkpoint.ties import refuse_ties
from turnout.models.checkpoint.whole_folder import whole_folder
from turnout.models.families.express import architecture_of, family_of
from turnout.models.families.family import Family
from turnout.models.families.meaning import meaning
from turnout.models.families.tensors import Slot, slots
from turnout.models.families.typed import check_types
from turnout.models.lm import LM, LMConfig
from turnout.reading import check_fields
from turnout.storage import write_whole

__all__ = ["from_hf", "to_hf"]

_END = "<|endoftext|>"
# Keys of config.json that hold of the old folder alone: how it was packed, its code, its place, its files.
_OLD = ("quantization_config", "compression_config", "auto_map", "transformers_weights", "_name_or_path")
# Keys that count experts, in all the spellings there are; an architecture's own is written anew.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")


@expects(path=PATH)
def from_hf(path: str | Path, *, dtype: torch.dtype | None = None, packed: bool = False) -> LM:
    """The model in a folder that transformers wrote, on the CPU, in evaluation mode.

    Each tensor is read straight into its place: memory peaks at the model, a tensor and 32 MiB.

    Quantised weights are read as the numbers that they stand for, rounded once to the dtype of the others: FP8 with
    scales of blocks or tensors (DeepSeek-V3), gpt-oss's MXFP4, and what ``to_hf`` writes in few bits
    (compressed-tensors, packed in words). Others are refused by name.

    Args:
        path: a folder with config.json and weights, found in transformers' order: the file that config.json names
            (``transformers_weights``), else model.safetensors, else the shards of its index. Or a model of the hub,
            ``org/name`` or ``org/name@revision``: see ``turnout.hub.located``.
        dtype: of the weights; None for the one they are stored in: of several, as in transformers, the one that
            config.json names. A correction bias of a router stays in fp32.
        packed: hold what compressed-tensors or MXFP4 packed in few bits as it is; such a model is not trained.

    Raises:
        CheckpointError: an architecture that is not supported, or a file that is missing, damaged, pickled, quantised
            or of another model; the message names it.

    >>> import tempfile
    >>> from turnout.models.lm import LMConfig
    >>> lm = LM(LMConfig(vocab_size=8, width=8, layers=1, heads=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_hf(lm, folder + "/out")
    ...     torch.equal(from_hf(folder + "/out").embedding, lm.embedding)
    'LlamaForCausalLM'
    True

    Source: none; the file formats of transformers 4 and 5.
    """
    path = located(path, where="turnout.models.checkpoint.from_hf").folder
    found = survey(path, dtype)
    config = held_config(path, found) if packed else found.config
    where, lm = found.where, empty(config, found.dtype)
    target, held = held_slots(lm, found.names) if packed else (slots(lm, found.names), dict[str, Held]())
    with torch.no_grad():
        for shard in sorted(set(where.values())):
            with opened(path / shard) as file:
                for name in sorted(name for name, its in where.items() if its == shard):
                    if name in held:
                        held[name].fill(found.packed.matrix(file, path, name))
                    elif name in found.packed.scales:
                        found.packed.read(file, path, name, target[name])
                    elif name in target:
                        check_shape(file.get_slice(name).get_shape(), target[name].shape, f"{name} in {path / shard}")
                        target[name].view.copy_(target[name].cut(file.get_tensor(name)))
        if lm.head is None and "lm_head.weight" in where:
            _check_tied(path, where, lm)
    lm.origin = path
    return lm.eval()


@expects(lm=LM, path=PATH)
def to_hf(
    lm: LM,
    path: str | Path,
    *,
    architecture: str | None = None,
    like: str | Path | None = None,
    shard_bytes: int = 5_000_000_000,
) -> str:
    """Writes the model as a folder that transformers, and what builds on it, loads without turnout.

    The folder appears whole or not at all. A model that was read from such a folder and still has its configuration
    is written back bit for bit, with its tokenizer and generation configuration; but config.json says nothing of what
    is not written: layers that predict further tokens, code of the folder's own, the way weights were packed.
    A tensor that the old folder has in another dtype than most, a router's in fp32 beside bfloat16, keeps that dtype,
    and where nothing changed it, all its bits; unless the model is in another dtype than ``from_hf`` alone gave it.

    What an architecture cannot be without, and the model has not, is written as zeros that add nothing: the shared
    expert of Qwen2-MoE, for one. Maps in few bits are written so, as compressed-tensors packs them: transformers loads
    that where the library of this name is installed. vLLM names the same format; that was not tried. Experts that were
    read in MXFP4 (``packed=True``) are written in it, byte for byte.

    Args:
        lm: the model.
        path: the folder; must not exist, or be empty.
        architecture: the class in transformers (``"MixtralForCausalLM"``); None for the plainest that fits.
        like: a folder whose tokenizer, token ids and shards to take over; None for the one the model came from.
        shard_bytes: the most that one file of weights holds.

    Returns:
        The name of the architecture.

    Raises:
        UsageError: no architecture computes what the model does, and the message lists every reason; or its experts
            tie by design, and transformers would choose among them otherwise in the dtype that it is in.
        StorageError: the folder is not empty, not writable, or the disk is full.

    >>> from turnout.models.lm import LMConfig, MoEConfig
    >>> moe = MoEConfig(num_experts=2, top_k=1, hidden=8, router="Hash")
    >>> to_hf(LM(LMConfig(vocab_size=8, width=8, layers=1, heads=2, moe=moe)), "unused")
    Traceback (most recent call last):
    turnout.errors.UsageError: the model cannot be written as any architecture of transformers...

    Source: none; the file formats of transformers 4 and 5.
    """
    path, lm = Path(path), bare(lm)
    like = lm.origin if like is None else Path(like)
    old = _old_keys(like)
    family, config = architecture_of(lm.config, prefer=old.get("model_type"), only=architecture)
    refuse_ties(lm, family)
    with whole_folder(path, "to_hf") as aside:
        kept = _Kept.of(like, old)
        plan = kept.files if family_of(old) is family else {}
        settings = _write_weights(lm, family, config, aside, kept, plan, shard_bytes)
        if like is not None:
            carry(like, aside)
        old = old or _describe_tokenizer(aside, lm.config.max_seq)
        plain = dataclasses.replace(config, quantized=None)
        _write_config(plain, lm.embedding.dtype, family, aside, like, old, settings)
    return family.architecture


def _check_tied(path: Path, where: Mapping[str, str], lm: LM) -> None:
    with opened(path / where["lm_head.weight"]) as file:
        if not torch.equal(file.get_tensor("lm_head.weight").to(lm.embedding.dtype), lm.embedding):
            got, fix = "other numbers", "set tie_word_embeddings to false in config.json"
            raise CheckpointError(
                word("lm_head.weight", got=got, allowed="be the embedding, which tie_word_embeddings says it is",
                     where=str(path), fix=fix)
            )  # fmt: skip


# ---- writing


def _as_before(settings: dict[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """How weights are packed, in the words of the old folder where it has them in MXFP4 too."""
    was, now = (keys.get("quantization_config") for keys in (old, settings))
    same = was and now and was.get("quant_method") == now["quant_method"] == mxfp4.METHOD
    return {"quantization_config": was} if same else settings


def _old_keys(like: Path | None) -> dict[str, Any]:
    if like is None or not (like / "config.json").is_file():
        return {}
    keys = read_json(like / "config.json", "to_hf")
    if "model_type" not in keys:
        return {}
    check_types(keys, str(like / "config.json"))
    return keys


@dataclasses.dataclass(frozen=True)
class _Kept:
    """The tensors of the old folder: which file each is in, the dtypes of plain ones, and that of the model in it."""

    folder: Path | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    kinds: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, like: Path | None, old: Mapping[str, Any]) -> "_Kept":
        """Empty for a folder with the small files only."""
        if like is not None:
            with contextlib.suppress(CheckpointError):
                files, dtypes, _ = headers(like, old)
                kinds = plain_kinds(dtypes)
                with contextlib.suppress(CheckpointError):
                    return cls(like, files, kinds, common_dtype(like, old, kinds))
                return cls(like, files)
        return cls(like)

    def as_stored(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in the dtype that the old folder has it in: its very own bits there where these are their numbers.

        Args:
            name: of the tensor.
            tensor: as the model has it.
            dtype: of the model.
        """
        kind = self.kinds.get(name, tensor.dtype)
        if kind == tensor.dtype or dtype != self.dtype or self.folder is None:
            return tensor
        with opened(self.folder / self.files[name]) as file:
            before = file.get_tensor(name)
        for found in (before, tensor.to(kind)):
            if torch.equal(found.to(tensor.dtype), tensor):
                return found
        return tensor


def _write_weights(
    lm: LM, family: Family, config: LMConfig, path: Path, kept: _Kept, plan: dict[str, str], shard_bytes: int
) -> dict[str, Any]:
    """Writes them; what config.json is to say of how they are packed."""
    settings: dict[str, Any] = {}
    if lm.config.quantized is None:
        tensors = slots(lm, layout(family, plan))
    else:
        tensors, said = packed_tensors(lm, family.layouts[0], family.layouts[1:])
        settings = {"quantization_config": said}
    if config != lm.config:
        whole = slots(outline(config), layout(family, plan))
        silent = {name: slot for name, slot in whole.items() if name not in tensors}
        tensors |= {name: Slot(torch.zeros(slot.view.shape, dtype=lm.embedding.dtype)) for name, slot in silent.items()}
    if lm.head is None and "lm_head.weight" in plan:
        tensors["lm_head.weight"] = Slot(lm.embedding.detach().clone())  # safetensors refuses to store one twice
    if set(plan) != set(tensors):
        plan = _plan(tensors, shard_bytes)
    size = 0
    for shard in sorted(set(plan.values())):
        pieces = {
            name: _alone(kept.as_stored(name, tensors[name].stored(), lm.embedding.dtype))
            for name in plan
            if plan[name] == shard
        }
        size += sum(piece.nbytes for piece in pieces.values())
        write_whole(path / shard, lambda aside, pieces=pieces: save_file(pieces, aside, metadata={"format": "pt"}))
        del pieces
    if set(plan.values()) != {SINGLE}:
        total = {
            "total_parameters": sum(s.view.numel() for name, s in tensors.items() if not name.endswith(CORRECTION)),
            "total_size": size,
        }
        index = {"metadata": total, "weight_map": plan}
        if kept.folder is not None and (kept.folder / INDEX).is_file():
            old = read_json(kept.folder / INDEX, "to_hf")
            sized = (old.get("metadata") or total).get("total_size") == total["total_size"]
            same = old.get("weight_map") == plan and sized
            index = old if same else index
        write_whole(path / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return settings


def _alone(tensor: Tensor) -> Tensor:
    """The tensor with storage of its own, which safetensors asks for."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _plan(tensors: Mapping[str, Slot], shard_bytes: int) -> dict[str, str]:
    """Tensor name -> file name, in the order of the layers, each file filled up to ``shard_bytes``."""
    if shard_bytes < 1:
        fix = "pass shard_bytes=5_000_000_000"
        raise UsageError(word("shard_bytes", got=shard_bytes, allowed="be at least 1", where="to_hf", fix=fix))
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors, key=lambda name: (layer_of(name), name)):
        its = tensors[name].view.nbytes
        if size + its > shard_bytes and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += its
    if len(groups) == 1:
        return dict.fromkeys(groups[0], SINGLE)
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return {name: file for file, names in zip(files, groups, strict=True) for name in names}


def _describe_tokenizer(path: Path, max_seq: int) -> dict[str, Any]:
    """Says what a tokenizer of ours is, for AutoTokenizer; the id that ends a text, for config.json."""
    if not (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").exists():
        return {}
    body = read_json(path / "tokenizer.json", "to_hf")
    check_fields(body, {"added_tokens": list[dict] | None}, _bad_tokenizer)
    added = [token for token in body.get("added_tokens") or [] if token.get("content") == _END and token.get("special")]
    for token in added:
        check_fields(token, {"id": int}, _bad_tokenizer)
    ends = {_END: added[0]["id"]} if added else {}
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq}
    keys |= {"clean_up_tokenization_spaces": False, **({"eos_token": _END} if ends else {})}
    write_whole(path / "tokenizer_config.json", json.dumps(keys, indent=2) + "\n")
    return {"eos_token_id": ends[_END]} if ends else {}


def _bad_tokenizer(problem: str) -> CheckpointError:
    fix = "restore it from a copy"
    return CheckpointError(word("tokenizer.json", got=problem, allowed="be sound", where="to_hf", fix=fix))


def _write_config(
    config: LMConfig,
    dtype: torch.dtype,
    family: Family,
    path: Path,
    like: Path | None,
    old: Mapping[str, Any],
    settings: dict[str, Any],
) -> None:
    stored, same = str(dtype).removeprefix("torch."), family_of(old) is family
    settings = _as_before(settings, old)
    names: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    kept = _kept(old, family, config) if same else {}
    alike = same and meaning(family.read(family.keys(old))) == meaning(config)
    if like is not None and alike and stored in (old.get("dtype"), old.get("torch_dtype")):
        ahead = {name: 0 for name in AHEAD if name in old}
        keys = kept | ahead | (names if old["model_type"] != family.model_type else {}) | settings
        text = json.dumps(keys, indent=2, sort_keys=True) + "\n"
        write_whole(path / "config.json", (like / "config.json").read_bytes() if keys == old else text)
        return
    keys = {"use_cache": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    keys |= {name: old[name] for name in (*keys, "transformers_version") if name in old} | kept
    for name in (*_COUNTS, *family.aliases):  # what is written is said once: transformers lets a second name win
        keys.pop(name, None)
    keys |= family.write(config)
    # transformers 5 reads dtype, 4 torch_dtype.
    keys |= names | {"dtype": stored} | settings
    write_whole(path / "config.json", json.dumps(keys | {"torch_dtype": stored}, indent=2, sort_keys=True) + "\n")


def _kept(old: Mapping[str, Any], family: Family, config: LMConfig) -> dict[str, Any]:
    """The keys of a config.json that still hold: all but those of what is not written."""
    layers = family.keys(old).get("num_hidden_layers")
    by_layer = {name for name, value in old.items() if "layer" in name and isinstance(value, list)}
    gone = {*_OLD, *AHEAD, *(by_layer if layers != config.layers else ())}
    return {name: value for name, value in old.items() if name not in gone}
