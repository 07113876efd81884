"""Sparse upcycling: a dense model becomes a mixture of experts that computes the same at the start."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.expects import expects
from turnout.models import LM, LMConfig, MoEConfig
from turnout.paths import FeedForward
from turnout.reshape.calibrate import blocks, checked, difference, probe, reach
from turnout.reshape.rebuild import bill, rebuild
from turnout.types import Report
from turnout.types.weights import GATED

__all__ = ["upcycle"]

_WHERE = "turnout.reshape.upcycle"
# The largest logit that a router of one expert a token starts with: its weight is then 1/E to this relative error.
_EVEN = 1e-6


@expects(lm=LM)
def upcycle(
    lm: LM,
    *,
    num_experts: int,
    top_k: int,
    granularity: int = 1,
    layers: Literal["all"] | tuple[int, ...] = "all",
    router_std: float | None = None,
    batches: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> tuple[LM, Report]:
    """A mixture of experts made of copies of the dense feed-forward layers; at the start it computes what they do.

    The F neurons are cut into G shards; expert e holds shard e mod G. The G experts of one copy start with the same
    router row (a virtual group): they tie, and are chosen together. The K weights sum to 1, those w_c of each copy to
    G w_c, so y = sum_c w_c * sum_g G * shard_g(x) = dense(x). With K = 1 the weight is the probability (renormalised it
    would always be 1, and the router never learn): the router starts so small that it is 1/E, and E scales instead.

    Args:
        lm: a dense model; it is left as it is.
        num_experts: E, a multiple of G.
        top_k: K, experts per token, a multiple of G, at most E.
        granularity: G, shards per layer, a divisor of the hidden width; 1 copies whole layers.
        layers: which layers become sparse, counted from 0.
        router_std: standard deviation of the starting router rows; None for ``init_std``, and for K = 1.
        batches: (B, S) token ids on which both models are compared; None for 256 random ids.
        seed: of the router rows and of random ids.

    Returns:
        The sparse model, and the report: parameters before and after, and the difference measured.

    Raises:
        UsageError: the model has experts, or (E, K, G) do not fit; names the nearest that do.

    >>> from turnout.models import LMConfig
    >>> dense = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, hidden=12))
    >>> sparse, report = upcycle(dense, num_experts=8, top_k=4, granularity=2)
    >>> sparse.config.moe.hidden, report["relative_difference"] < 1e-5
    (6, True)

    Source: Komatsuzaki et al., 2023, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints"; shards and
    virtual groups as He et al., 2024, "Upcycling Large Language Models into Mixture of Experts". They spread the
    scale over both matrices by its cube root, which is exact for their squared ReLU and not for SwiGLU; the second
    alone, as here, is exact for every activation, and they found it worse. They also found weights from a softmax over
    all experts better than the renormalised ones that we need for the exact start.
    """
    text = checked(batches, lm, _WHERE) or probe(lm, seed)
    config = planned(lm.config, num_experts=num_experts, top_k=top_k, granularity=granularity, layers=layers)
    _check_std(router_std, top_k)
    chosen = tuple(layer for layer in range(lm.config.layers) if config.is_routed(layer))
    if not chosen:
        new = rebuild(lm, lm.config, {})
        return new, Report("upcycle", {"layers": [], **bill(lm, new), **difference(lm, new, text)})
    std = lm.config.init_std if router_std is None else router_std
    new = _sparse(lm, config, granularity, std, seed)
    return new, _report(lm, new, chosen, granularity, text)


def planned(
    config: LMConfig,
    *,
    num_experts: int,
    top_k: int,
    granularity: int = 1,
    layers: Literal["all"] | tuple[int, ...] = "all",
) -> LMConfig:
    """The configuration that ``upcycle`` makes of this one; the same where no layer is chosen.

    Raises:
        UsageError: as ``upcycle``.
    """
    _check_model(config)
    _check_sizes(num_experts, top_k, granularity, config.dense_hidden)
    chosen = tuple(range(config.layers)) if layers == "all" else tuple(layers)
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden=config.dense_hidden // granularity,
        router_options={"renormalize": top_k > 1},
        layers="all" if len(chosen) == config.layers else chosen,
        activation=config.activation,
        bias=config.ff_bias,
    )
    return dataclasses.replace(config, moe=moe) if chosen else config  # refuses layers that do not exist


def _sparse(lm: LM, config: LMConfig, shards: int, std: float, seed: int) -> LM:
    moe = config.moe
    assert moe is not None
    num_experts, top_k = moe.num_experts, moe.top_k
    generator, changed = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for layer in filter(config.is_routed, range(config.layers)):
        ff, name = blocks(lm)[layer].ff, f"blocks.{layer}.ff"
        assert isinstance(ff, FeedForward)
        up_EDH, down_EFD = _experts(ff, num_experts, shards, _down_scale(moe, shards))
        spread = _even_std(lm, layer) if top_k == 1 else std
        rows_CD = torch.empty(num_experts // shards, lm.config.width).normal_(0, spread, generator=generator)
        changed |= {f"{name}.bank.up": up_EDH, f"{name}.bank.down": down_EFD}
        changed |= {f"{name}.bank.{part}": bias for part, bias in _biases(ff, moe, shards).items()}
        changed[f"{name}.router.weight"] = rows_CD.repeat_interleave(shards, 0).to(lm.embedding.dtype)
    return rebuild(lm, config, changed)


def _down_scale(moe: MoEConfig, shards: int) -> int:
    return shards if moe.top_k > 1 else moe.num_experts


def _experts(ff: FeedForward, num_experts: int, shards: int, scale: int) -> tuple[Tensor, Tensor]:
    """Up (E, D, H) and down (E, F/G, D): the shards of the dense layer, over and over."""
    parts = 2 if ff.activation in GATED else 1
    up_PGfD = ff.up.detach().unflatten(0, (parts, shards, -1))
    up_GHD = up_PGfD.transpose(0, 1).flatten(1, 2)
    down_GfD = ff.down.detach().t().unflatten(0, (shards, -1)) * scale
    copies = num_experts // shards
    return up_GHD.transpose(1, 2).repeat(copies, 1, 1), down_GfD.repeat(copies, 1, 1)


def _biases(ff: FeedForward, moe: MoEConfig, shards: int) -> dict[str, Tensor]:
    """Those of the dense layer for each of its shards: the chosen weigh 1 together, and one alone 1/E."""
    if ff.up_bias is None or ff.down_bias is None:
        return {}
    up_PGf = ff.up_bias.detach().unflatten(0, (2 if ff.activation in GATED else 1, shards, -1))
    up_GH, down_D = up_PGf.transpose(0, 1).flatten(1), ff.down_bias.detach()
    down_D = down_D if moe.top_k > 1 else down_D * moe.num_experts
    return {"up_bias": up_GH.repeat(moe.num_experts // shards, 1), "down_bias": down_D.repeat(moe.num_experts, 1)}


def _even_std(lm: LM, layer: int) -> float:
    """Router rows whose logits stay near 1e-6 on what the layer's feed-forward takes."""
    return _EVEN / (math.sqrt(lm.config.width) * max(reach(lm, layer), 1e-12))


def _report(before: LM, after: LM, chosen: tuple[int, ...], shards: int, text: tuple[Tensor, ...]) -> Report:
    moe = after.config.moe
    assert moe is not None
    scale = _down_scale(moe, shards)
    values = {
        "layers": list(chosen),
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "granularity": shards,
        "copies_of_each_neuron": moe.num_experts // shards,
        "expert_hidden": moe.hidden,
        "down_scale": scale,
        **bill(before, after),
        **difference(before, after, text),
    }
    notes = [f"each expert holds 1/{shards} of a layer's neurons; only the down products are scaled, by {scale}"]
    if moe.top_k == 1:
        notes.append("weights are probabilities, 1/E at the start: as the router grows sure, outputs grow with it")
    return Report("upcycle", values, tuple(notes))


def _check_std(std: float | None, top_k: int) -> None:
    if std is not None and (top_k == 1 or not std > 0):
        fix = "leave router_std out" if top_k == 1 else "pass router_std=0.02"
        allowed = "be positive, and None with top_k=1"
        raise UsageError(word("router_std", got=std, allowed=allowed, where=_WHERE, fix=fix))


def _check_model(config: LMConfig) -> None:
    if config.moe is not None:
        fix = "upcycle the dense model that it came from"
        raise UsageError(word("the model", got="one with experts", allowed="be dense", where=_WHERE, fix=fix))


def _fits(num_experts: int, top_k: int, shards: int, hidden: int) -> bool:
    if min(num_experts, top_k, shards) < 1 or top_k > num_experts:
        return False
    return not (num_experts % shards or top_k % shards or hidden % shards)


def _check_sizes(num_experts: int, top_k: int, shards: int, hidden: int) -> None:
    if _fits(num_experts, top_k, shards, hidden):
        return

    def far(found: tuple[int, int, int]) -> float:
        pairs = zip(found, (num_experts, top_k, shards), strict=True)
        return sum(abs(math.log(new / max(old, 0.5))) for new, old in pairs)

    span = range(1, 2 * max(num_experts, top_k, shards, 1) + 1)
    cuts = [g for g in span if hidden % g == 0 and g <= 2 * max(shards, 1)]
    near = sorted(
        ((e, k, g) for g in cuts for e in span if e % g == 0 for k in range(g, e + 1, g)),
        key=far,
    )[:3]
    raise UsageError(
        word(
            "num_experts, top_k and granularity",
            got=f"{num_experts}, {top_k} and {shards}",
            allowed=f"be multiples of granularity, top_k at most num_experts, granularity a divisor of hidden={hidden}",
            where=_WHERE,
            fix="pass one of " + ", ".join(f"({e}, {k}, {g})" for e, k, g in near),
        )
    )
