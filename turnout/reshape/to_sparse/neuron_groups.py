"""Which neurons of a feed-forward layer belong together: by their weights, their activations or their gradients."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.models import LM
from turnout.paths import FeedForward
from turnout.reshape.calibrate import blocks, evaluating, watch
from turnout.reshape.resumable import by_layer
from turnout.run import activate
from turnout.run.product import linear
from turnout.solve import transport

__all__ = ["Deal", "balanced_means", "cluster", "coactivation", "gradient"]

_ROUNDS = 20
_TOKENS = 4096  # the text's activations are looked at on this many tokens at most


@dataclasses.dataclass(frozen=True, eq=False)
class Deal:
    """The expert of each neuron of one layer, equally many each, and the direction of tokens that each is for."""

    expert_F: Tensor
    centre_ED: Tensor


def balanced_means(point_NX: Tensor, groups: int, seed: int) -> Tensor:
    """(N,) the group of each point under spherical k-means with groups of equal size.

    Each round deals all points out at the largest sum of cosines to the centres, by exact transport, and moves the
    centres to their means; it ends when nothing moves. The first centres are points far from each other.

    Args:
        point_NX: (N, X), N a multiple of ``groups``.
        groups: how many.
        seed: of the first centre.
    """
    point_NX = F.normalize(point_NX.double(), dim=1)
    start = int(torch.randint(len(point_NX), (1,), generator=torch.Generator().manual_seed(seed)))
    chosen = [start]
    near_N = point_NX @ point_NX[start]
    for _ in range(groups - 1):
        chosen.append(int(near_N.argmin()))
        near_N = torch.maximum(near_N, point_NX @ point_NX[chosen[-1]])
    centre_GX, group_N = point_NX[chosen], torch.full((len(point_NX),), -1)
    room_G = np.full(groups, len(point_NX) // groups)
    for _ in range(_ROUNDS):
        gain_NG = (point_NX @ centre_GX.t()).cpu().numpy()
        found_N = torch.from_numpy(transport(gain_NG, room_G, maximize=True).column_M)
        if torch.equal(found_N, group_N):
            break
        group_N = found_N
        centre_GX = F.normalize(_sums(point_NX, group_N, groups), dim=1)
    return group_N


def cluster(lm: LM, groups: int, seed: int, *, at_random: bool) -> list[Deal]:
    """Neurons whose gate rows point the same way; or any, at random."""

    def deal(layer: int, ff: FeedForward) -> Deal:
        gate_FD = _gate(ff)
        if at_random:
            generator = torch.Generator().manual_seed(seed + layer)
            expert_F = torch.randperm(ff.hidden, generator=generator) % groups
        else:
            expert_F = balanced_means(gate_FD, groups, seed + layer)
        return _deal(gate_FD, expert_F, groups)

    return _deals(lm, deal)


@torch.no_grad()
def coactivation(lm: LM, text: tuple[Tensor, ...], groups: int, seed: int) -> list[Deal]:
    """Neurons that are active on the same tokens."""
    input_LTD = _inputs(lm, text)

    def deal(layer: int, ff: FeedForward) -> Deal:
        active_TF = _hidden(ff, input_LTD[layer]).abs()
        return _deal(_gate(ff), balanced_means(active_TF.t(), groups, seed + layer), groups)

    return _deals(lm, deal)


def gradient(lm: LM, text: tuple[Tensor, ...], groups: int, seed: int) -> list[Deal]:
    """Neurons that matter to the loss on the same cluster of tokens: sum of |h dL/dh|, each neuron's in sum 1."""
    input_LTD, weight_LTF = _inputs(lm, text), _importance(lm, text)

    def deal(layer: int, ff: FeedForward) -> Deal:
        x_TD = F.normalize(input_LTD[layer].double(), dim=1)
        x_TD = x_TD[: len(x_TD) // groups * groups]
        cluster_T = balanced_means(x_TD, groups, seed + layer)
        matter_EF = _sums(weight_LTF[layer][: len(x_TD)], cluster_T, groups)
        matter_EF = matter_EF / matter_EF.sum(0).clamp_min(1e-300)
        room_E = np.full(groups, ff.hidden // groups)
        expert_F = torch.from_numpy(transport(matter_EF.t().cpu().numpy(), room_E, maximize=True).column_M)
        mean_ED = _sums(x_TD, cluster_T, groups) / (len(x_TD) // groups)
        return Deal(expert_F, (mean_ED - mean_ED.mean(0)).float())

    return _deals(lm, deal)


def _deals(lm: LM, deal: Callable[[int, FeedForward], Deal]) -> list[Deal]:
    layers = _layers(lm)

    def work(layer: int) -> dict[str, Tensor]:
        found = deal(layer, layers[layer])
        return {"expert_F": found.expert_F, "centre_ED": found.centre_ED.contiguous()}

    found = by_layer("dealing out neurons", range(len(layers)), work)
    return [Deal(piece["expert_F"], piece["centre_ED"]) for piece in found.values()]


def _deal(gate_FD: Tensor, expert_F: Tensor, groups: int) -> Deal:
    return Deal(expert_F, _sums(F.normalize(gate_FD.double(), dim=1), expert_F, groups).float())


def _sums(point_NX: Tensor, group_N: Tensor, groups: int) -> Tensor:
    sum_GX = point_NX.new_zeros(groups, point_NX.shape[1])
    return sum_GX.index_add_(0, group_N.to(point_NX.device), point_NX)


def _layers(lm: LM) -> list[FeedForward]:
    return [block.ff for block in blocks(lm) if isinstance(block.ff, FeedForward)]


def _gate(ff: FeedForward) -> Tensor:
    """(F, D) the rows that decide whether a neuron is active."""
    return ff.up.detach()[: ff.hidden]


def _hidden(ff: FeedForward, x_TD: Tensor) -> Tensor:
    return activate(linear(x_TD, ff.up, ff.up_bias), ff.activation)


def _inputs(lm: LM, text: tuple[Tensor, ...]) -> list[Tensor]:
    """(T, D) for each layer, what it sees of the text's first tokens."""
    seen: list[list[Tensor]] = [[] for _ in range(lm.config.layers)]
    watch(lm, _beginning(text), lambda layer, x_TD, _: seen[layer].append(x_TD))
    return [torch.cat(parts)[:_TOKENS] for parts in seen]


def _beginning(text: tuple[Tensor, ...]) -> list[Tensor]:
    """The batches that hold the tokens looked at; activations of all others would be kept for nothing."""
    before = itertools.accumulate((id_BS.numel() for id_BS in text), initial=0)
    return [id_BS for id_BS, tokens in zip(text, before, strict=False) if tokens < _TOKENS]


def _importance(lm: LM, text: tuple[Tensor, ...]) -> list[Tensor]:
    """(T, F) for each layer, |h dL/dh| of the next-token loss summed over the text."""
    layers, found = _layers(lm), [list[Tensor]() for _ in range(lm.config.layers)]
    for id_BS in _beginning(text):
        inputs, slots = list[Tensor](), list[Tensor]()

        def tap(
            _: nn.Module,
            args: tuple[Tensor, ...],
            y: Tensor,
            inputs: list[Tensor] = inputs,
            slots: list[Tensor] = slots,
        ) -> Tensor:
            inputs.append(args[0].detach().flatten(0, -2))
            slots.append(torch.zeros_like(y, requires_grad=True))  # its gradient is the output's, frozen models too
            return y + slots[-1]

        handles = [ff.register_forward_hook(tap) for ff in layers]
        try:
            with torch.enable_grad(), evaluating(lm):
                logits_BSV = lm(id_BS).logits_BSV[:, :-1].float()
                loss = F.cross_entropy(logits_BSV.flatten(0, 1), id_BS[:, 1:].flatten(), reduction="sum")
                slopes = torch.autograd.grad(loss, slots)
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            for layer, (ff, x_TD, slope) in enumerate(zip(layers, inputs, slopes, strict=True)):
                found[layer].append((_hidden(ff, x_TD) * (slope.flatten(0, -2) @ ff.down)).abs().double())
    return [torch.cat(parts)[:_TOKENS] for parts in found]
