"""Claim: tokens of two kinds learn faster where each kind has feed-forward layers of its own, at equal products."""

import math

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.layers import given
from turnout.models import LM, LMConfig, MoEConfig

_VOCAB, _SEQ, _WIDTH, _HIDDEN, _STEPS, _BATCH, _TEST = 24, 32, 32, 64, 220, 48, 256


def untied_kinds() -> Claim:
    """Cross entropy of sequences whose first part follows one table of pairs and whose second another.

    >>> untied_kinds().off
    'one feed-forward layer for both kinds'

    Source: Liang et al., 2024, "Mixture-of-Transformers: A Sparse and Scalable Architecture for Multi-Modal Foundation
    Models", its feed-forward layers alone, figure 5.
    """
    loss = "held-out cross entropy, nats"
    return Claim(
        name="untied_kinds",
        statement="With a feed-forward layer for each kind of token a model learns more in as many steps and products.",
        source="Liang et al., 2024, Mixture-of-Transformers",
        off="one feed-forward layer for both kinds",
        switched={"untied": "tied"},
        rows=(
            Row(loss, "below", "untied", "tied", "one feed-forward layer for both kinds"),
            Row(loss, "below", "untied", "wide", "one of twice the size, twice the products", headline=True),
        ),
        measure=_measure,
        seconds=40,
        note=f"2 layers, width {_WIDTH}, order-2 tables of {_VOCAB} tokens, {_STEPS} steps of {_BATCH} x {_SEQ}",
    )


def _measure(seed: int) -> Values:
    chance = torch.Generator().manual_seed(seed + 3)
    next_KVVV = torch.softmax(3 * torch.randn(2, _VOCAB, _VOCAB, _VOCAB, generator=chance), -1)
    test = _drawn(_TEST, next_KVVV, torch.Generator().manual_seed(99))
    arms = {"untied": (2, _HIDDEN), "tied": (1, _HIDDEN), "wide": (1, 2 * _HIDDEN)}
    return {name: _run(seed, *arm, next_KVVV, test) for name, arm in arms.items()}


def _drawn(count: int, next_KVVV: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, S) tokens and the kind of each: 0 before a place that is drawn, 1 from it on."""
    cut_B1 = torch.randint(8, 24, (count, 1), generator=chance)
    kind_BS = (torch.arange(_SEQ) >= cut_B1).long()
    id_BS = torch.zeros(count, _SEQ, dtype=torch.int64)
    id_BS[:, :2] = torch.randint(_VOCAB, (count, 2), generator=chance)
    for at in range(2, _SEQ):
        share_BV = next_KVVV[kind_BS[:, at], id_BS[:, at - 1], id_BS[:, at - 2]]
        id_BS[:, at] = torch.multinomial(share_BV, 1, generator=chance)[:, 0]
    return id_BS, kind_BS


def _run(seed: int, kinds: int, hidden: int, next_KVVV: Tensor, test: tuple[Tensor, Tensor]) -> float:
    moe = MoEConfig(kinds, 1, hidden, router="ByKind")
    lm = LM(LMConfig(vocab_size=_VOCAB, width=_WIDTH, layers=2, heads=4, max_seq=_SEQ, moe=moe), seed=seed).train()
    chance = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(lm.parameters(), lr=4e-3, weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda t: min(1, (t + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * t / _STEPS)))
    )
    for _ in range(_STEPS):
        loss = _loss(lm, *_drawn(_BATCH, next_KVVV, chance), kinds)
        adam.zero_grad()
        loss.backward()
        adam.step()
        warm.step()
    with torch.no_grad():
        return float(_loss(lm.eval(), *test, kinds))


def _loss(lm: LM, id_BS: Tensor, kind_BS: Tensor, kinds: int) -> Tensor:
    """The mean over the tokens that the tables say, from the third on; the kind is that of the token that is read."""
    target_BS = id_BS[:, 1:].clone()
    target_BS[:, 0] = -100
    with given(kind_BS=kind_BS[:, :-1] if kinds > 1 else 0 * kind_BS[:, :-1]):
        return lm.loss(id_BS[:, :-1], target_BS).nats / int((target_BS >= 0).sum())
