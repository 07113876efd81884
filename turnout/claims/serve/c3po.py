"""Claim: experts mixed anew at test time, by the loss of like prompts that went well, put wrong routers right."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.models import C3PO, LM, LMConfig, MoEConfig, Pathways, generate
from turnout.train.balance import load_balance_loss

# Tasks are permutations of the operands. A task has one word that is common and some that are rare.
_OPERANDS, _TASKS, _WORDS, _RARE = 24, 6, 4, 0.1
_STEPS, _BATCH, _LR = 200, 64, 5e-3
_TESTS, _KNOWN = 256, 400
# How far routers are moved, in standard deviations of their weights: a fifth to a third of the answers goes wrong then.
_NOISE = 2.0
_HOW: dict[str, Any] = {"neighbors": 4, "layers": 3}
_ARMS: dict[str, dict[str, Any]] = {
    "gradient": {"by": "gradient"},
    "mode": {"by": "mode", "alpha": 0.5, "steps": 3},
    "average": {"by": "kernel", "kernel": "cosine", "experts": None},
}


def c3po() -> Claim:
    """With the neighbours' gradient fewer answers are wrong than by the model's own routers, or another prompt's.

    A small mixture learns six permutations, each asked for in one of five words; then noise is added to its routers, so
    that a fifth to a third of its answers is wrong. It keeps those of 400 prompts that it answers rightly, and their
    pathways; others are answered with the experts of their last token mixed anew.

    >>> c3po().off
    "another prompt's neighbours"

    Source: Li et al., 2025, "C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for Test-Time Expert
    Re-Mixing".
    """
    wrong, off = "share of wrong answers", "the same, another prompt's neighbours"
    code = "the average of like pathways, as the public code has it"
    return Claim(
        name="c3po",
        statement="A gradient step on like prompts that went well mixes experts so that fewer answers are wrong; it "
        "beats the average of their pathways, and needs them to be alike.",
        source="Li et al., 2025, C3PO",
        off="another prompt's neighbours",
        switched={"gradient": "gradient, another's", "mode": "mode, another's"},
        rows=(
            Row(wrong, "below", "gradient", "gradient, another's", off),
            Row(f"{wrong}, mode finding", "below", "mode", "mode, another's", off),
            Row(wrong, "below", "gradient", "base", "the model's own routers", headline=True),
            Row(wrong, "below", "gradient", "average", code, headline=True),
        ),
        measure=_measure,
        seconds=20,
        note=f"3 layers, width 32, 8 experts, top 2, {_STEPS} steps of {_BATCH} prompts; noise of {_NOISE:g} standard "
        "deviations on every router: {before:.3f} wrong before it. Four neighbours, all three layers; averages of "
        "another prompt's {average, another's:.3f}",
    )


def _measure(seed: int) -> Values:
    tasks = _Tasks(seed)
    lm, generator = tasks.learned(seed), torch.Generator().manual_seed(seed)
    tests, known = tasks.draw(_TESTS), tasks.draw(_KNOWN)
    found = {"before": _wrong(lm, tests, None)}
    with torch.no_grad():
        for router in lm.routers:
            weight: Tensor = router.weight  # pyrefly: ignore[bad-assignment]
            weight += _NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    pathways = Pathways.record(lm, known[0].tolist(), known[1][:, None].tolist())
    found["base"] = _wrong(lm, tests, None)
    for name, how in _ARMS.items():
        for end, kind in (("", C3PO), (", another's", _Anothers)):
            found[name + end] = _wrong(lm, tests, kind(pathways, **(_HOW | how)))
    return found


def _wrong(lm: LM, tests: tuple[Tensor, Tensor], remix: C3PO | None) -> float:
    made = generate(lm, tests[0], tokens=1, temperature=0, remix=remix)
    return float((torch.tensor(made.rows)[:, 0] != tests[1]).float().mean())


class _Anothers(C3PO):
    """The same with the neighbours of another prompt, which are as much alike among themselves."""

    def _near(self, one_BD: Tensor, known_ND: Tensor) -> tuple[Tensor, Tensor]:
        near_Bk, weight_Bk = super()._near(one_BD, known_ND)
        return near_Bk.roll(1, 0), weight_Bk.roll(1, 0)


class _Tasks:
    """Prompts of a word and an operand, and their answers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.answer_TP = torch.stack([torch.randperm(_OPERANDS, generator=self.generator) for _ in range(_TASKS)])

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(N, 2) prompts, and (N,) what comes after them."""
        drawn = {"generator": self.generator}
        task_N, operand_N = torch.randint(_TASKS, (count,), **drawn), torch.randint(_OPERANDS, (count,), **drawn)
        rare_N = _TASKS + task_N * _WORDS + torch.randint(_WORDS, (count,), **drawn)
        word_N = torch.where(torch.rand(count, **drawn) < _RARE, rare_N, task_N)
        return torch.stack([_OPERANDS + word_N, operand_N], 1), self.answer_TP[task_N, operand_N]

    def learned(self, seed: int) -> LM:
        """The model that has learned them."""
        moe = MoEConfig(8, 2, 32, router_options={"renormalize": True})
        vocab = _OPERANDS + _TASKS * (1 + _WORDS)
        lm = LM(LMConfig(vocab_size=vocab, width=32, layers=3, heads=2, hidden=32, max_seq=8, moe=moe), seed=seed)
        optimizer = torch.optim.AdamW(lm.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.01)
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _LR * (1 - step / _STEPS)
            id_BS, answer_B = self.draw(_BATCH)
            out = lm(id_BS)
            loss = F.cross_entropy(out.logits_BSV[:, -1], answer_B)
            (loss + 0.01 * sum(load_balance_loss(routing) for routing in out.routings)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return lm.eval()
