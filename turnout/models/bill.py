"""What a token's forward pass through a language model takes, counted from its parts."""

from collections.abc import Iterable

from torch import nn

from turnout.layers import MoE
from turnout.models.attention import Projection, attended
from turnout.models.block import Block
from turnout.models.config import LMConfig
from turnout.models.pre_gate import PreGate
from turnout.paths import FeedForward, PackedFeedForward, PackedLinear, PackedWeight
from turnout.types import Cost
from turnout.wrappers import unwrapped

__all__ = ["cost"]


def cost(lm: nn.Module, config: LMConfig, blocks: Iterable[Block], pre_gate: PreGate | None, seq: int) -> Cost:
    """As ``LM.cost``, of sequences of this length. A weight in few bits is one parameter."""
    params = sum(parameter.numel() for parameter in lm.parameters()) + _packed(lm)
    active, products = params, float(config.width * config.vocab_size)
    for layer, block in enumerate(blocks):
        maps = (m for m in block.attention.modules() if isinstance(m, Projection | PackedLinear))
        products += sum(each.weight.numel() for each in maps)
        products += attended(config, layer, seq)
        moe = unwrapped(block.ff)
        if isinstance(moe, FeedForward | PackedFeedForward):
            products += moe.up.numel() + moe.down.numel()
            continue
        assert isinstance(moe, MoE)
        bank = moe.bank
        used = min(_experts_per_token(config), bank.num_experts)
        spent = bank.cost(1, used)
        active -= (spent.params or 0) - (spent.params_active or 0)
        products += (spent.flops or 0.0) / 2
        always = [None if moe.router is None else getattr(unwrapped(moe.router), "weight", None), moe.shared_gate]
        always += [] if moe.shared is None else [moe.shared.up, moe.shared.down]
        products += sum(p.numel() for p in always if p is not None)
    products += 0 if pre_gate is None else pre_gate.products(seq)
    return Cost(params=params, params_active=active, flops=2.0 * products)


def _packed(model: nn.Module) -> int:
    """How many weights are in few bits."""
    return sum(module.numel() for module in model.modules() if isinstance(module, PackedWeight))


def _experts_per_token(config: LMConfig) -> float:
    """K, or for experts that choose their tokens the mean number that choose one."""
    moe = config.moe
    if moe is None:
        return 0
    factor = moe.router_options.get("capacity_factor")
    if moe.router == "ExpertChoice" and isinstance(factor, int | float):
        return factor
    return moe.top_k
