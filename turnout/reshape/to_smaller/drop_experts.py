"""Expert pruning in one shot: the experts that matter least on given text go, their router rows with them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from turnout.errors import UsageError, nearest, word
from turnout.expects import expects
from turnout.layers import MoE
from turnout.models import LM, LMConfig, MoEConfig
from turnout.paths import Bank
from turnout.reshape.calibrate import blocks, checked, difference, probe, refuse_no_text, watch
from turnout.reshape.rebuild import bill, rebuild
from turnout.reshape.resumable import by_batch
from turnout.types import Report, Routing

__all__ = ["drop_experts", "entry_outputs"]

_WHERE = "turnout.reshape.drop_experts"
_BY = ("reap", "frequency", "random", "gate")


@expects(lm=LM)
def drop_experts(
    lm: LM,
    *,
    keep: int | None = None,
    share: float | None = None,
    by: Literal["reap", "frequency", "random", "gate"] = "reap",
    batches: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> tuple[LM, Report]:
    """The model without the experts that score lowest on the text, equally many in every routed layer.

    REAP's score of expert j is the mean over the tokens X_j routed to it of g_j(t) * |f_j(t)|: the weight of its output
    in the model, renormalised only where the model does that, times the output's length. Experts that no token chose
    score 0; without them the text's outputs stay the same, but for how BLAS rounds products of fewer rows.

    Args:
        lm: a model with experts; it is left as it is.
        keep: experts left in each layer, at least K; a multiple of a router's groups.
        share: instead of ``keep``, the share that goes, in [0, 1); rounded down to whole experts in every group.
        by: "reap", "frequency" (tokens routed there), "random", or, an ablation, "gate": REAP without the length.
        batches: (B, S) token ids to score on; not needed for "random".
        seed: of "random", and of ids to compare on without text.

    Returns:
        The smaller model; and kept ids and scores per layer, the share of the text that went to dropped experts,
        parameters, and the difference on the text.

    Raises:
        UsageError: fewer experts than K, uneven groups, no text, or a router that has no rows.

    >>> from turnout.models import LMConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, moe=MoEConfig(4, 2, hidden=8)))
    >>> smaller, report = drop_experts(lm, keep=3, batches=[torch.arange(16)[None]])
    >>> smaller.config.moe.num_experts, len(report["kept"]["0"])
    (3, 3)

    Source: Lasby et al., 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression". A
    correction bias takes part in the choice alone, not in the weights; groups of experts are pruned equally.
    """
    moe, text = _routed(lm.config), checked(batches, lm, _WHERE)
    left = _left(moe, keep, share)
    if by not in _BY:
        raise nearest(by, _BY, kind="score", where=_WHERE)
    if left < moe.num_experts and by != "random":
        refuse_no_text(text, f"{by!r} scores experts on it", _WHERE)
    scores, loads = _scores(lm, text, by, seed)
    kept = {layer: _best(score_E, left, _groups(moe)) for layer, score_E in scores.items()}
    new = _without(lm, dataclasses.replace(moe, num_experts=left), kept)
    lost = sum(int(load_E.sum() - load_E[kept[layer]].sum()) for layer, load_E in loads.items())
    values = {
        "by": by,
        "num_experts": [moe.num_experts, left],
        "kept": {str(layer): index_K.tolist() for layer, index_K in kept.items()},
        "scores": {str(layer): score_E.tolist() for layer, score_E in scores.items()},
        "routed_share_dropped": lost / max(1, sum(int(load_E.sum()) for load_E in loads.values())),
        **bill(lm, new),
        **difference(lm, new, text or probe(lm, seed)),
    }
    return new, Report("drop_experts", values, (*_notes(moe, left), *_rounded(moe, left, share)))


def planned(config: LMConfig, *, keep: int | None = None, share: float | None = None) -> LMConfig:
    """The configuration that ``drop_experts`` makes of this one.

    Raises:
        UsageError: as ``drop_experts``.
    """
    moe = _routed(config)
    return dataclasses.replace(config, moe=dataclasses.replace(moe, num_experts=_left(moe, keep, share)))


def entry_outputs(bank: Bank, x_TD: Tensor, routing: Routing) -> Tensor:
    """(R, D), for each entry of the routing what its expert makes of its token, unweighted."""
    alone = Routing(
        token_R=torch.arange(routing.num_entries, device=x_TD.device),
        weight_R=torch.ones_like(routing.weight_R),
        offset_E=routing.offset_E,
        num_tokens=routing.num_entries,
    )
    return bank(x_TD[routing.token_R], alone)


def _without(lm: LM, moe: MoEConfig, kept: Mapping[int, Tensor]) -> LM:
    """The model with the kept experts' tensors only: those of the bank, and whatever the router holds for each."""
    changed = dict[str, Tensor]()
    for layer, kept_K in kept.items():
        ff, name = blocks(lm)[layer].ff, f"blocks.{layer}.ff"
        assert isinstance(ff, MoE) and isinstance(ff.bank, Bank) and ff.router is not None
        index_K = kept_K.to(ff.bank.up.device)
        parts = {"up": ff.bank.up_EDH, "down": ff.bank.down_EFD}
        parts |= {"up_bias": ff.bank.up_bias, "down_bias": ff.bank.down_bias}
        changed |= {f"{name}.bank.{part}": stack[index_K] for part, stack in parts.items() if stack is not None}
        for part, tensor in ff.router.state_dict().items():  # what has no row for each expert stays whole
            changed[f"{name}.router.{part}"] = tensor[index_K] if tensor.ndim else tensor
    return rebuild(lm, dataclasses.replace(lm.config, moe=moe), changed)


def _scores(lm: LM, text: tuple[Tensor, ...], by: str, seed: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By layer: the score of each expert, and how many tokens it got."""
    layers = [layer for layer, block in enumerate(blocks(lm)) if isinstance(block.ff, MoE)]
    count = _routed(lm.config).num_experts
    sums = {layer: torch.zeros(count, dtype=torch.float64) for layer in layers}
    loads = {layer: torch.zeros(count, dtype=torch.int64) for layer in layers}
    totals = {f"sum-{layer}": sums[layer] for layer in layers} | {f"load-{layer}": loads[layer] for layer in layers}

    def look(layer: int, x_TD: Tensor, routing: Routing | None) -> None:
        ff = blocks(lm)[layer].ff
        if routing is None or not isinstance(ff, MoE):
            return
        loads[layer] += routing.load_E.cpu()
        if by in ("reap", "gate") and isinstance(ff.bank, Bank):
            value_R = routing.weight_R.double()  # as the model applies it
            if by == "reap":
                value_R = value_R * entry_outputs(ff.bank, x_TD, routing).double().norm(dim=1)
            sums[layer].index_add_(0, routing.expert_R.cpu(), value_R.cpu())

    by_batch("scoring experts", text, totals, lambda id_BS: watch(lm, [id_BS], look))
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        return {layer: torch.rand(count, dtype=torch.float64, generator=generator) for layer in layers}, loads
    if by == "frequency":
        return {layer: load_E.double() for layer, load_E in loads.items()}, loads
    return {layer: sums[layer] / loads[layer].clamp_min(1) for layer in layers}, loads


def _best(score_E: Tensor, left: int, groups: int) -> Tensor:
    """The ids with the highest scores, equally many of each group, ascending; of equal ones the lower id stays."""
    score_GM = score_E.unflatten(0, (groups, -1))
    order_GM = score_GM.sort(dim=1, descending=True, stable=True)[1][:, : left // groups]
    return (order_GM + torch.arange(groups)[:, None] * score_GM.shape[1]).flatten().sort()[0]


# What they hold is of other things than single experts, or says which experts stand beside each other.
_NO_ROWS = (
    *("ByKind", "CIGT", "Hash", "HyperRouter", "MoEPlusPlus", "PreGate", "Prototyping", "RMoE", "Rectify", "Skills"),
    *("StableMoE", "XMoE"),
)


def _routed(config: LMConfig) -> MoEConfig:
    if config.moe is None:
        fix = "upcycle or split it first"
        raise UsageError(word("the model", got="a dense one", allowed="have experts", where=_WHERE, fix=fix))
    if config.moe.distinct is not None:
        got, fix = "one with merged experts", "drop experts first, then merge"
        raise UsageError(word("the model", got=got, allowed="have none merged yet", where=_WHERE, fix=fix))
    if config.moe.per_layer is not None:
        got, fix = f"one with per_layer={config.moe.per_layer}", "train it with fewer (per_layer=...)"
        raise UsageError(word("the model", got=got, allowed="have as many in each layer", where=_WHERE, fix=fix))
    if config.moe.factored is not None:
        got, fix = "one with factored experts", "drop experts first, then factor them, or densify it"
        raise UsageError(word("the model", got=got, allowed="have whole matrices", where=_WHERE, fix=fix))
    if config.moe.router in _NO_ROWS:
        allowed, fix = "choose experts by each layer's own rows, to be left out", "train with another router"
        raise UsageError(word("the router", got=config.moe.router, allowed=allowed, where=_WHERE, fix=fix))
    return config.moe


def _groups(moe: MoEConfig) -> int:
    groups = moe.router_options.get("num_groups", 1)
    return groups if isinstance(groups, int) else 1


def _least(moe: MoEConfig) -> int:
    """The fewest experts that the router still works with."""
    groups, open_groups = _groups(moe), moe.router_options.get("top_groups", 1)
    least = max(moe.top_k, 2 if moe.router == "GShard" else 1)
    if groups == 1 or not isinstance(open_groups, int):
        return least
    return -(-least // open_groups) * groups


def needed(moe: MoEConfig) -> tuple[int, int]:
    """How many groups the experts are in, of which equally many go, and the fewest that the router works with."""
    return _groups(moe), _least(moe)


def _left(moe: MoEConfig, keep: int | None, share: float | None) -> int:
    """How many experts stay in each layer."""
    groups, least = _groups(moe), _least(moe)
    if (keep is None) == (share is None) or (share is not None and not 0 <= share < 1):
        got = f"keep={keep}, share={share}"
        allowed, fix = "be one of the two, share in [0, 1)", "pass keep=... or share=0.25"
        raise UsageError(word("keep and share", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if keep is None:
        dropped = math.floor((share or 0.0) * moe.num_experts + 1e-9)
        keep = moe.num_experts - dropped // groups * groups
        if share and keep == moe.num_experts:
            raise _too_small(moe, share)
    if least <= keep <= moe.num_experts and keep % groups == 0:
        return keep
    near = min(max(-(-keep // groups) * groups, least), moe.num_experts)
    if keep < near == moe.num_experts and near - groups >= least:
        near -= groups  # all of them would be none dropped
    allowed = f"leave from {least} experts (top_k={moe.top_k}) to num_experts={moe.num_experts}"
    if groups > 1:
        allowed += f", a multiple of num_groups={groups}"
    fix = f"pass keep={near}" + ("" if near > least else ", or lower top_k first")
    raise UsageError(word("keep", got=keep, allowed=allowed, where=_WHERE, fix=fix))


def _too_small(moe: MoEConfig, share: float) -> UsageError:
    """A share that is less than one expert of each group, with the smallest that can go."""
    groups, least = _groups(moe), _least(moe)
    got = f"{share:g}, {share * moe.num_experts:g} of {moe.num_experts} experts"
    allowed = f"be at least one expert of each of the {groups} groups" if groups > 1 else "be at least one expert"
    fix = f"pass share={groups / moe.num_experts:g} or more (--drop-experts {100 * groups / moe.num_experts:g}%)"
    if moe.num_experts - groups < least:
        fix = f"none can go: a token needs {least} of them (top_k={moe.top_k}); merge experts instead"
    elif groups > 1 and moe.num_experts // groups <= 2 and moe.router_options.get("group_score", "top2") == "top2":
        fix = "none can go: the router scores a group by its two best experts; merge experts instead"
    return UsageError(word("share", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _rounded(moe: MoEConfig, left: int, share: float | None) -> tuple[str, ...]:
    """Says where fewer went than were asked for."""
    asked, gone = (share or 0.0) * moe.num_experts, moe.num_experts - left
    by = f" in each of {_groups(moe)} groups" if _groups(moe) > 1 else ""
    return (
        (f"{asked:g} of {moe.num_experts} experts were asked for; {gone} went, whole ones{by}",)
        if asked > gone + 1e-9
        else ()
    )


def _notes(moe: MoEConfig, left: int) -> tuple[str, ...]:
    softmax = moe.router in ("TopK", "Switch") or moe.router_options.get("scores") == "softmax"
    given = moe.router_options.get("renormalize")
    renormalized = given if given is not None else moe.router == "TopK" and moe.top_k > 1
    if left == moe.num_experts:
        return ("nothing was dropped",)
    if softmax and not renormalized:
        return ("weights are probabilities over all experts: those of the kept ones grow by what the others had",)
    return ()
