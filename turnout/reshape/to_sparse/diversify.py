"""Diversify: one trained expert becomes several, each with other weights of it left out."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.expects import expects
from turnout.layers import MoE
from turnout.models import LM, LMConfig
from turnout.models.lm import build_router
from turnout.paths import Bank
from turnout.reshape.calibrate import blocks, checked, difference, probe
from turnout.reshape.rebuild import bill, rebuild
from turnout.reshape.to_sparse.upcycle import upcycle
from turnout.types import Report

__all__ = ["diversify"]

_WHERE = "turnout.reshape.diversify"


@expects(lm=LM)
def diversify(
    lm: LM,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    masked: float = 0.1,
    layers: Literal["all"] | tuple[int, ...] = "all",
    router: str | None = None,
    router_options: Mapping[str, object] | None = None,
    batches: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> tuple[LM, Report]:
    """A mixture of experts spawned from one: expert e has the weights M_e * W, M_e zero at random weights.

    A dense layer is copied to E experts first; of a model that has experts already, each is masked. Every weight of an
    expert is left out with probability p = ``masked``, each on its own; what stays is not scaled. Afterwards train the
    model; the paper does with a gate that begins with all experts, ``router="DenseToSparse"``.

    Args:
        lm: a dense model, or one with experts; it is left as it is.
        num_experts: E, for a dense model; None for one with experts.
        top_k: K, for a dense model; None for one with experts.
        masked: p, the share of an expert's weights that is left out, in [0, 1).
        layers: which layers of a dense model get experts, counted from 0.
        router: for a dense model, the name of a class in ``turnout.decide.token``; None for the TopK of ``upcycle``,
            which scales the copies so that the model starts where the dense one was. With a name they are not scaled.
        router_options: its further keywords.
        batches: (B, S) token ids on which both models are compared; None for 256 random ids.
        seed: of the masks, of the router's rows and of random ids.

    Returns:
        The model, and the report: the share that was masked, the bill, and the difference measured.

    Raises:
        UsageError: ``masked`` out of range, sizes given for a model with experts or missing for a dense one, or as
            ``upcycle``.

    >>> from turnout.models import LMConfig
    >>> dense = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, hidden=12))
    >>> new, report = diversify(dense, num_experts=4, top_k=2, masked=0.25, router="DenseToSparse")
    >>> new.config.moe.router, 0.2 < report["masked_share"] < 0.3
    ('DenseToSparse', True)

    Source: Nie et al., 2021, "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate",
    the expert-diversify phase. The published code leaves that phase out, so the share masked by default is ours.
    """
    text = checked(batches, lm, _WHERE) or probe(lm, seed)
    _check(lm.config, num_experts, top_k, masked, router)
    start = lm
    if num_experts is not None and top_k is not None:
        start = _copies(lm, num_experts, top_k, layers, router, dict(router_options or {}), seed)
    chosen = [layer for layer, block in enumerate(blocks(start)) if isinstance(block.ff, MoE)]
    new, share = _masked(start, chosen, masked, seed)
    values = {"layers": chosen, "masked": masked, "masked_share": share, **bill(lm, new), **difference(lm, new, text)}
    return new, Report("diversify", values, () if chosen else ("no layer has experts: nothing was masked",))


def _masked(lm: LM, layers: list[int], masked: float, seed: int) -> tuple[LM, float]:
    """The model with weights of its experts left out at random, and which share of them it was."""
    generator, changed = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    zeros = total = 0
    for layer in layers:
        ff = blocks(lm)[layer].ff
        assert isinstance(ff, MoE) and isinstance(ff.bank, Bank)
        for part, weight in (("up", ff.bank.up_EDH), ("down", ff.bank.down_EFD)):
            keep = torch.rand(weight.shape, generator=generator) >= masked
            zeros, total = zeros + int((~keep).sum()), total + keep.numel()
            changed[f"blocks.{layer}.ff.bank.{part}"] = weight.detach() * keep.to(weight.device)
    return rebuild(lm, lm.config, changed), zeros / max(total, 1)


def _copies(
    lm: LM,
    num_experts: int,
    top_k: int,
    layers: Literal["all"] | tuple[int, ...],
    router: str | None,
    options: dict[str, object],
    seed: int,
) -> LM:
    """The upcycled model; with a router of another kind, unscaled copies and fresh router rows."""
    if router is None:
        return upcycle(lm, num_experts=num_experts, top_k=top_k, layers=layers, seed=seed)[0]
    # With all experts on upcycling scales nothing: how much the chosen ones weigh is up to the new router.
    new, _ = upcycle(lm, num_experts=num_experts, top_k=num_experts, layers=layers, seed=seed)
    if new.config.moe is None:
        return new
    moe = dataclasses.replace(new.config.moe, top_k=top_k, router=router, router_options=options)
    config = dataclasses.replace(new.config, moe=moe)
    generator, changed = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for layer in filter(config.is_routed, range(config.layers)):
        fresh = build_router(config.width, moe, generator, config.init_std).to(lm.embedding.dtype)
        changed |= {f"blocks.{layer}.ff.router.{part}": tensor for part, tensor in fresh.state_dict().items()}
    return rebuild(new, config, changed)


def _check(config: LMConfig, num_experts: int | None, top_k: int | None, masked: float, router: str | None) -> None:
    if not 0 <= masked < 1:
        raise UsageError(word("masked", got=masked, allowed="be in [0, 1)", where=_WHERE, fix="pass masked=0.1"))
    if config.moe is not None and config.moe.factored is not None:
        got, fix = "one with factored experts", "densify it first"
        raise UsageError(word("the model", got=got, allowed="have whole matrices", where=_WHERE, fix=fix))
    given = f"num_experts={num_experts}, top_k={top_k}, router={router!r}"
    if config.moe is None and (num_experts is None or top_k is None):
        allowed, fix = "give num_experts and top_k of a dense model", "pass num_experts=8, top_k=2"
        raise UsageError(word("the sizes", got=given, allowed=allowed, where=_WHERE, fix=fix))
    if config.moe is not None and (num_experts, top_k, router) != (None, None, None):
        allowed, fix = "be left out for a model that has experts", "leave them out, or pass the dense model"
        raise UsageError(word("the sizes", got=given, allowed=allowed, where=_WHERE, fix=fix))
