"""Adapters of low rank on a language model of ours: put on, folded in, and written as PEFT has them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.expects import expects
from turnout.models import LM
from turnout.models.attention import Attention, Projection
from turnout.models.checkpoint.peft import PeftAdapter
from turnout.models.families.express import architecture_of
from turnout.models.families.tensors import slots
from turnout.models.packed import refuse_packed
from turnout.paths import FeedForward, LowRank
from turnout.types import Report
from turnout.types.weights import GATED

__all__ = ["add_low_rank", "fold_low_rank", "low_rank_adapter"]


@dataclass(frozen=True, eq=False)
class _Map:
    """A linear map of the model: its weight (outer, inner), and the module and attribute that an adapter goes to."""

    name: str
    weight: nn.Parameter
    owner: nn.Module
    slot: str
    sizes: tuple[int, ...]

    @property
    def added(self) -> LowRank | None:
        return getattr(self.owner, self.slot)


def _maps(lm: LM) -> Iterator[_Map]:
    """The linear maps of attention; of a model without experts those of its feed-forward layers too.

    Beside experts a folder's gate_proj is told from theirs by its place alone, and PEFT (0.21) takes it for theirs.
    """
    dense = lm.config.moe is None
    owners = {id(m.qkv): m.sizes for m in lm.modules() if isinstance(m, Attention)}
    for name, module in lm.blocks.named_modules(prefix="blocks"):
        if isinstance(module, Projection):
            yield _Map(name, module.weight, module, "added", owners.get(id(module), tuple(module.weight.shape[:1])))
        elif dense and isinstance(module, FeedForward):
            wide = module.up.shape[0]
            gated = module.activation in GATED
            yield _Map(f"{name}.up", module.up, module, "up_added", (wide // 2, wide // 2) if gated else (wide,))
            yield _Map(f"{name}.down", module.down, module, "down_added", tuple(module.down.shape[:1]))


@expects(lm=LM)
def add_low_rank(lm: LM, *, rank: int, alpha: float | None = None, seed: int = 0) -> tuple[LM, Report]:
    """The same model with an adapter of low rank on each linear map of attention, and of its feed-forward layers.

    Each of what a folder of transformers has as a map of its own (q_proj, k_proj, gate_proj...) gets its own pair.
    Embeddings and the output layer get none, and in a model with experts no feed-forward layer and no router does. At
    first nothing is added. Changed in place.

    Args:
        lm: the model.
        rank: of each adapter.
        alpha: what is added is scaled by alpha / rank; None for 2 · rank.
        seed: of the factors that do not begin at zero.

    Returns:
        ``lm`` itself, and a report: ``modules`` names the maps, ``params_added`` what they cost.

    Raises:
        UsageError: it has some already, weights in few bits, or a rank below 1.

    >>> from turnout.models import LMConfig
    >>> lm, report = add_low_rank(LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, hidden=12)), rank=2)
    >>> report["modules"], report["params_added"]
    (['blocks.0.attention.qkv', 'blocks.0.attention.out', 'blocks.0.ff.up', 'blocks.0.ff.down'], 248)

    Source: Hu et al., 2021, "LoRA"; on all linear maps as Dettmers et al., 2023, "QLoRA".
    """
    refuse_packed(lm, "adapted", where="turnout.reshape.add_low_rank")
    maps = list(_maps(lm))
    if any(one.added is not None for one in maps):
        fix = "call turnout.reshape.fold_low_rank first"
        where = "turnout.reshape.add_low_rank"
        raise UsageError(word("lm", got="adapters already", allowed="have none", where=where, fix=fix))
    scale = (2.0 * rank if alpha is None else alpha) / max(rank, 1)
    generator = torch.Generator().manual_seed(seed)
    for one in maps:
        added = LowRank(one.weight.shape[1], one.sizes, rank=rank, scale=scale, generator=generator)
        setattr(one.owner, one.slot, added.to(one.weight).train(one.owner.training))
    added = sum(p.numel() for one in maps if one.added is not None for p in one.added.parameters())
    return lm, Report("add_low_rank", {"modules": [one.name for one in maps], "rank": rank, "params_added": added})


@expects(lm=LM)
@torch.no_grad()
def fold_low_rank(lm: LM) -> tuple[LM, Report]:
    """The same model with its adapters folded into the weights: W + scale · B A, and no adapters; changed in place.

    Args:
        lm: what ``add_low_rank`` gave.

    Returns:
        ``lm`` itself, and a report whose ``modules`` names the maps; none of a model without adapters.

    >>> from turnout.models import LMConfig
    >>> lm, _ = add_low_rank(LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2)), rank=2)
    >>> len(fold_low_rank(lm)[1]["modules"]), len(fold_low_rank(lm)[1]["modules"])
    (4, 0)

    Source: Hu et al., 2021, "LoRA", section 4.1.
    """
    folded = []
    for one in _maps(lm):
        if one.added is not None:
            one.weight.add_(one.added.product())
            setattr(one.owner, one.slot, None)
            folded.append(one.name)
    return lm, Report("fold_low_rank", {"modules": folded})


@expects(lm=LM)
def low_rank_adapter(lm: LM, name: str, *, base: str | None = None, prefer: str | None = None) -> PeftAdapter:
    """The adapters of the model as one of PEFT's, for the folder of transformers that the model is, or is written to.

    Args:
        lm: what ``add_low_rank`` gave.
        name: of the adapter.
        base: the name or folder of the model that it belongs to.
        prefer: the ``model_type`` in transformers, where several could hold the model.

    Raises:
        UsageError: no architecture of transformers computes what the model does, or it has no adapters.

    >>> from turnout.models import LMConfig
    >>> lm, _ = add_low_rank(LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2)), rank=2)
    >>> sorted(low_rank_adapter(lm, "a").factor)[0]
    'model.layers.0.mlp.down_proj'

    Source: Hu et al., 2021, "LoRA"; the names are those of transformers.
    """
    family, _ = architecture_of(lm.config, prefer=prefer)
    theirs = {_place(slot.view): (key, slot.view.shape) for key, slot in slots(lm, family.layouts[0]).items()}
    factor: dict[str, tuple[Tensor, Tensor, float]] = {}
    for one in _maps(lm):
        if one.added is None:
            continue
        whole, pairs = one.weight.detach(), one.added.pairs()
        parts = list(zip(whole.split(one.sizes), pairs, strict=True))
        if theirs.get(_place(whole), ("", None))[1] == whole.shape:  # one map there: a pair of blocks
            parts = [(whole, (one.added.down, torch.block_diag(*(b for _, b in pairs))))]
        for part, (a, b) in parts:
            key, shape = theirs.get(_place(part), ("", None))
            if shape != part.shape or not key.endswith(".weight"):
                got, fix = f"{one.name}, which {family.architecture} stores otherwise", "fold it, with fold_low_rank"
                where, allowed = "turnout.reshape.low_rank_adapter", "be a map by itself there"
                raise UsageError(word("an adapted map", got=got, allowed=allowed, where=where, fix=fix))
            factor[key.removesuffix(".weight")] = (a.detach().clone(), b.detach().clone(), one.added.scale)
    if not factor:
        where, fix = "turnout.reshape.low_rank_adapter", "call turnout.reshape.add_low_rank first"
        raise UsageError(word("lm", got="no adapters", allowed="have some", where=where, fix=fix))
    return PeftAdapter(name, base, factor)


def _place(view: Tensor) -> tuple[int, tuple[int, ...]]:
    """Where a view of a weight lies, which no other does."""
    return view.data_ptr(), view.stride()
