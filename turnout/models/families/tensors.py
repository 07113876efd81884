"""Where each tensor of a transformers folder lies in our model: its name there, and a view of our parameter."""

import dataclasses

from torch import Tensor

from turnout.layers import MoE
from turnout.models.attention import Attention, LatentAttention, Projection
from turnout.models.families.family import Names
from turnout.models.lm import LM, Block
from turnout.paths import Bank, FeedForward, OffloadedBank, PackedBank
from turnout.types.weights import GATED

Views = dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """Where one tensor of a folder lies in our model.

    Args:
        view: of our parameter, in the order that the folder has.
        joined: whether its last two axes are one in the folder: the pairs of gates and values that alternate there.
    """

    view: Tensor
    joined: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the folder."""
        shape = tuple(self.view.shape)
        return (*shape[:-2], shape[-2] * shape[-1]) if self.joined else shape

    def cut(self, stored: Tensor) -> Tensor:
        """The folder's tensor, or a part of it along the first axes, in the shape of the view."""
        return stored.unflatten(-1, (-1, 2)) if self.joined else stored

    def stored(self) -> Tensor:
        """What the folder holds."""
        return self.view.flatten(-2) if self.joined else self.view


def slots(lm: LM, names: Names) -> dict[str, Slot]:
    """Every tensor that the folder of this model holds, by name.

    Reading copies into the views, writing copies out of them. No two overlap and together they are all parameters.

    Args:
        lm: the model.
        names: how the architecture names its tensors.
    """
    if names.views is not None:
        return {name: Slot(tensor.detach()) for name, tensor in names.views(lm, names.root).items()}
    found: Views = {"model.embed_tokens.weight": lm.embedding, "model.norm.weight": lm.norm.weight}
    if lm.head is not None:
        found["lm_head.weight"] = lm.head.weight
    for layer, block in enumerate(lm.blocks):
        assert isinstance(block, Block)
        prefix = f"model.layers.{layer}."
        found |= _norms(prefix, block)
        if isinstance(block.attention, Attention):
            found |= _grouped(f"{prefix}self_attn.", block.attention, names)
        else:
            found |= _latent(f"{prefix}self_attn.", block.attention)
        if isinstance(block.ff, MoE):
            found |= _routed(f"{prefix}{names.routed}.", block.ff, names)
        else:
            found |= _dense(f"{prefix}mlp.", block.ff, names)
    joined = _alternating(names) if lm.config.moe is not None else ()
    return {name: Slot(tensor.detach(), name.endswith(joined)) for name, tensor in found.items()}


def _norms(prefix: str, block: Block) -> Views:
    # The same name stands for the norm before the feed-forward layer where there is none after attention.
    ff = "post_attention_layernorm" if block.attention_out_norm is None else "pre_feedforward_layernorm"
    norms = {
        "input_layernorm": block.attention_norm,
        "post_attention_layernorm": block.attention_out_norm,
        ff: block.ff_norm,
        "post_feedforward_layernorm": block.ff_out_norm,
    }
    return {f"{prefix}{name}.weight": norm.weight for name, norm in norms.items() if norm is not None}


def _alternating(names: Names) -> tuple[str, ...]:
    return (names.fused[0], f"{names.fused[0]}_bias") if names.alternating and names.fused else ()


def _projection(name: str, projection: Projection) -> Views:
    bias = {} if projection.bias is None else {f"{name}.bias": projection.bias}
    return {f"{name}.weight": projection.weight, **bias}


def _grouped(prefix: str, attention: Attention, names: Names) -> Views:
    found = _projection(f"{prefix}o_proj", attention.out)
    for kind, tensor in (("weight", attention.qkv.weight), ("bias", attention.qkv.bias)):
        if tensor is not None and names.qkv is not None:
            found[f"{prefix}{names.qkv}.{kind}"] = tensor
        elif tensor is not None:
            parts = zip("qkv", tensor.split(attention.sizes), strict=True)
            found |= {f"{prefix}{letter}_proj.{kind}": part for letter, part in parts}
    if attention.q_norm is not None and attention.k_norm is not None:
        found |= {f"{prefix}q_norm.weight": attention.q_norm.weight, f"{prefix}k_norm.weight": attention.k_norm.weight}
    if attention.sinks is not None:
        found[f"{prefix}sinks"] = attention.sinks
    return found


def _latent(prefix: str, attention: LatentAttention) -> Views:
    found = _projection(f"{prefix}kv_a_proj_with_mqa", attention.kv_down)
    found |= _projection(f"{prefix}kv_b_proj", attention.kv_up) | _projection(f"{prefix}o_proj", attention.out)
    found[f"{prefix}kv_a_layernorm.weight"] = attention.kv_norm.weight
    if attention.q_down is None or attention.q_norm is None:
        return found | _projection(f"{prefix}q_proj", attention.q_up)
    found[f"{prefix}q_a_layernorm.weight"] = attention.q_norm.weight
    return found | _projection(f"{prefix}q_a_proj", attention.q_down) | _projection(f"{prefix}q_b_proj", attention.q_up)


def _dense(prefix: str, ff: FeedForward, names: Names) -> Views:
    found: Views = {f"{prefix}down_proj.weight": ff.down}
    if ff.down_bias is not None:
        found[f"{prefix}down_proj.bias"] = ff.down_bias
    for kind, tensor in (("weight", ff.up), ("bias", ff.up_bias)):
        if tensor is None:
            continue
        if ff.activation not in GATED:
            found[f"{prefix}up_proj.{kind}"] = tensor
            continue
        if names.gate_up is not None:
            found[f"{prefix}{names.gate_up}.{kind}"] = tensor
            continue
        gate, up = tensor.chunk(2)
        found |= {f"{prefix}gate_proj.{kind}": gate, f"{prefix}up_proj.{kind}": up}
    return found


def _routed(prefix: str, moe: MoE, names: Names) -> Views:
    found: Views = {}
    assert moe.router is not None
    router = dict(moe.router.named_parameters()) | dict(moe.router.named_buffers())
    found[f"{prefix}{names.router}"] = router["weight"]
    if "bias" in router:
        found[f"{prefix}{names.router.removesuffix('weight')}bias"] = router["bias"]
    if "bias_E" in router:
        found[f"{prefix}gate.e_score_correction_bias"] = router["bias_E"]
    # Factored experts were refused: no architecture has them. Those in few bits, or in files, are no whole tensors.
    assert isinstance(moe.bank, Bank | PackedBank | OffloadedBank)
    if isinstance(moe.bank, Bank):
        found |= _experts(prefix, moe.bank, names)
    if moe.shared is not None:
        found |= _dense(f"{prefix}{names.shared}.", moe.shared, names)
    if moe.shared_gate is not None:
        found[f"{prefix}{names.shared}_gate.weight"] = moe.shared_gate
    return found


def _experts(prefix: str, bank: Bank, names: Names) -> Views:
    found: Views = {}
    if names.fused is None:
        for expert, (up_DH, down_FD) in enumerate(zip(bank.up_EDH.unbind(), bank.down_EFD.unbind(), strict=True)):
            gate_FD, value_FD = up_DH.t().chunk(2)
            found[f"{prefix}experts.{expert}.{names.gate}.weight"] = gate_FD
            found[f"{prefix}experts.{expert}.{names.up}.weight"] = value_FD
            found[f"{prefix}experts.{expert}.{names.down}.weight"] = down_FD.t()
        return found
    up, down = (f"{prefix}{name}" for name in names.fused)
    if not names.alternating:
        return {up: bank.up_EDH.transpose(1, 2), down: bank.down_EFD.transpose(1, 2)}
    found |= {up: _pairs(bank.up_EDH), down: bank.down_EFD}
    if bank.up_bias is not None and bank.down_bias is not None:
        found |= {f"{up}_bias": _pairs(bank.up_bias), f"{down}_bias": bank.down_bias}
    return found


def _pairs(halves: Tensor) -> Tensor:
    """(..., F, 2), gate f beside value f, of (..., 2F), all gates first."""
    return halves.unflatten(-1, (2, -1)).transpose(-1, -2)
