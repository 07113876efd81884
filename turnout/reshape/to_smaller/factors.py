"""What the reshapes that factor experts share: their matrices part by part, the new model, and its errors."""

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.layers import MoE
from turnout.models import LM, FactoredConfig, LMConfig, MoEConfig
from turnout.paths import Bank, FactoredBank
from turnout.reshape.calibrate import blocks
from turnout.types import ExpertWeights
from turnout.types.weights import GATED

__all__ = ["Matrices", "errors", "matrices", "routed_layers", "whole", "with_factors"]


@dataclasses.dataclass(frozen=True, eq=False)
class Matrices:
    """The expert matrices of one layer in double precision, gate and value apart: (E, P, F, D) and (E, D, F)."""

    up_EPFD: Tensor
    down_EDF: Tensor


def whole(config: LMConfig, where: str) -> MoEConfig:
    """The experts of the model, whose matrices are whole.

    Raises:
        UsageError: it has none, or they are factored already.
    """
    if config.moe is None or config.moe.factored is not None:
        got = "a dense one" if config.moe is None else "one with factored experts"
        fix = "upcycle or split it first" if config.moe is None else "densify it first, or start from the model before"
        raise UsageError(word("the model", got=got, allowed="have experts with whole matrices", where=where, fix=fix))
    if config.moe.per_layer is not None:
        got, fix = f"one with per_layer={config.moe.per_layer}", "train it with the same number in each layer"
        raise UsageError(word("the model", got=got, allowed="have as many in each layer", where=where, fix=fix))
    return config.moe


def routed_layers(lm: LM) -> list[int]:
    """The layers with experts."""
    return [layer for layer, block in enumerate(blocks(lm)) if isinstance(block.ff, MoE)]


def matrices(lm: LM, layer: int) -> Matrices:
    """The matrices of one layer; its bank must be whole."""
    ff = blocks(lm)[layer].ff
    assert isinstance(ff, MoE) and isinstance(ff.bank, Bank)
    parts = 2 if ff.bank.activation in GATED else 1
    up_EPFD = ff.bank.up.detach().double().unflatten(1, (parts, -1))
    return Matrices(up_EPFD, ff.bank.down.detach().double())


def with_factors(config: LMConfig, moe: MoEConfig, factored: FactoredConfig) -> LMConfig:
    """The configuration with these experts, factored."""
    return dataclasses.replace(config, moe=dataclasses.replace(moe, factored=factored))


@torch.no_grad()
def errors(before: LM, after: LM, layers: Iterable[int]) -> dict[str, dict[str, float]]:
    """Layer -> |W' - W| / |W| over its experts, of the up matrices, the down matrices, and both."""
    found = {}
    for layer in layers:
        old, new, sums = _written_out(before, layer), _written_out(after, layer), dict[str, tuple[float, float]]()
        for name, a, b in (("up", old.up_EDH, new.up_EDH), ("down", old.down_EFD, new.down_EFD)):
            sums[name] = float((b.double() - a.double()).square().sum()), float(a.double().square().sum())
        sums["both"] = sums["up"][0] + sums["down"][0], sums["up"][1] + sums["down"][1]
        found[str(layer)] = {name: math.sqrt(gap / max(size, 1e-300)) for name, (gap, size) in sums.items()}
    return found


def _written_out(lm: LM, layer: int) -> ExpertWeights:
    ff = blocks(lm)[layer].ff
    assert isinstance(ff, MoE)
    assert isinstance(ff.bank, Bank | FactoredBank)
    return ff.bank.weights() if isinstance(ff.bank, Bank) else ff.bank.written_out()
