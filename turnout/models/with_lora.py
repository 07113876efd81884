"""A language model with one LoRA adapter of PEFT beside its maps, its weights shared with the model without."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from turnout.errors import CheckpointError, ShapeError, word
from turnout.models.attention import Attention, Projection
from turnout.models.checkpoint.peft import PeftAdapter, read_adapter
from turnout.models.families.express import architecture_of
from turnout.models.families.tensors import slots
from turnout.models.lm import LM
from turnout.paths import FeedForward, OffloadedBank, PackedBank
from turnout.paths.low_rank import LowRank
from turnout.types.weights import GATED

__all__ = ["with_lora"]

_WHERE = "turnout.models.with_lora"


@torch.no_grad()
def with_lora(lm: LM, adapter: str | Path | PeftAdapter) -> LM:
    """Another LM of the same weights, the very tensors, with W x + scale · B A x where the adapter says so.

    Args:
        lm: the model, which stays as it is.
        adapter: a folder of PEFT, or an adapter that was read.

    Raises:
        CheckpointError: the folder is not whole, holds other weights of the base than the model has, or changes what
            the model does not have as a map by itself: experts, embeddings, the output layer.
        ShapeError: it belongs to a model of other sizes.

    >>> from turnout.models.lm import LMConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2)).eval()
    >>> one = PeftAdapter("a", None, {"model.layers.0.self_attn.o_proj": (torch.ones(2, 8), torch.ones(8, 2), 0.5)})
    >>> other, id_BS = with_lora(lm, one), torch.tensor([[1]])
    >>> other.embedding is lm.embedding, torch.equal(other(id_BS).logits_BSV, lm(id_BS).logits_BSV)
    (True, False)

    Source: Hu et al., 2021, "LoRA"; the folder format of PEFT.
    """
    found = adapter if isinstance(adapter, PeftAdapter) else read_adapter(adapter)
    kept: dict[int, object] = {id(one): one for one in (*lm.parameters(), *lm.buffers())}
    kept[id(lm.experts)] = lm.experts
    made = copy.deepcopy(lm, kept)
    family, _ = architecture_of(made.config)
    # Experts may be in files or in few bits; adapters of them are refused below.
    whole = not any(isinstance(one, OffloadedBank | PackedBank) for one in made.modules())
    named = {key: slot.view for key, slot in slots(made, family.layouts[0], experts=whole).items()}
    for key, tensor in found.copies.items():
        if (own := named.get(f"{key}.weight")) is None or not torch.equal(own, tensor.to(own.dtype)):
            raise _refused(found.name, f"{key}, other than the model's", "hold no weights of another base")
    theirs = dict(found.factor)
    for owner, slot, weight, sizes in _maps(made):
        parts = [theirs.pop(_name(named, part), None) for part in weight.split(sizes)]
        if any(part is not None for part in parts):
            setattr(owner, slot, _low_rank(found.name, weight, sizes, parts))
    if theirs:
        raise _refused(found.name, f"factors of {next(iter(theirs))}", "change maps of attention, or of dense layers")
    return made


def _maps(lm: LM) -> Iterator[tuple[nn.Module, str, Tensor, tuple[int, ...]]]:
    """The maps that can have something added: whose, where, their weights, and the outputs of each kind."""
    owners = {id(one.qkv): one.sizes for one in lm.modules() if isinstance(one, Attention)}
    for module in lm.blocks.modules():
        if isinstance(module, Projection):
            yield module, "added", module.weight, owners.get(id(module), tuple(module.weight.shape[:1]))
        elif isinstance(module, FeedForward) and lm.config.moe is None:
            wide = module.up.shape[0]
            halves = (wide // 2, wide // 2) if module.activation in GATED else (wide,)
            yield module, "up_added", module.up, halves
            yield module, "down_added", module.down, tuple(module.down.shape[:1])


def _name(named: dict[str, Tensor], part: Tensor) -> str:
    """What transformers calls a map; nothing where it has it otherwise."""
    for key, view in named.items():
        if view.data_ptr() == part.data_ptr() and view.stride() == part.stride() and view.shape == part.shape:
            return key.removesuffix(".weight")
    return ""


def _low_rank(
    name: str, weight: Tensor, sizes: tuple[int, ...], parts: list[tuple[Tensor, Tensor, float] | None]
) -> LowRank:
    """What is added to a map, a pair for each kind of its outputs; of smaller rank with zeros."""
    rank = max(part[0].shape[0] for part in parts if part is not None)
    added = LowRank(weight.shape[1], sizes, rank=rank, scale=1.0)
    added.down.zero_()
    added.up.zero_()
    start = 0
    for kind, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        if part is not None:
            a, b, scale = part
            if a.shape[1] != weight.shape[1] or b.shape[0] != size:
                got, allowed = f"{tuple(b.shape)} and {tuple(a.shape)}", f"be of a map ({size}, {weight.shape[1]})"
                fix = "take the adapter of this model"
                raise ShapeError(word(f"the factors of {name}", got=got, allowed=allowed, where=_WHERE, fix=fix))
            added.down[kind * rank : kind * rank + a.shape[0]] = a
            added.up[start : start + size, : a.shape[0]] = b * scale
        start += size
    return added.to(weight).eval().requires_grad_(False)


def _refused(name: str, got: str, allowed: str) -> CheckpointError:
    fix = "merge it into a copy of the model, with PEFT's merge_and_unload, and take the folder of that"
    return CheckpointError(word(f"the adapter {name!r}", got=got, allowed=allowed, where=_WHERE, fix=fix))
