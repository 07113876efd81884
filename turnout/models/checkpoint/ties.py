"""Experts that tie by design, and whether transformers would choose among them as we do."""

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.layers import MoE
from turnout.models.families.family import Family
from turnout.models.lm import LM
from turnout.paths import Bank

__all__ = ["refuse_ties"]


def refuse_ties(lm: LM, family: Family) -> None:
    """Refuses a model whose virtual groups transformers would tear apart.

    Different experts with equal router rows score the same and are chosen together, as shards of one layer (upcycling
    with granularity above 1). Our routers, and a few of transformers', work their scores out in fp32. Most of
    transformers' do so in the dtype of the weights: in bfloat16, with 8 bits of precision, experts of other groups come
    out at the very same score for a few percent of the tokens, and top-k then takes some of one and some of another.

    Raises:
        UsageError: with how to do without.
    """
    moe = lm.config.moe
    half = lm.embedding.dtype in (torch.bfloat16, torch.float16)
    if moe is None or not half or family.exact_gate or moe.top_k == moe.num_experts:
        return
    for number, block in enumerate(lm.blocks):
        ff = getattr(block, "ff", None)
        if not isinstance(ff, MoE) or ff.router is None or not isinstance(ff.bank, Bank):
            continue
        if isinstance(ff.router.weight, Tensor) and _virtual(ff.router.weight, ff.bank):
            got = f"different experts with equal router rows (layer {number}), in {lm.embedding.dtype}"
            fix = "use --granularity 1; or --dtype float32, and load it in float32; or keep it in turnout's own format"
            fix += " (--as model)"
            allowed = (
                f"have a row for each: {family.architecture} rounds scores to that dtype, where others tie with them"
            )
            raise UsageError(word("the routers", got=got, allowed=allowed, where="to_hf", fix=fix))


def _virtual(weight_ED: Tensor, bank: Bank) -> bool:
    """Whether experts of equal router rows differ."""
    _, group_E = torch.unique(weight_ED.detach(), dim=0, return_inverse=True)
    first_E = [int((group_E == group).nonzero()[0]) for group in group_E]
    return any(
        first != expert and not torch.equal(bank.up_EDH[first], bank.up_EDH[expert])
        for expert, first in enumerate(first_E)
    )
