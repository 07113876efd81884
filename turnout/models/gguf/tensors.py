"""The tensors of a GGUF file: their names in llama.cpp, and each as it is stored there, made one at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from turnout.layers import MoE
from turnout.models.attention import Attention, LatentAttention, Projection
from turnout.models.gguf.architectures import Architecture
from turnout.models.lm import LM, Block
from turnout.paths import Bank, FeedForward
from turnout.types import Packed
from turnout.types.weights import GATED

__all__ = ["Piece", "pieces", "silence"]

# What llama.cpp does not load without an output layer of its own, also where that is the embedding.
_UNTIED = ("gpt-oss", "olmo2", "olmoe", "qwen2moe")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of the file.

    Args:
        name: in llama.cpp.
        make: gives it.
        shape: of it.
        dtype: that the model has it in.
        exact: stays in fp32 whatever the others are in: norms, biases, routers.
        packed: gives it in few bits, as the model has it; None where that has it whole.
    """

    name: str
    make: Callable[[], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    exact: bool = False
    packed: Callable[[], Packed] | None = None

    @classmethod
    def of(cls, name: str, tensor: Tensor, *, exact: bool = False) -> "Piece":
        """A tensor as it is."""
        return cls(name, lambda: tensor, tuple(tensor.shape), tensor.dtype, exact)


def pieces(lm: LM, its: Architecture) -> Iterator[Piece]:
    """All tensors of a model in the order of its layers.

    Args:
        lm: the model, one that this architecture computes.
        its: the architecture.
    """
    yield Piece.of("token_embd.weight", lm.embedding)
    if lm.positions is not None:
        yield Piece.of("position_embd.weight", lm.positions, exact=True)
    yield from _norm("output_norm", lm.norm)
    if lm.head is not None:
        yield Piece.of("output.weight", lm.head.weight)
    elif its.name in _UNTIED:
        yield Piece.of("output.weight", lm.embedding)
    yield from _factors(lm, its)
    for layer, block in enumerate(lm.blocks):
        assert isinstance(block, Block)
        yield from _block(f"blk.{layer}.", lm, block, its)


def _block(at: str, lm: LM, block: Block, its: Architecture) -> Iterator[Piece]:
    norms = {
        "attn_norm": block.attention_norm,
        "post_attention_norm": block.attention_out_norm,
        its.ff_norm: block.ff_norm,
        "post_ffw_norm": block.ff_out_norm,
    }
    for name, norm in norms.items():
        if norm is not None:
            yield from _norm(at + name, norm)
    if isinstance(block.attention, Attention):
        yield from _attention(at, block.attention, its)
    else:
        yield from _latent(at, block.attention)
    if isinstance(block.ff, MoE):
        yield from _routed(at, block.ff)
    else:
        assert isinstance(block.ff, FeedForward)
        yield from _dense(at, "", block.ff, joined=its.name == "phi3")


def _norm(name: str, norm: Any) -> Iterator[Piece]:
    """Norms that store their weight less one are written whole."""
    weight = norm.weight.detach()
    whole = weight.float() + 1 if getattr(norm, "plus_one", False) else weight
    yield Piece.of(f"{name}.weight", whole, exact=True)
    if getattr(norm, "bias", None) is not None:
        yield Piece.of(f"{name}.bias", norm.bias, exact=True)


def _factors(lm: LM, its: Architecture) -> Iterator[Piece]:
    """What llama.cpp divides the rotary frequencies by: those of Llama 3 and of LongRoPE."""
    scaling: Mapping[str, Any] = lm.config.rope_scaling or {}
    if scaling.get("rope_type") == "llama3":
        wide = lm.config.rotated_width
        plain = 1.0 / lm.config.rope_theta ** (torch.arange(0, wide, 2, dtype=torch.float32) / wide)
        yield Piece.of("rope_freqs.weight", plain / lm.rope.frequency_P, exact=True)
    if scaling.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            factors = torch.tensor(scaling[f"{kind}_factor"], dtype=torch.float32)
            yield Piece.of(f"rope_factors_{kind}.weight", factors, exact=True)


def _projection(name: str, projection: Projection) -> Iterator[Piece]:
    yield Piece.of(f"{name}.weight", projection.weight)
    if projection.bias is not None:
        yield Piece.of(f"{name}.bias", projection.bias, exact=True)


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of heads whose pairs lie halves apart, in the order in which pairs are neighbours."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _attention(at: str, part: Attention, its: Architecture) -> Iterator[Piece]:
    yield from _projection(f"{at}attn_output", part.out)
    for kind, tensor in (("weight", part.qkv.weight), ("bias", part.qkv.bias)):
        if tensor is None:
            continue
        if its.name in ("phi3", "gpt2"):
            yield Piece.of(f"{at}attn_qkv.{kind}", tensor, exact=kind == "bias")
            continue
        for letter, heads, rows in zip("qkv", (part.heads, part.key_heads, 0), tensor.split(part.sizes), strict=True):
            make = (lambda r=rows, h=heads: _paired(r, h)) if its.neighbours and heads else (lambda r=rows: r)
            yield Piece(f"{at}attn_{letter}.{kind}", make, tuple(rows.shape), rows.dtype, kind == "bias")
    if part.q_norm is not None and part.k_norm is not None:
        yield from _norm(f"{at}attn_q_norm", part.q_norm)
        yield from _norm(f"{at}attn_k_norm", part.k_norm)
    if part.sinks is not None:
        yield Piece.of(f"{at}attn_sinks.weight", part.sinks, exact=True)


def _latent(at: str, part: LatentAttention) -> Iterator[Piece]:
    sizes, heads = part.mla, part.heads

    def turned(rows: Tensor, count: int) -> Tensor:
        """The last ``rope_dim`` rows of each head in the order of neighbours."""
        if sizes.interleaved:
            return rows
        by_head = rows.unflatten(0, (count, -1))
        plain, rope = by_head.split((by_head.shape[1] - sizes.rope_dim, sizes.rope_dim), dim=1)
        return torch.cat((plain, _paired(rope.flatten(0, 1), count).unflatten(0, (count, -1))), 1).flatten(0, 1)

    q_up, name = part.q_up.weight, "attn_q"
    if part.q_down is not None and part.q_norm is not None:
        name = "attn_q_b"
        yield from _projection(f"{at}attn_q_a", part.q_down)
        yield from _norm(f"{at}attn_q_a_norm", part.q_norm)
    yield Piece(f"{at}{name}.weight", lambda: turned(q_up, heads), tuple(q_up.shape), q_up.dtype)
    down, up = part.kv_down.weight, part.kv_up.weight.unflatten(0, (heads, -1))
    yield Piece(f"{at}attn_kv_a_mqa.weight", lambda: turned(down, 1), tuple(down.shape), down.dtype)
    yield from _norm(f"{at}attn_kv_a_norm", part.kv_norm)
    k_HNR, v_HVR = up.split((sizes.nope_dim, sizes.v_dim), dim=1)
    yield Piece.of(f"{at}attn_k_b.weight", k_HNR.transpose(1, 2))
    yield Piece.of(f"{at}attn_v_b.weight", v_HVR)
    yield from _projection(f"{at}attn_output", part.out)


def _dense(at: str, end: str, ff: FeedForward, *, joined: bool = False) -> Iterator[Piece]:
    yield Piece.of(f"{at}ffn_down{end}.weight", ff.down)
    if ff.down_bias is not None:
        yield Piece.of(f"{at}ffn_down{end}.bias", ff.down_bias, exact=True)
    for kind, tensor in (("weight", ff.up), ("bias", ff.up_bias)):
        if tensor is None:
            continue
        if joined or ff.activation not in GATED:
            yield Piece.of(f"{at}ffn_up{end}.{kind}", tensor, exact=kind == "bias")
            continue
        for name, half in zip(("gate", "up"), tensor.chunk(2), strict=True):
            yield Piece.of(f"{at}ffn_{name}{end}.{kind}", half, exact=kind == "bias")


def _routed(at: str, moe: MoE) -> Iterator[Piece]:
    assert moe.router is not None
    router = dict(moe.router.named_parameters()) | dict(moe.router.named_buffers())
    yield Piece.of(f"{at}ffn_gate_inp.weight", router["weight"], exact=True)
    if "bias" in router:
        yield Piece.of(f"{at}ffn_gate_inp.bias", router["bias"], exact=True)
    if "bias_E" in router:
        yield Piece.of(f"{at}exp_probs_b.bias", router["bias_E"], exact=True)
    bank = moe.bank
    assert isinstance(bank, Bank)  # factored experts were refused: no architecture has them
    gate_EFD, value_EFD = bank.up_EDH.transpose(1, 2).chunk(2, dim=1)
    yield Piece.of(f"{at}ffn_gate_exps.weight", gate_EFD)
    yield Piece.of(f"{at}ffn_up_exps.weight", value_EFD)
    yield Piece.of(f"{at}ffn_down_exps.weight", bank.down_EFD.transpose(1, 2))
    if bank.up_bias is not None and bank.down_bias is not None:
        for name, half in zip(("gate", "up"), bank.up_bias.chunk(2, dim=1), strict=True):
            yield Piece.of(f"{at}ffn_{name}_exps.bias", half, exact=True)
        yield Piece.of(f"{at}ffn_down_exps.bias", bank.down_bias, exact=True)
    if moe.shared is not None:
        yield from _dense(at, "_shexp", moe.shared)
    if moe.shared_gate is not None:
        yield Piece.of(f"{at}ffn_gate_inp_shexp.weight", moe.shared_gate.flatten(), exact=True)


def silence(name: str) -> float:
    """What all numbers are of a part of this name that adds nothing to a model.

    A shared expert of zeros adds nothing behind any gate, and llama.cpp makes its gate of g as silu(g) / g, which is no
    number where g is 0: so that gate is not.

    >>> silence("blocks.0.ff.shared.up"), silence("blocks.0.ff.shared_gate")
    (0.0, 1.0)
    """
    return 1.0 if name.rpartition(".")[2] == "shared_gate" else 0.0
