"""Experts as masks over a dense layer's neurons: which neurons, and the rounds that fit router and model to them."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.decide.token.gate import largest
from turnout.layers import Routed
from turnout.models import LM, PreGate, token_loss
from turnout.paths import FeedForward
from turnout.reshape.calibrate import blocks, evaluating, watch
from turnout.run import activate
from turnout.run.product import linear
from turnout.train import cosine
from turnout.types import Routing

__all__ = ["Masked", "Masks", "Rounds", "importance", "labels", "masked", "top_masks", "train_rounds"]

_LEVELS = 5  # top activations count five times: the first N, the first 4 N / 5, ... the first N / 5
_SHARP = 10.0  # how much the soft labels are sharpened
_HARD, _SMOOTHING = 0.75, 0.5
_DECAY = 0.8  # of the learning rates, from one round to the next


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """The neurons of one layer that are always on, and those that each expert adds to them."""

    shared_F: Tensor
    expert_EF: Tensor


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How router and model are fitted, in turns."""

    rounds: int
    router_steps: int
    backbone_steps: int
    lr: float
    seed: int


@torch.no_grad()
def importance(lm: LM, domains: Mapping[str, tuple[Tensor, ...]]) -> list[Tensor]:
    """(E, F) for each layer: the mean over each domain's tokens of a neuron's absolute activation."""
    ffs = [cast(FeedForward, block.ff) for block in blocks(lm)]
    sum_LEF = [torch.zeros(len(domains), ff.hidden, dtype=torch.float64) for ff in ffs]
    for domain, text in enumerate(domains.values()):
        tokens = sum(id_BS.numel() for id_BS in text)

        def look(layer: int, x_TD: Tensor, _: Routing | None, domain: int = domain, tokens: int = tokens) -> None:
            sum_LEF[layer][domain] += _hidden(ffs[layer], x_TD).abs().double().sum(0).cpu() / tokens

        watch(lm, text, look)
    return sum_LEF


def top_masks(importance_LEF: list[Tensor], keep: int) -> tuple[list[Masks], list[int]]:
    """The masks of each layer, and how many neurons all domains of a layer share.

    A domain's mask is its ``keep`` most important neurons. Always on are R neurons that all masks of the layer share, R
    being what every layer has; where a layer has more, the least important of them go into every expert, so that all
    layers have experts of the same size and compute what their masks say.
    """
    mask_LEF = []
    for importance_EF in importance_LEF:
        top_EK = importance_EF.sort(dim=1, descending=True, stable=True)[1][:, :keep]
        mask_LEF.append(torch.zeros_like(importance_EF, dtype=torch.bool).scatter_(1, top_EK, True))
    common_L = [mask_EF.all(0) for mask_EF in mask_LEF]
    size = min(int(common_F.sum()) for common_F in common_L)
    found = []
    for importance_EF, mask_EF, common_F in zip(importance_LEF, mask_LEF, common_L, strict=True):
        mean_F = (importance_EF / importance_EF.sum(1, keepdim=True).clamp_min(1e-300)).mean(0)
        first_F = mean_F.masked_fill(~common_F, -1).sort(descending=True, stable=True)[1][:size]
        shared_F = torch.zeros_like(common_F).index_fill_(0, first_F, True)
        found.append(Masks(shared_F, mask_EF & ~shared_F))
    return found, [int(common_F.sum()) for common_F in common_L]


def labels(hidden_TF: Tensor, expert_EF: Tensor) -> Tensor:
    """(T, E) how much of each token's top activations lies in each expert: sum over levels of |top ∩ mask| / 3 N.

    Args:
        hidden_TF: activations of all neurons.
        expert_EF: the experts' masks, N neurons each.
    """
    size = int(expert_EF[0].sum())
    order_TF = hidden_TF.abs().argsort(dim=1, descending=True)
    level_F = torch.zeros(hidden_TF.shape[1], dtype=torch.float32, device=hidden_TF.device)
    for part in range(1, _LEVELS + 1):
        level_F[: size * part // _LEVELS] += 1
    level_TF = torch.empty_like(hidden_TF, dtype=torch.float32).scatter_(1, order_TF, level_F.expand_as(order_TF))
    return level_TF @ expert_EF.t().to(level_TF) / (3 * size)


class Masked(nn.Module):
    """A dense layer of which each token uses the neurons of its expert's mask and those that are always on."""

    def __init__(self, ff: FeedForward, masks: Masks, gate_ED: Tensor | None) -> None:
        super().__init__()
        self.ff = ff
        self.gate = None if gate_ED is None else nn.Parameter(gate_ED)
        self.register_buffer("expert_EF", masks.expert_EF.to(ff.up.device), persistent=False)
        self.register_buffer("mask_EF", (masks.expert_EF | masks.shared_F).to(ff.up), persistent=False)
        self.dense = False
        self.input_TD = self.hidden_TF = ff.up.new_empty(0)

    def forward(self, x: Tensor, *, routing: Routing | None = None, **_: object) -> Routed:
        """The output; masked unless ``dense``, when what went through is kept for labels."""
        hidden, routing = _hidden(self.ff, x), self._routing(x, routing)
        if self.dense:
            self.input_TD, self.hidden_TF = x.detach().flatten(0, -2), hidden.detach().flatten(0, -2)
            return Routed(linear(hidden, self.ff.down, self.ff.down_bias), routing)
        expert_T = torch.empty_like(routing.token_R).scatter_(0, routing.token_R, routing.expert_R)
        mask = self.mask_EF[expert_T].view(hidden.shape)
        return Routed(linear(hidden * mask, self.ff.down, self.ff.down_bias), routing)

    def _routing(self, x: Tensor, given: Routing | None) -> Routing:
        if self.gate is None:
            return cast(Routing, given)
        logit_TE = F.linear(x.flatten(0, -2).float(), self.gate)
        index_T1 = largest(logit_TE, 1)
        return Routing.from_topk(index_T1, torch.ones_like(index_T1, dtype=torch.float32), num_experts=len(self.gate))


def masked(lm: LM, masks_L: list[Masks], gate: PreGate | None, gates_L: list[Tensor] | None) -> LM:
    """A copy of the model with its layers masked, routed by one gate or by one for each layer."""
    student = copy.deepcopy(lm)
    for layer, block in enumerate(blocks(student)):
        own = None if gates_L is None else gates_L[layer]
        block.ff = Masked(cast(FeedForward, block.ff), masks_L[layer], own)  # type: ignore[assignment]
    student.pre_gate = gate
    return student


def _layers(student: LM) -> list[Masked]:
    return [cast(Masked, block.ff) for block in student.blocks]


@torch.enable_grad()
def train_rounds(student: LM, text: tuple[Tensor, ...], how: Rounds) -> None:
    """In each round, router steps on labels, then model steps on the next token with the router fixed."""
    router = [p for name, p in student.named_parameters() if "pre_gate" in name or name.endswith("ff.gate")]
    own = {id(p) for p in router}
    rest = [p for p in student.parameters() if id(p) not in own]
    order = _order(len(text), how.seed)
    for turn in range(how.rounds):
        scale = _DECAY**turn
        optimizer = torch.optim.AdamW(router, lr=how.lr * scale, weight_decay=0.01)
        for step in range(how.router_steps):
            loss = router_loss(student, text[next(order)])[0]
            _step(optimizer, router, loss, scale * cosine(step, steps=how.router_steps, lr=how.lr))
        optimizer = torch.optim.AdamW(rest, lr=how.lr * scale, weight_decay=0.01)
        for step in range(how.backbone_steps):
            id_BS = text[next(order)]
            logits_BSV = student(id_BS[:, :-1]).logits_BSV
            loss = token_loss(logits_BSV, id_BS[:, 1:]) / id_BS[:, 1:].numel()
            _step(optimizer, rest, loss, scale * cosine(step, steps=how.backbone_steps, lr=how.lr))


def router_loss(student: LM, id_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over layers of 0.75 CE to the best mask, smoothed, + 0.25 CE to softmax(10 overlap); (L,) agreement."""
    layers = _layers(student)
    with torch.no_grad(), evaluating(student):
        for layer in layers:
            layer.dense = True
        student(id_BS)
        for layer in layers:
            layer.dense = False
    shared_TE = None if student.pre_gate is None else student.pre_gate.logits(id_BS)
    losses, agree = [], []
    for layer in layers:
        overlap_TE = labels(layer.hidden_TF, layer.expert_EF)
        if shared_TE is None:
            assert layer.gate is not None
            logit_TE = F.linear(layer.input_TD.float(), layer.gate)
        else:
            logit_TE = shared_TE
        label_T = largest(overlap_TE, 1)[:, 0]
        hard = F.cross_entropy(logit_TE, label_T, label_smoothing=_SMOOTHING)
        soft = F.cross_entropy(logit_TE, (_SHARP * overlap_TE).softmax(1))
        losses.append(_HARD * hard + (1 - _HARD) * soft)
        agree.append((largest(logit_TE, 1)[:, 0] == label_T).float().mean())
    return torch.stack(losses).mean(), torch.stack(agree)


def _step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
    optimizer.step()


def _order(count: int, seed: int) -> Iterator[int]:
    """The batches in a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _hidden(ff: FeedForward, x: Tensor) -> Tensor:
    return activate(linear(x, ff.up, ff.up_bias), ff.activation)
