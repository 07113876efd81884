"""Claim: experts merged by SMEAR learn better than experts chosen by estimated gradients, or by metadata."""

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.token import SMEAR
from turnout.paths import Bank
from turnout.types import Given, Routing

_WIDTH, _HIDDEN, _EXPERTS, _KINDS, _SKILLS, _TOKENS = 16, 16, 8, 8, 4, 8
_ROWS, _STEPS, _BATCH, _RATE = 512, 600, 64, 3e-3
_HOT, _COLD = 10.0, 0.5  # the temperature of the Gumbel noise, first and last
_ARMS = ("smear", "uniform", "switch", "gumbel", "exact")


def smear() -> Claim:
    """Merged experts lose less on held-out sequences than experts chosen one a sequence, by two gradient estimators.

    Sequences are of eight kinds, told apart by their mean; kinds share four functions that must be learned. Top-1
    routing (the expert times its probability, as Switch; and straight-through Gumbel, its temperature falling from 10
    to 0.5) has the same router, without its dropout. Metadata name the kind.

    >>> smear().off
    'a uniform merge'

    Source: Muqeeth et al., 2023, "Soft Merging of Experts with Adaptive Routing".
    """
    metric = "held-out squared error over the variance"
    return Claim(
        name="smear",
        statement="Merged experts learn better than ones merged evenly, chosen by estimated gradients, or by metadata.",
        source="Muqeeth et al., 2023, Soft Merging of Experts with Adaptive Routing (SMEAR)",
        off="a uniform merge",
        switched={"smear": "uniform"},
        rows=(
            Row(metric, "below", "smear", "uniform", "merged evenly"),
            Row(metric, "below", "smear", "switch", "top-1, times its probability", headline=True),
            Row(metric, "below", "smear", "gumbel", "top-1, straight-through Gumbel", headline=True),
            Row(metric, "below", "smear", "exact", "by metadata that name the kind", headline=True),
        ),
        measure=_measure,
        seconds=3,
        note=f"{_KINDS} kinds of sequences, {_SKILLS} functions, {_EXPERTS} experts of width {_WIDTH}; {_STEPS} steps "
        f"of {_BATCH} sequences of {_TOKENS} tokens, from {_ROWS}. The metadata say all there is to know",
    )


def _measure(seed: int) -> Values:
    return {arm: _Arm(arm, seed).run() for arm in _ARMS}


class _Arm:
    """One way of routing, trained on the sequences of one seed."""

    def __init__(self, arm: str, seed: int) -> None:
        self.arm, self.seed, self.temperature = arm, seed, _HOT
        self.chance = torch.Generator().manual_seed(seed)
        self.sign_KD = torch.randn(_KINDS, _WIDTH, generator=self.chance)
        self.up = 1.4 * torch.randn(_SKILLS, _WIDTH, _HIDDEN, generator=self.chance) / _WIDTH**0.5
        self.down = 1.4 * torch.randn(_SKILLS, _HIDDEN, _WIDTH, generator=self.chance) / _HIDDEN**0.5
        generator = self.chance
        self.bank = Bank(_EXPERTS, _WIDTH, _HIDDEN, activation="relu", bias=True, std=0.25, generator=generator)
        self.router = SMEAR(_WIDTH, _EXPERTS, dropout=0.1 if arm == "smear" else 0.0, generator=generator)

    def draw(self, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) sequences, (B,) their kinds, (B, S, D) what is asked for."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        kind_B = torch.randint(_KINDS, (rows,), generator=generator)
        x_BSD = torch.randn(rows, _TOKENS, _WIDTH, generator=generator) + self.sign_KD[kind_B].unsqueeze(1)
        skill_B = kind_B % _SKILLS
        return x_BSD, kind_B, (x_BSD @ self.up[skill_B]).relu() @ self.down[skill_B]

    def forward(self, x_BSD: Tensor, kind_B: Tensor) -> Tensor:
        """(B, S, D) what this way of routing makes of the sequences."""
        x_TD, batch = x_BSD.flatten(0, 1), len(x_BSD)
        given = Given.of(batch, len(x_TD))
        routing, scale_B1 = self.decide(x_TD, kind_B, given)
        return self.bank.merged(x_TD, routing, given.sequence_T).view(x_BSD.shape) * scale_B1.unsqueeze(2)

    def decide(self, x_TD: Tensor, kind_B: Tensor, given: Given) -> tuple[Routing, Tensor]:
        """The routing of the sequences, and what their outputs are multiplied by."""
        one_B1 = torch.ones(len(kind_B), 1)
        if self.arm == "exact":
            return Routing.from_topk(kind_B.unsqueeze(1), one_B1, num_experts=_EXPERTS), one_B1
        if self.arm == "uniform":
            return Routing.from_dense(torch.full((len(kind_B), _EXPERTS), 1 / _EXPERTS)), one_B1
        routing = self.router(x_TD, given=given, generator=self.chance)
        if self.arm == "smear":
            return routing, one_B1
        logit_BE = routing.logit_TE
        assert logit_BE is not None, "a softmax has logits"
        if self.arm == "gumbel" and self.router.training:
            uniform_BE = torch.rand(logit_BE.shape, generator=self.chance).clamp(1e-20, 1 - 1e-7)
            logit_BE = (logit_BE - (-uniform_BE.log()).log()) / self.temperature
        score_BE = logit_BE.softmax(1)
        expert_B1 = score_BE.argmax(1, keepdim=True)
        scale_B1 = score_BE.gather(1, expert_B1)
        scale_B1 = scale_B1 if self.arm == "switch" else scale_B1 / scale_B1.detach()
        return Routing.from_topk(expert_B1, one_B1, num_experts=_EXPERTS), scale_B1

    def run(self) -> float:
        """Held-out error after training."""
        x_BSD, kind_B, y_BSD = self.draw(_ROWS, 1)
        parameters = [*self.bank.parameters(), *self.router.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)
        for step in range(_STEPS):
            self.temperature = _HOT * (_COLD / _HOT) ** (step / _STEPS)
            pick = torch.randint(_ROWS, (_BATCH,), generator=self.chance)
            loss = (self.forward(x_BSD[pick], kind_B[pick]) - y_BSD[pick]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.router.eval()
        with torch.no_grad():
            x_BSD, kind_B, y_BSD = self.draw(2048, 2)
            return float((self.forward(x_BSD, kind_B) - y_BSD).square().mean() / y_BSD.var())
