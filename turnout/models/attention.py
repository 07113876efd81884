"""Attention of a decoder: grouped-query and multi-head latent, and the cache of what they have seen."""

import functools
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.errors import ShapeError, UsageError, word
from turnout.models.config import LMConfig, MLAConfig
from turnout.models.fused import capped, turn
from turnout.models.norm import RMSNorm, build_norm
from turnout.models.padding import Places
from turnout.models.rope import attention_scale, rotate_neighbours
from turnout.paths import LowRank, PackedLinear
from turnout.run.compiled.attention import looks, suits_looks
from turnout.run.product import linear
from turnout.run.tuned import tuning
from turnout.types.invariant import invariant_here

__all__ = ["Attention", "Cache", "LatentAttention", "Projection", "attended", "projection"]

Angles = tuple[Tensor, Tensor]


class Projection(nn.Module):
    """An affine map, as ``nn.Linear``, by the fastest kernel of the machine and started from a given generator."""

    def __init__(self, inner: int, outer: int, *, bias: bool, std: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outer, inner).normal_(0, std, generator=generator))
        self.bias = nn.Parameter(torch.zeros(outer)) if bias else None
        self.added: LowRank | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., outer) from (..., inner)."""
        y = linear(x, self.weight, self.bias)
        return y if self.added is None else y + self.added(x)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


def projection(
    config: LMConfig, part: str, inner: int, outer: int, *, bias: bool, generator: torch.Generator | None
) -> Any:
    """A map of the model: a ``Projection``, or a ``PackedLinear`` where the configuration says so of maps of its kind.

    It is typed as neither: whoever reads ``weight`` as a tensor has refused models in few bits before.
    """
    packs = config.packs(part)
    if packs is not None:
        return PackedLinear(inner, outer, packs=packs, bias=bias)
    return Projection(inner, outer, bias=bias, std=config.init_std, generator=generator)


class Cache:
    """Keys and values of the positions that a model has seen, to go on from; for inference.

    Empty at first; ``lm(id_BS, cache=cache)`` reads it and adds to it. Rooms for further positions are doubled as
    needed, so that a step copies only its own.

    >>> cache = Cache()
    >>> cache.length
    0

    Source: none; the usual key-value cache. Latent attention stores its latent, as in DeepSeek-AI, 2024, "DeepSeek-V2".
    """

    def __init__(self) -> None:
        self.length = 0
        # (B, P) bool, which of the positions are tokens; None where all are.
        self.real_BP: Tensor | None = None
        self._store: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, a_BHSP: Tensor, b_BHSP: Tensor) -> tuple[Tensor, Tensor]:
        """What one layer has stored, with these new positions after the old ones; the old ones are kept.

        Raises:
            UsageError: gradients are on, and would be lost.
            ShapeError: another batch size than before.
        """
        if a_BHSP.requires_grad or b_BHSP.requires_grad:
            fix = "call the model under torch.no_grad(), or without a cache"
            raise UsageError(
                word("cache", got="tensors with gradients", allowed="be used without gradients", where="LM", fix=fix)
            )
        both = tuple(self._add(layer, which, new) for which, new in enumerate((a_BHSP, b_BHSP)))
        self._store[layer] = both  # pyrefly: ignore[unsupported-operation]
        end = self.length + a_BHSP.shape[2]
        return both[0][:, :, :end], both[1][:, :, :end]

    def _add(self, layer: int, which: int, new_BHSP: Tensor) -> Tensor:
        batch, heads, length, width = new_BHSP.shape
        end = self.length + length
        stored = self._store[layer][which] if layer in self._store else None
        if stored is not None and stored.shape[0] != batch:
            fix = "start a new Cache for another batch"
            allowed = f"have the {stored.shape[0]} rows that the cache was filled with"
            raise ShapeError(word("id_BS", got=f"{batch} rows", allowed=allowed, where="LM", fix=fix))
        if stored is None or stored.shape[2] < end:
            room = new_BHSP.new_empty(batch, heads, end if stored is None else max(end, 2 * stored.shape[2]), width)
            if stored is not None:
                room[:, :, : self.length] = stored[:, :, : self.length]
            stored = room
        stored[:, :, self.length : end] = new_BHSP
        return stored

    def advance(self, count: int, real_BP: Tensor | None = None) -> Self:
        """Counts the new positions as seen; the model calls it after its last layer, and says which are tokens."""
        self.length, self.real_BP = self.length + count, real_BP
        return self

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        self.real_BP = None if self.real_BP is None else self.real_BP[row_N]
        self._store = {layer: (a_BHSP[row_N], b_BHSP[row_N]) for layer, (a_BHSP, b_BHSP) in self._store.items()}


def attend(
    q_BHSP: Tensor,
    k_BHTP: Tensor,
    v_BHTP: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    places: Places | None = None,
) -> Tensor:
    """(B, S, H·P) causal attention of the last S of T positions to all of them, or to the last ``window``.

    Where ``places`` says so, padding is left out. With ``softcap`` the scores are capped before the softmax. With
    ``sink_H`` the softmax of head h has one more term, exp(sink_h), that no value belongs to.
    """
    if invariant_here("attention"):
        real_BT = None if places is None else places.real_BT
        return _each(q_BHSP, k_BHTP, v_BHTP, real_BT, scale=scale, window=window, softcap=softcap, sink_H=sink_H)
    return _attend(q_BHSP, k_BHTP, v_BHTP, scale=scale, window=window, softcap=softcap, sink_H=sink_H, places=places)


def _each(q_BHSP: Tensor, k_BHTP: Tensor, v_BHTP: Tensor, real_BT: Tensor | None, **how: Any) -> Tensor:
    """``attend`` row by row, over its tokens alone: within ``batch_invariant`` no kernel sees how long others are."""
    (batch, heads, new, _), total = q_BHSP.shape, k_BHTP.shape[2]
    out_BSO = q_BHSP.new_zeros(batch, new, heads * v_BHTP.shape[3])
    for b in range(batch):
        if real_BT is None:
            row = q_BHSP[b : b + 1], k_BHTP[b : b + 1], v_BHTP[b : b + 1]
            out_BSO[b] = _attend(*row, **how, places=None)[0]
            continue
        place_N = torch.arange(total, device=q_BHSP.device)
        place_N = place_N[real_BT[b]]
        asks_M = place_N[place_N >= total - new] - (total - new)
        if len(asks_M):
            row = q_BHSP[b : b + 1, :, asks_M], k_BHTP[b : b + 1, :, place_N], v_BHTP[b : b + 1, :, place_N]
            out_BSO[b, asks_M] = _attend(*row, **how, places=None)[0]
    return out_BSO


def _attend(
    q_BHSP: Tensor,
    k_BHTP: Tensor,
    v_BHTP: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink_H: Tensor | None,
    places: Places | None,
) -> Tensor:
    """``attend`` of all rows at once."""
    new, aside = q_BHSP.shape[2], places is not None and places.aside
    if window is not None and not aside:  # what no query sees is not even read
        unseen = max(0, k_BHTP.shape[2] - new - window + 1)
        k_BHTP, v_BHTP = k_BHTP[:, :, unseen:], v_BHTP[:, :, unseen:]
    if not aside and tuning().own_rows(q_BHSP.dtype) and suits_looks(q_BHSP, k_BHTP, v_BHTP, sink_H):
        return looks(q_BHSP, k_BHTP, v_BHTP, scale=scale, window=window, softcap=softcap, sink_H=sink_H)
    total = k_BHTP.shape[2]
    windowed = window is not None and total > window
    seen_ST, causal = None, new == total and new > 1 and not windowed and not aside
    if places is not None and aside:
        seen_ST = places.seen(window).unsqueeze(1)
    elif windowed or (new > 1 and not causal):
        distance_ST = torch.arange(total - new, total, device=q_BHSP.device)[:, None]
        distance_ST = distance_ST - torch.arange(total, device=q_BHSP.device)
        seen_ST = distance_ST >= 0 if window is None else (distance_ST >= 0) & (distance_ST < window)
    if sink_H is not None:
        q_BHSP, k_BHTP, v_BHTP = _with_sinks(q_BHSP, k_BHTP, v_BHTP, sink_H / scale, causal)
        seen_ST = None if seen_ST is None else F.pad(seen_ST, (1, 0), value=True)
    if softcap is not None:
        return _softcapped(q_BHSP, k_BHTP, v_BHTP, scale, softcap, seen_ST, causal).transpose(1, 2).flatten(2)
    grouped = q_BHSP.shape[1] != k_BHTP.shape[1]
    y_BHSP = F.scaled_dot_product_attention(
        q_BHSP, k_BHTP, v_BHTP, attn_mask=seen_ST, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    if sink_H is not None:
        y_BHSP = y_BHSP[:, :, int(causal) :, :-1]
    return y_BHSP.transpose(1, 2).flatten(2)


def _with_sinks(q_BHSP: Tensor, k_BHTP: Tensor, v_BHTP: Tensor, score_H: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """A first position of key (0, ..., 0, 1) and value 0, and queries and keys one wider: (q, score_h) and (k, 0).

    So any kernel computes the softmax with its further term, whose gradient goes the way of the queries'. A causal
    kernel wants as many queries as keys: then there is a first query too, of no use to anyone.
    """
    score_BHS1 = score_H.to(q_BHSP.dtype)[:, None, None].expand(*q_BHSP.shape[:3], 1)
    q_BHSP = F.pad(torch.cat((q_BHSP, score_BHS1), dim=-1), (0, 0, int(causal), 0))
    k_BHTP, v_BHTP = F.pad(k_BHTP, (0, 1, 1, 0)), F.pad(v_BHTP, (0, 1, 1, 0))
    k_BHTP[:, :, 0, -1] = 1
    return q_BHSP, k_BHTP, v_BHTP


def _softcapped(
    q_BHSP: Tensor,
    k_BHTP: Tensor,
    v_BHTP: Tensor,
    scale: float,
    softcap: float,
    seen_ST: Tensor | None,
    causal: bool,
) -> Tensor:
    """Attention with its scores in memory, since torch's kernels cap none; rounded as transformers' own."""
    share = q_BHSP.shape[1] // k_BHTP.shape[1]
    k_BHTP, v_BHTP = (part.repeat_interleave(share, 1) if share > 1 else part for part in (k_BHTP, v_BHTP))
    score_BHST = capped(q_BHSP @ k_BHTP.transpose(-1, -2) * scale, softcap)
    if causal:
        seen_ST = torch.ones(score_BHST.shape[-2:], dtype=torch.bool, device=score_BHST.device).tril()
    if seen_ST is not None:
        score_BHST = score_BHST.masked_fill(~seen_ST, -torch.inf)
    return score_BHST.softmax(-1, dtype=torch.float32).to(v_BHTP.dtype) @ v_BHTP


def attended(config: LMConfig, layer: int, seq: int) -> float:
    """Multiply-adds per token of all heads' products with keys and values, as ``attend`` asks its kernel for them."""
    window = config.window_of(layer)
    wide = 2 * config.head_width if config.mla is None else config.head_width + config.mla.v_dim
    if not config.sinks:
        return seq * config.heads * wide
    queries = seq + (seq > 1 and (window is None or seq <= window))
    return queries * (seq + 1) * config.heads * (wide + 2) / seq


class Attention(nn.Module):
    """Grouped-query attention: H query heads share fewer key and value heads. One product makes all three.

    Source: Vaswani et al., 2017, "Attention Is All You Need"; grouped as Ainslie et al., 2023, "GQA"; norms on queries
    and keys as Qwen3 ("head") or OLMoE ("full"); softcap as Gemma Team, 2024, "Gemma 2"; sinks as OpenAI, 2025,
    "gpt-oss-120b & gpt-oss-20b Model Card".
    """

    def __init__(self, config: LMConfig, layer: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.layer, self.heads, self.key_heads = layer, config.heads, config.key_heads
        self.head_width, self.qk_norm, self.window = config.head_width, config.qk_norm, config.window_of(layer)
        q, kv = self.heads * self.head_width, self.key_heads * self.head_width
        self.rotated = config.rotated_width if config.is_turned(layer) else 0
        self.sizes, self.scale, self.softcap = (q, kv, kv), attention_scale(config), config.attention_softcap
        made = functools.partial(projection, config, "attention", generator=generator)
        self.qkv = made(config.width, q + 2 * kv, bias=config.qkv_bias)
        self.out = made(q, config.width, bias=config.out_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            wide = (q, kv) if config.qk_norm == "full" else (self.head_width, self.head_width)
            self.q_norm, self.k_norm = (build_norm(config, width) for width in wide)
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None

    def forward(self, x_BSD: Tensor, angles: Angles, cache: Cache | None, places: Places | None = None) -> Tensor:
        """(B, S, D)."""
        q_BSHP, k_BSHP, v_BSHP = self._heads(self.qkv(x_BSD))
        q_BSHP, k_BSHP = self._turned(q_BSHP, angles), self._turned(k_BSHP, angles)
        q_BHSP, k_BHSP, v_BHSP = q_BSHP.transpose(1, 2), k_BSHP.transpose(1, 2), v_BSHP.transpose(1, 2)
        if cache is not None:
            k_BHSP, v_BHSP = cache.update(self.layer, k_BHSP, v_BHSP)
        of = {"scale": self.scale, "softcap": self.softcap, "window": self.window, "places": places}
        return self.out(attend(q_BHSP, k_BHSP, v_BHSP, sink_H=self.sinks, **of))

    def _turned(self, x_BSHP: Tensor, angles: Angles) -> Tensor:
        if self.rotated == 0:
            return x_BSHP
        if self.rotated == self.head_width:
            return turn(x_BSHP, *angles)
        turned_BSHP, fixed_BSHP = x_BSHP.tensor_split((self.rotated,), dim=-1)
        return torch.cat((turn(turned_BSHP, *angles), fixed_BSHP), dim=-1)

    def _heads(self, qkv_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv_BSD.split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None and self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_width)) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values are made from a narrow latent, which is all that is cached.

    Source: DeepSeek-AI, 2024, "DeepSeek-V2", section 2.1, with the norms of the released code (their eps is 1e-6
    whatever the model's).
    """

    def __init__(self, config: LMConfig, sizes: MLAConfig, layer: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.layer, self.heads, self.mla, self.window = layer, config.heads, sizes, config.window_of(layer)
        self.scale, self.softcap = attention_scale(config), config.attention_softcap
        made = functools.partial(projection, config, "attention", generator=generator)
        wide = config.heads * config.head_width
        self.q_down = self.q_norm = None
        if sizes.q_rank is not None:
            self.q_down = made(config.width, sizes.q_rank, bias=config.qkv_bias)
            self.q_norm = RMSNorm(sizes.q_rank, 1e-6)
        self.q_up = made(sizes.q_rank or config.width, wide, bias=False)
        self.kv_down = made(config.width, sizes.kv_rank + sizes.rope_dim, bias=config.qkv_bias)
        self.kv_norm = RMSNorm(sizes.kv_rank, 1e-6)
        self.kv_up = made(sizes.kv_rank, config.heads * (sizes.nope_dim + sizes.v_dim), bias=False)
        self.out = made(config.heads * sizes.v_dim, config.width, bias=config.out_bias)

    def forward(self, x_BSD: Tensor, angles: Angles, cache: Cache | None, places: Places | None = None) -> Tensor:
        """(B, S, D)."""
        mla, rotate = self.mla, rotate_neighbours if self.mla.interleaved else turn
        q = x_BSD if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x_BSD))
        q_BSHP = self.q_up(q).unflatten(-1, (self.heads, -1))
        fixed_BSHP, turned_BSHP = q_BSHP.split((mla.nope_dim, mla.rope_dim), dim=-1)
        q_BHSP = torch.cat((fixed_BSHP, rotate(turned_BSHP, *angles)), dim=-1).transpose(1, 2)
        latent_BSP, key_BSP = self.kv_down(x_BSD).split((mla.kv_rank, mla.rope_dim), dim=-1)
        latent_B1TP = self.kv_norm(latent_BSP).unsqueeze(1)
        key_B1TP = rotate(key_BSP.unsqueeze(2), *angles).transpose(1, 2)
        if cache is not None:
            latent_B1TP, key_B1TP = cache.update(self.layer, latent_B1TP, key_B1TP)
        kv_BHTP = self.kv_up(latent_B1TP.squeeze(1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BHTP, v_BHTP = kv_BHTP.split((mla.nope_dim, mla.v_dim), dim=-1)
        k_BHTP = torch.cat((k_BHTP, key_B1TP.expand(-1, self.heads, -1, -1)), dim=-1)
        of = {"scale": self.scale, "softcap": self.softcap, "window": self.window, "places": places}
        return self.out(attend(q_BHSP, k_BHTP, v_BHTP, **of))
