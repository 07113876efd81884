"""Merging experts: the seldom used join the often used that the router treats alike, neuron by matching neuron."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from turnout.errors import UsageError, nearest, word
from turnout.expects import expects
from turnout.layers import MoE
from turnout.models import LM, LMConfig, MoEConfig
from turnout.paths import Bank
from turnout.reshape.calibrate import blocks, checked, difference, refuse_no_text, watch
from turnout.reshape.rebuild import bill, rebuild
from turnout.reshape.resumable import by_batch, by_layer
from turnout.solve import assignment
from turnout.types import Report, Routing
from turnout.types.weights import GATED

__all__ = ["merge_experts"]

_WHERE = "turnout.reshape.merge_experts"
_BY = ("routing", "random")


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """The groups of one layer: the ids of the dominant experts, ascending, and for each expert which of them leads."""

    dominant_G: Tensor
    label_E: Tensor


@expects(lm=LM)
def merge_experts(
    lm: LM, *, keep: int, batches: Iterable[Tensor] | None = None, align: bool = True,
    by: Literal["routing", "random"] = "routing", seed: int = 0,
) -> tuple[LM, Report]:  # fmt: skip
    """The model in which groups of experts became one expert each; the router still chooses among all E.

    The keep * L experts with the highest frequency f over all L layers (at least one in each) are dominant. Every other
    expert joins the dominant one of its layer whose router logits over the text have the highest cosine to its own, has
    its neurons permuted to match (the permutation P that maximises the inner product of all weights), and then

        W_group = sum_e f_e P_e W_e / sum_e f_e.

    Entries of a token that meet in one group are summed, as if every expert of the group held W_group.

    Args:
        lm: a model with experts and a router with logits; it is left as it is.
        keep: experts left per layer on average, 1 to E; how many each layer keeps follows from the frequencies.
        batches: (B, S) token ids to count and compare on.
        align: False merges neurons as they lie, an ablation; ``by="random"`` is the other, groups drawn from ``seed``
            whose members weigh alike.

    Returns:
        The smaller model; and per layer the dominant experts, the leader of each expert and the frequencies; the bill,
        and the difference on the text.

    Raises:
        UsageError: no text, no experts, experts merged before, a router without logits, or ``keep`` out of range.

    >>> from turnout.models import LMConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, moe=MoEConfig(4, 2, hidden=8)))
    >>> merged, report = merge_experts(lm, keep=2, batches=[torch.arange(16)[None]])
    >>> sum(merged.config.moe.distinct), len(report["leader"]["0"])
    (4, 4)

    Source: Li et al., 2024, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy"
    (M-SMoE). Members are matched to their group's leader, not to the layer's first expert, with gate, value and down
    weights; MC-SMoE's low-rank and sparse compression of the result is ``compress_experts``.
    """
    moe, text = _routed(lm.config, keep), checked(batches, lm, _WHERE)
    refuse_no_text(text, "frequencies and similarities are measured on it", _WHERE)
    load_LE, like_LE = _statistics(lm, text)
    drawn = _drawn(load_LE, by, seed)
    groups = _groups(*(drawn or (load_LE, like_LE)), keep)
    merging = groups if keep < moe.num_experts else {}
    changed = _banks(lm, merging, {} if drawn else load_LE, align=align)
    distinct = tuple(len(group.dominant_G) for group in groups.values()) if merging else None
    new = rebuild(lm, dataclasses.replace(lm.config, moe=dataclasses.replace(moe, distinct=distinct)), changed)
    values = {
        "num_experts": moe.num_experts,
        "distinct": list(distinct or [moe.num_experts] * len(groups)),
        "dominant": {str(layer): group.dominant_G.tolist() for layer, group in groups.items()},
        "leader": {str(layer): group.dominant_G[group.label_E].tolist() for layer, group in groups.items()},
        "frequency": {str(layer): (load_E / load_E.sum()).tolist() for layer, load_E in load_LE.items()},
        "aligned": align,
        "by": by,
        **bill(lm, new),
        **difference(lm, new, text),
    }
    return new, Report("merge_experts", values, () if merging else ("nothing was merged",))


def planned(config: LMConfig, *, keep: int) -> LMConfig:
    """The configuration that ``merge_experts`` makes of this one, if every layer keeps as many experts.

    How many each layer really keeps depends on the text; their sum does not.

    Raises:
        UsageError: as ``merge_experts``.
    """
    moe = _routed(config, keep)
    layers = sum(config.is_routed(layer) for layer in range(config.layers))
    distinct = (keep,) * layers if keep < moe.num_experts else None
    return dataclasses.replace(config, moe=dataclasses.replace(moe, distinct=distinct))


def _statistics(lm: LM, text: tuple[Tensor, ...]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By layer: how many tokens each expert got (E,), and the cosines of the experts' router logits (E, E)."""
    layers = [layer for layer, block in enumerate(blocks(lm)) if isinstance(block.ff, MoE)]
    count = lm.config.moe.num_experts if lm.config.moe else 0
    load_LE = {layer: torch.zeros(count, dtype=torch.int64) for layer in layers}
    gram_LE = {layer: torch.zeros(count, count, dtype=torch.float64) for layer in layers}
    totals = {f"load-{layer}": load_LE[layer] for layer in layers} | {
        f"gram-{layer}": gram_LE[layer] for layer in layers
    }

    def look(layer: int, _: Tensor, routing: Routing | None) -> None:
        if routing is None:
            return
        if routing.logit_TE is None:
            fix = "use drop_experts, which needs none"
            raise UsageError(word("the router", got="one without", allowed="give logits", where=_WHERE, fix=fix))
        logit_TE = routing.logit_TE.double().cpu()
        gram_LE[layer] += logit_TE.t() @ logit_TE
        load_LE[layer] += routing.load_E.cpu()

    by_batch("counting tokens", text, totals, lambda id_BS: watch(lm, [id_BS], look))
    length_LE = {layer: gram_EE.diagonal().sqrt().clamp_min(1e-300) for layer, gram_EE in gram_LE.items()}
    return load_LE, {n: gram_EE / length_LE[n][:, None] / length_LE[n] for n, gram_EE in gram_LE.items()}


def _drawn(load_LE: Mapping[int, Tensor], by: str, seed: int) -> tuple[dict[int, Tensor], dict[int, Tensor]] | None:
    """For "random", frequencies and similarities by chance, of the same shapes."""
    if by not in _BY:
        raise nearest(by, _BY, kind="way to group", where=_WHERE)
    if by == "routing":
        return None
    generator = torch.Generator().manual_seed(seed)
    count = {layer: len(load_E) for layer, load_E in load_LE.items()}
    load = {layer: torch.rand(n, generator=generator) for layer, n in count.items()}
    return load, {layer: torch.rand(n, n, generator=generator) for layer, n in count.items()}


def _groups(load_LE: Mapping[int, Tensor], like_LE: Mapping[int, Tensor], keep: int) -> dict[int, _Group]:
    """The dominant experts of all layers together, and whom every other one joins; ties go to the lower index."""
    layers = sorted(load_LE)
    share = torch.stack([load_LE[layer].double() / load_LE[layer].sum() for layer in layers])
    share[torch.arange(len(layers)), share.argmax(1)] += 1  # one of each layer, whatever its frequency
    order_N = share.flatten().sort(descending=True, stable=True)[1][: keep * len(layers)]
    is_dominant = torch.zeros(share.numel(), dtype=torch.bool)
    is_dominant[order_N] = True
    found = {}
    for layer, dominant_E in zip(layers, is_dominant.view_as(share), strict=True):
        dominant_G = dominant_E.nonzero().flatten()
        label_E = like_LE[layer][:, dominant_G].argmax(1)
        label_E[dominant_G] = torch.arange(len(dominant_G))
        found[layer] = _Group(dominant_G, label_E)
    return found


def _banks(lm: LM, groups: Mapping[int, _Group], load_LE: Mapping[int, Tensor], *, align: bool) -> dict[str, Tensor]:
    """The merged banks by name, and which group each expert is in; without frequencies members weigh alike."""
    changed = dict[str, Tensor]()

    def match(layer: int) -> dict[str, Tensor]:
        return {"order_EF": _matched(_bank(lm, layer), groups[layer], align=align)}

    for layer, found in by_layer("matching neurons", groups, match).items():
        group, name = groups[layer], f"blocks.{layer}.ff"
        load_E = load_LE.get(layer, torch.ones(len(group.label_E)))
        merged = _merged(_bank(lm, layer), group, load_E, found["order_EF"])
        changed |= {f"{name}.bank.{part}": stack for part, stack in merged.items()} | {f"{name}.label_E": group.label_E}
    return changed


def _bank(lm: LM, layer: int) -> Bank:
    ff = blocks(lm)[layer].ff
    assert isinstance(ff, MoE) and isinstance(ff.bank, Bank)
    return ff.bank


def _neurons(bank: Bank) -> Tensor:
    """(E, F, X) each neuron's weights in a row: into it, gate before value, then out of it, then its biases."""
    parts = 2 if bank.activation in GATED else 1
    into_EFX = bank.up.detach().unflatten(1, (parts, -1)).transpose(1, 2).flatten(2)
    found = [into_EFX, bank.down.detach().transpose(1, 2)]
    if bank.up_bias is not None:
        found.append(bank.up_bias.detach().unflatten(1, (parts, -1)).transpose(1, 2))
    return torch.cat(found, 2)


def _matched(bank: Bank, group: _Group, *, align: bool) -> Tensor:
    """(E, F) for each expert, which of its neurons stands in the place of each of its leader's."""
    neuron_EFX = _neurons(bank)
    order_EF = torch.arange(neuron_EFX.shape[1]).repeat(len(neuron_EFX), 1)
    leader_E = group.dominant_G[group.label_E].tolist()
    for expert, leader in enumerate(leader_E):
        if align and expert != leader:
            order_EF[expert] = _matching(neuron_EFX[leader].double(), neuron_EFX[expert].double()).cpu()
    return order_EF


def _merged(bank: Bank, group: _Group, load_E: Tensor, order_EF: Tensor) -> dict[str, Tensor]:
    """The stacks of one layer's groups: up (G, D, H), down (G, F, D), and the biases where there are some."""
    neuron_EFX, parts = _neurons(bank), 2 if bank.activation in GATED else 1
    sums, biases = [], []
    for place, leader in enumerate(group.dominant_G.tolist()):
        members = (group.label_E == place).nonzero().flatten().tolist()
        weight_M = load_E[members].double()
        weight_M = weight_M / weight_M.sum() if weight_M.sum() > 0 else torch.full_like(weight_M, 1 / len(members))
        total_FX = torch.zeros_like(neuron_EFX[leader], dtype=torch.float64)
        for member, weight in zip(members, weight_M.tolist(), strict=True):
            total_FX += weight * neuron_EFX[member][order_EF[member].to(neuron_EFX.device)].double()
        sums.append(total_FX)
        if bank.down_bias is not None:
            biases.append(weight_M.to(bank.down_bias.device) @ bank.down_bias.detach()[members].double())
    merged_GFX = torch.stack(sums).to(bank.up.dtype)
    into_GFX, down_GFD, bias_GFP = merged_GFX.tensor_split([parts * bank.width, (parts + 1) * bank.width], dim=2)
    up_GHD = into_GFX.unflatten(2, (parts, -1)).transpose(1, 2).flatten(1, 2)
    found = {"up": up_GHD.transpose(1, 2), "down": down_GFD}
    if bank.up_bias is not None:
        found["up_bias"] = bias_GFP.transpose(1, 2).flatten(1)
    if bank.down_bias is not None:
        found["down_bias"] = torch.stack(biases).to(bank.down_bias.dtype)
    return found


def _matching(leader_FX: Tensor, member_FX: Tensor) -> Tensor:
    """For each neuron of the leader the member's that takes its place: the largest sum of inner products."""
    gain_FF = leader_FX @ member_FX.t()
    return torch.from_numpy(assignment(gain_FF.cpu().numpy(), maximize=True).column_M).to(leader_FX.device)


def _routed(config: LMConfig, keep: int) -> MoEConfig:
    moe = config.moe
    if moe is None or moe.distinct is not None or moe.factored is not None or moe.router == "Hash":
        got = "a dense one" if moe is None else f"router={moe.router!r}, distinct={moe.distinct}"
        got += ", factored experts" if moe is not None and moe.factored is not None else ""
        allowed = "have experts, none merged yet and none factored, and a router with logits"
        fix = "start from the model before"
        raise UsageError(word("the model", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if moe.per_layer is not None:
        got, fix = f"one with per_layer={moe.per_layer}", "train it with fewer (per_layer=...)"
        raise UsageError(word("the model", got=got, allowed="have as many in each layer", where=_WHERE, fix=fix))
    if not 1 <= keep <= moe.num_experts:
        allowed, fix = f"be from 1 to num_experts={moe.num_experts}", f"pass keep={min(max(keep, 1), moe.num_experts)}"
        raise UsageError(word("keep", got=keep, allowed=allowed, where=_WHERE, fix=fix))
    return moe
