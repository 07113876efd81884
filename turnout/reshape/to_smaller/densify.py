"""Writing out experts: every expert with whole matrices of its own, as other formats want them."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from turnout.expects import expects
from turnout.layers import MoE
from turnout.models import LM, LMConfig
from turnout.paths import Bank, FactoredBank, PackedBank, PackedWeight
from turnout.reshape.calibrate import blocks, checked, difference, probe
from turnout.reshape.rebuild import bill, rebuild
from turnout.reshape.resumable import by_layer
from turnout.reshape.to_smaller.factors import routed_layers
from turnout.types import Report

__all__ = ["densify"]

_WHERE = "turnout.reshape.densify"


@expects(lm=LM)
def densify(lm: LM, *, batches: Iterable[Tensor] | None = None, seed: int = 0) -> tuple[LM, Report]:
    """The model with each expert's matrices written out, W_e = L_e R_e + S_e, and merged experts copied to each member.

    Maps in few bits are written out too, in the model's own dtype. It computes the same up to rounding, takes the
    memory of the model before it was compressed, merged or quantized, and is what transformers' formats can hold.

    Args:
        lm: a model whose experts are factored or merged, or whose maps are in few bits; it is left as it is.
        batches: (B, S) token ids to compare on; random tokens when None.
        seed: of those tokens.

    Returns:
        The larger model; and the bill and the difference on the text.

    >>> from turnout.models import MoEConfig
    >>> from turnout.reshape.to_smaller.latent_experts import latent_experts
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, moe=MoEConfig(4, 2, hidden=8)))
    >>> again, report = densify(latent_experts(lm, rank=2)[0])
    >>> again.config == lm.config, report["relative_difference"] < 1e-5
    (True, True)

    Source: none; our own: products written out.
    """
    text, config = checked(batches, lm, _WHERE, packed=True), planned(lm.config)
    changed = dict[str, Tensor]()
    if config != lm.config:
        found = by_layer("writing out", routed_layers(lm), lambda layer: _bank(lm, layer))
        changed = _unpacked(lm) | {
            f"blocks.{layer}.ff.bank.{name}": part for layer, bank in found.items() for name, part in bank.items()
        }
    new = rebuild(lm, config, changed)
    values = {**bill(lm, new), **difference(lm, new, text or probe(lm, seed))}
    return new, Report(
        "densify", values, () if config != lm.config else ("nothing was factored, merged or in few bits",)
    )


def planned(config: LMConfig) -> LMConfig:
    """The configuration that ``densify`` makes of this one."""
    config = dataclasses.replace(config, quantized=None)
    if config.moe is None:
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, factored=None, distinct=None))


@torch.no_grad()
def _unpacked(lm: LM) -> dict[str, Tensor]:
    """The maps in few bits by name, written out; those of banks are not among them."""
    return {
        name: module.packed.dequantised(lm.embedding.dtype)
        for name, module in lm.named_modules()
        if isinstance(module, PackedWeight) and len(module.packed.shape) == 2
    }


@torch.no_grad()
def _bank(lm: LM, layer: int) -> dict[str, Tensor]:
    ff = blocks(lm)[layer].ff
    assert isinstance(ff, MoE)
    if isinstance(ff.bank, PackedBank):
        out = ff.bank.weights().written_out(lm.embedding.dtype)
    else:
        assert isinstance(ff.bank, Bank | FactoredBank)
        out = ff.bank.weights() if isinstance(ff.bank, Bank) else ff.bank.written_out()
    tensors = {"up": out.up_EDH, "down": out.down_EFD, "up_bias": out.up_bias_EH, "down_bias": out.down_bias_ED}
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if ff.label_E is not None:
        held = {name: tensor[ff.label_E] for name, tensor in held.items()}
    return {name: tensor.detach().contiguous() for name, tensor in held.items()}
