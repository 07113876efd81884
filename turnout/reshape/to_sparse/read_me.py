"""Read-ME: the neurons that each kind of text uses become an expert, and one router decides before any layer runs."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from turnout.errors import UsageError, nearest, word
from turnout.expects import expects
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.lm import build_pre_gate
from turnout.paths import FeedForward
from turnout.reshape.calibrate import blocks, checked, difference
from turnout.reshape.rebuild import bill, rebuild
from turnout.reshape.to_sparse.neuron_masks import (
    Masks,
    Rounds,
    importance,
    masked,
    router_loss,
    top_masks,
    train_rounds,
)
from turnout.types import Report
from turnout.types.weights import GATED

__all__ = ["read_me"]

_WHERE = "turnout.reshape.read_me"
# A router of each layer whose one weight is exactly 1, as that of the gate.
_LAYERS = {"scores": "softmax", "renormalize": True, "rate": 0.0}
_SHOWN = 8  # so many batches tell how often router and labels agree


@expects(lm=LM)
def read_me(
    lm: LM,
    domains: Mapping[str, Iterable[Tensor]],
    *,
    keep: float = 0.5,
    by: Literal["activation", "random"] = "activation",
    router: Literal["pre_gate", "layers"] = "pre_gate",
    gate: Mapping[str, int] | None = None,
    rounds: int = 1,
    router_steps: int = 100,
    backbone_steps: int = 0,
    lr: float = 1e-3,
    seed: int = 0,
) -> tuple[LM, Report]:
    """A smaller mixture of experts from a dense model: an expert for each domain of text, one router for all layers.

    A domain's mask holds the share ``keep`` of a layer's neurons with the largest mean |activation| over its text. What
    all masks share is always on; an expert is the rest of its mask, with weight 1: its tokens get the dense layer
    without the neurons outside the mask. Experts may hold copies of one neuron. The router learns 0.75 CE to the expert
    with most of a token's top activations (labels smoothed by 0.5) + 0.25 CE to softmax(10 overlap), mean over layers.

    Args:
        lm: a dense model without feed-forward biases; it is left as it is.
        domains: name -> batches (B, S) of token ids, an expert each; steps go through all of them.
        keep: above 0, at most 1. With 1, or a single domain, the new model is dense.
        by: "activation"; or "random", where all masks of a layer move to random neurons, sizes and overlaps the same.
        router: "pre_gate" is ``turnout.models.PreGate``; "layers" gives each layer a linear one of its own.
        gate: sizes of the pre-gate: width, layers, heads.
        rounds: how often router and model take turns to learn.
        router_steps: optimizer steps of the router in a round.
        backbone_steps: steps of the rest in a round, on the next token; neurons of several experts are still one.
        lr: the highest learning rate; in each round 0.8 of that before.
        seed: of "random", of the router's starting weights and of the order of batches.

    Returns:
        The model; and the neurons of each expert, how often router and labels agree, the bill, the difference.

    Raises:
        UsageError: a model that is not dense, no domain, or a number out of range.
        DataError: a domain without batches of ids.

    >>> from turnout.models import LMConfig
    >>> dense = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, hidden=12))
    >>> text = {"low": [torch.randint(8, (2, 16))], "high": [torch.randint(8, 16, (2, 16))]}
    >>> sparse, report = read_me(dense, text, router_steps=2)
    >>> report["mask_size"], len(sparse.route(text["low"][0]))
    (6, 2)

    Source: Cai et al., 2024, "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System
    Co-Design"; 5 rounds of 100 and 200 steps there, labels from signed activations, here from absolute ones, as masks.
    """
    text = {name: checked(list(batches), lm, f"{_WHERE}, domain {name!r}") for name, batches in domains.items()}
    how = Rounds(rounds, router_steps, backbone_steps, lr, seed)
    _check(lm.config, text, keep, by, router, how)
    return _convert(lm, text, max(1, int(keep * lm.config.dense_hidden)), by, router, dict(gate or {}), how)


def _convert(
    lm: LM, text: Mapping[str, tuple[Tensor, ...]], size: int, by: str, router: str, gate: dict[str, Any], how: Rounds
) -> tuple[LM, Report]:
    everything = tuple(itertools.chain(*text.values()))
    masks_L, common = top_masks(importance(lm, text), size)
    if by == "random":
        masks_L = _moved(masks_L, how.seed)
    config = _planned(lm.config, len(text), size, int(masks_L[0].shared_F.sum()), router, gate)
    agree: dict[str, Any] = {}
    if config.moe is None:
        new = rebuild(lm, config, _narrow(lm, masks_L))
        notes = ("a single mask: the model stays dense",)
    else:
        student = masked(lm, masks_L, *_routers(lm, config, how.seed))
        train_rounds(student, everything, how)
        agree = _agreement(student, text)
        new = _sparse(lm, student, config, masks_L)
        notes = ("experts hold copies: a neuron of several masks is trained in each of them from now on",)
    values: dict[str, Any] = {
        "domains": list(text),
        "by": by,
        "router": router,
        "mask_size": size,
        "shared_by_all": common,
        **_neurons(masks_L, list(text)),
        **agree,
        **bill(lm, new),
        **difference(lm, new, everything),
    }
    return new, Report("read_me", values, notes)


def _routers(lm: LM, config: LMConfig, seed: int) -> tuple[Any, list[Tensor] | None]:
    """The gate, its embedding a slice of the model's where that is wide enough; or the weights of a router a layer."""
    moe, generator = cast(MoEConfig, config.moe), torch.Generator().manual_seed(seed)
    device = lm.embedding.device
    gate = build_pre_gate(config, generator)
    if gate is not None:
        width = gate.embedding.shape[1]
        if width <= config.width:
            gate.embedding.data.copy_(lm.embedding.detach()[:, :width])
        return gate.to(device), None
    shape = (moe.num_experts, config.width)
    rows = [torch.empty(shape).normal_(0, config.init_std, generator=generator) for _ in range(config.layers)]
    return None, [weight_ED.to(device) for weight_ED in rows]


def _moved(masks_L: list[Masks], seed: int) -> list[Masks]:
    """The same masks over neurons in another order, in each layer another."""
    found = []
    for layer, masks in enumerate(masks_L):
        order_F = torch.randperm(masks.shared_F.numel(), generator=torch.Generator().manual_seed(seed + layer))
        found.append(Masks(masks.shared_F[order_F], masks.expert_EF[:, order_F]))
    return found


def _planned(config: LMConfig, experts: int, size: int, shared: int, router: str, gate: dict[str, Any]) -> LMConfig:
    if shared == size:
        return dataclasses.replace(config, hidden=size)
    moe = MoEConfig(
        num_experts=experts,
        top_k=1,
        hidden=size - shared,
        router="PreGate" if router == "pre_gate" else "LossFree",
        router_options=gate if router == "pre_gate" else _LAYERS,
        shared_hidden=shared or None,
        activation=config.activation,
    )
    return dataclasses.replace(config, moe=moe)


def _part(ff: FeedForward, mask_F: Tensor) -> tuple[Tensor, Tensor]:
    """Up (H, D) and down (D, F') of the neurons in a mask, in their old order."""
    parts = 2 if ff.activation in GATED else 1
    index_f = mask_F.nonzero()[:, 0].to(ff.up.device)
    return ff.up.detach().unflatten(0, (parts, -1))[:, index_f].flatten(0, 1), ff.down.detach()[:, index_f]


def _narrow(lm: LM, masks_L: list[Masks]) -> dict[str, Tensor]:
    changed = dict[str, Tensor]()
    for layer, masks in enumerate(masks_L):
        up_HD, down_Df = _part(cast(FeedForward, blocks(lm)[layer].ff), masks.shared_F)
        changed |= {f"blocks.{layer}.ff.up": up_HD, f"blocks.{layer}.ff.down": down_Df}
    return changed


def _sparse(lm: LM, student: LM, config: LMConfig, masks_L: list[Masks]) -> LM:
    """The masked model with each mask's neurons copied out, and its routers."""
    changed, dtype = dict[str, Tensor](), lm.embedding.dtype
    for layer, masks in enumerate(masks_L):
        stand_in, name = cast(Any, student.blocks[layer]).ff, f"blocks.{layer}.ff"
        parts = [_part(stand_in.ff, mask_F) for mask_F in masks.expert_EF]
        changed[f"{name}.bank.up"] = torch.stack([up_HD.t() for up_HD, _ in parts])
        changed[f"{name}.bank.down"] = torch.stack([down_Df.t() for _, down_Df in parts])
        if bool(masks.shared_F.any()):
            changed[f"{name}.shared.up"], changed[f"{name}.shared.down"] = _part(stand_in.ff, masks.shared_F)
        if stand_in.gate is not None:
            changed[f"{name}.router.weight"] = stand_in.gate.detach().to(dtype)
            changed[f"{name}.router.bias_E"] = torch.zeros(len(stand_in.gate))
        cast(Any, student.blocks[layer]).ff = stand_in.ff
    if student.pre_gate is not None:
        changed |= {f"pre_gate.{part}": tensor.to(dtype) for part, tensor in student.pre_gate.state_dict().items()}
        student.pre_gate = None
    return rebuild(student, config, changed)


def _neurons(masks_L: list[Masks], names: list[str]) -> dict[str, Any]:
    """Which neurons are where, how many copies that makes, and how many are nowhere."""
    used_LF = [masks.shared_F | masks.expert_EF.any(0) for masks in masks_L]
    held = [int(masks.shared_F.sum() + masks.expert_EF.sum()) for masks in masks_L]
    return {
        "shared_neurons": {str(n): masks.shared_F.nonzero()[:, 0].tolist() for n, masks in enumerate(masks_L)},
        "expert_neurons": {
            str(n): {name: mask_F.nonzero()[:, 0].tolist() for name, mask_F in zip(names, masks.expert_EF, strict=True)}
            for n, masks in enumerate(masks_L)
        },
        "copies": [count - int(used_F.sum()) for count, used_F in zip(held, used_LF, strict=True)],
        "left_out": [int((~used_F).sum()) for used_F in used_LF],
    }


def _agreement(student: LM, text: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Any]:
    """How often the router chooses a layer's label, by layer; and where the tokens of each domain go."""
    agree, goes = [], {}
    with torch.no_grad():
        for name, batches in text.items():
            agree += [router_loss(student, id_BS)[1] for id_BS in batches[:_SHOWN]]
            routings = [routing for id_BS in batches[:_SHOWN] for routing in student(id_BS).routings]
            load_E = torch.stack([routing.load_E for routing in routings]).sum(0).double()
            goes[name] = (load_E / load_E.sum()).tolist()
    return {"agreement": torch.stack(agree).mean(0).tolist(), "experts_of_domain": goes}


def _check(config: LMConfig, text: Mapping[str, object], keep: float, by: str, router: str, how: Rounds) -> None:
    if config.moe is not None or config.ff_bias:
        got = "one with experts" if config.moe is not None else "one with ff_bias=True"
        allowed, fix = "be dense, without feed-forward biases", "pass the dense model that it came from"
        raise UsageError(word("the model", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if not text:
        fix = 'pass {"code": [id_BS, ...], "prose": [id_BS, ...]}'
        raise UsageError(word("domains", got="none", allowed="name at least one", where=_WHERE, fix=fix))
    if not 0 < keep <= 1:
        raise UsageError(word("keep", got=keep, allowed="be above 0 and at most 1", where=_WHERE, fix="pass keep=0.5"))
    if by not in ("activation", "random"):
        raise nearest(by, ("activation", "random"), kind="way to choose neurons", where=_WHERE)
    if router not in ("pre_gate", "layers"):
        raise nearest(router, ("pre_gate", "layers"), kind="router", where=_WHERE)
    for name in ("rounds", "router_steps", "backbone_steps"):
        if (count := getattr(how, name)) < 0:
            raise UsageError(word(name, got=count, allowed="not be negative", where=_WHERE, fix=f"pass {name}=0"))
    if not how.lr > 0:
        raise UsageError(word("lr", got=how.lr, allowed="be positive", where=_WHERE, fix="pass lr=0.001"))
