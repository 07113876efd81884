"""C3PO: the scores that a prompt's last token is routed by, moved to those of like prompts that went well."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.errors import UsageError, nearest, word
from turnout.models.c3po.pathways import Encoder, Pathways, embedded
from turnout.models.c3po.rerouted import Rerouted, batch_of, own_scores
from turnout.models.contrast import by_score
from turnout.models.lm import LM

__all__ = ["C3PO"]

_WHERE = "turnout.models.C3PO"
# The shares that are tried where alpha is chosen.
_SHARES = tuple(step / 10 for step in range(11))


@dataclasses.dataclass(frozen=True, eq=False)
class C3PO:
    """How the experts of a prompt's last token are mixed anew, from a reference set of prompts that went well.

    The pathway w of a prompt x is the scores of its last token, in the last ``layers`` routed layers, of the
    ``experts`` that score highest there. N(x) are its nearest neighbours in the set, K a kernel.

    - "gradient": w <- w - rate · sum_i K(x_i, x) grad_w loss(f(x_i; w), y_i) / sum_i K(x_i, x), ``steps`` times, where
      f(x_i; w) is the model on neighbour i with the last token of its prompt routed by w;
    - "kernel": w' = sum_i K(x_i, x) w_i / sum_i K(x_i, x);
    - "mode": the same with neighbours and kernel of pathways, w' = sum_i K(w_i, w) w_i / sum_i K(w_i, w), ``steps``
      times from the new w: a step of mean shift.

    In all three w becomes alpha w + (1 - alpha) w'. All other tokens, layers and experts are as ever, and so are the
    tokens that are generated.

    Args:
        pathways: the reference set.
        by: which of the three.
        alpha: how much of the model's own pathway stays, from 0 to 1; at 1 the model is as it is, to the bit. None
            chooses among eleven shares the one with the least loss on the neighbours ("kernel" alone).
        neighbors: k, how many.
        layers: the critical layers, so many last ones.
        experts: the core experts, so many of the highest scores; None for all.
        steps: of "gradient" and "mode".
        rate: of "gradient".
        kernel: "gaussian", exp(-d^2 / 2 h^2), h the mean distance of the neighbours; or "cosine".
        encoder: what prompts are compared by, where the pathways were recorded with one.

    Raises:
        UsageError: a value out of its range.

    >>> from turnout.models import LMConfig, MoEConfig, generate
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, moe=MoEConfig(4, 2, 8))).eval()
    >>> right = lm.generate([[3, 1, 4], [1, 5, 9]], tokens=1, temperature=0)[:, -1:].tolist()
    >>> pathways = Pathways.record(lm, [[3, 1, 4], [1, 5, 9]], right)
    >>> how = C3PO(pathways, neighbors=2, layers=1, experts=3)
    >>> how.scores(lm, [[3, 1, 5]]).shape, len(generate(lm, [[3, 1, 5]], tokens=2, temperature=0, remix=how).rows[0])
    (torch.Size([1, 1, 4]), 2)

    Source: Li et al., 2025, "C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for Test-Time Expert
    Re-Mixing"; its defaults. Its public code averages three neighbours (alpha 0, all experts, cosine) and overrides the
    last position of every call, each generated token's too; here it is the prompt's last token alone. A core expert
    that is not chosen runs in the gradient step with weight 0, so that the gradient of its score is known. Scores stay
    at 0 or more.
    """

    pathways: Pathways
    by: Literal["gradient", "kernel", "mode"] = "gradient"
    alpha: float | None = 0.0
    neighbors: int = 3
    layers: int = 5
    experts: int | None = 20
    steps: int = 10
    rate: float = 0.1
    kernel: Literal["gaussian", "cosine"] = "gaussian"
    encoder: Encoder | None = None

    def __post_init__(self) -> None:
        for name, names in (("by", ("gradient", "kernel", "mode")), ("kernel", ("gaussian", "cosine"))):
            if getattr(self, name) not in names:
                raise nearest(str(getattr(self, name)), names, kind=name, where=_WHERE)
        share = self.alpha is None or 0 <= self.alpha <= 1
        known = len(self.pathways.prompts)
        checks = [
            ("alpha", share, "be from 0 to 1, or None", "pass alpha=0.0"),
            ("alpha", self.alpha is not None or self.by == "kernel", "be a number but with by='kernel'", "pass 0.0"),
            (
                "neighbors",
                1 <= self.neighbors <= known,
                f"be from 1 to {known}, what is known",
                f"pass {min(3, known)}",
            ),
            ("rate", 0 < self.rate < math.inf, "be above 0 and finite", "pass rate=0.1"),
        ]
        for name in ("layers", "steps", "experts"):
            value = getattr(self, name)
            checks.append((name, value is None or value >= 1, "be at least 1", f"pass {name}=5"))
        for name, fits, allowed, fix in checks:
            if not fits:
                raise UsageError(word(name, got=getattr(self, name), allowed=allowed, where=_WHERE, fix=fix))

    def check(self, lm: LM) -> None:
        """Refuses a model that the pathways are not of, or whose routers do not choose by a token's own scores.

        Raises:
            UsageError: such a model.
        """
        by_score(lm, _WHERE)
        self.pathways.check(lm, self.encoder)

    def scores(self, lm: LM, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(B, L, E) the new scores of each prompt's last token in the last L layers.

        Args:
            lm: in evaluation mode.
            prompts: token ids.
        """
        batch = batch_of(prompts, [(0,)] * len(prompts), lm.embedding.device)
        own_BLE = own_scores(lm, batch)[0][:, -self.layers :].float()
        core_BLE = torch.zeros_like(own_BLE, dtype=torch.bool)
        most = own_BLE.shape[2] if self.experts is None else min(self.experts, own_BLE.shape[2])
        core_BLE.scatter_(2, own_BLE.topk(most, dim=2).indices, True)
        if self.by == "mode":
            return self._mode(own_BLE, core_BLE)
        near_Bk, weight_Bk = self._near(embedded(lm, prompts, self.encoder).cpu(), self.pathways.embedding_ND)
        if self.by == "gradient":
            assert self.alpha is not None
            moved_BLE = _descended(self, lm, own_BLE, core_BLE, near_Bk, weight_Bk)
            return self.alpha * own_BLE + (1 - self.alpha) * moved_BLE
        mean_BLE = torch.where(core_BLE, self._mean(near_Bk, weight_Bk).to(own_BLE), own_BLE)
        if self.alpha is not None:
            return self.alpha * own_BLE + (1 - self.alpha) * mean_BLE
        mixed = [share * own_BLE + (1 - share) * mean_BLE for share in _SHARES]
        loss_SB = torch.stack([_losses(self, lm, each, None, near_Bk, weight_Bk).detach() for each in mixed])
        return torch.stack(mixed)[loss_SB.argmin(0), torch.arange(len(own_BLE), device=own_BLE.device)]

    def _mode(self, own_BLE: Tensor, core_BLE: Tensor) -> Tensor:
        assert self.alpha is not None
        known_ND, w_BLE = self.pathways.score_NLE[:, -self.layers :].flatten(1), own_BLE
        for _ in range(self.steps):
            near_Bk, weight_Bk = self._near(w_BLE.flatten(1).cpu(), known_ND)
            mean_BLE = torch.where(core_BLE, self._mean(near_Bk, weight_Bk).to(own_BLE), own_BLE)
            w_BLE = self.alpha * w_BLE + (1 - self.alpha) * mean_BLE
        return w_BLE

    def _near(self, one_BD: Tensor, known_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(B, k) the nearest, and their kernel's shares, which sum to 1."""
        distance_Bk, near_Bk = torch.cdist(one_BD, known_ND).topk(self.neighbors, dim=1, largest=False)
        if self.kernel == "cosine":
            like_BN = F.normalize(one_BD, dim=1) @ F.normalize(known_ND, dim=1).t()
            weight_Bk = like_BN.gather(1, near_Bk).clamp(min=1e-9)
        else:
            wide_B1 = distance_Bk.mean(1, keepdim=True).clamp(min=1e-9)
            weight_Bk = torch.exp(-0.5 * (distance_Bk / wide_B1) ** 2)
        return near_Bk, weight_Bk / weight_Bk.sum(1, keepdim=True)

    def _mean(self, near_Bk: Tensor, weight_Bk: Tensor) -> Tensor:
        near_BkLE = self.pathways.score_NLE[near_Bk, -self.layers :]
        return (weight_Bk[..., None, None] * near_BkLE).sum(1)


def _descended(how: C3PO, lm: LM, own_BLE: Tensor, core_BLE: Tensor, near_Bk: Tensor, weight_Bk: Tensor) -> Tensor:
    """The scores after the steps down the neighbours' loss."""
    w_BLE = own_BLE
    for _ in range(how.steps):
        leaf_BLE = w_BLE.clone().requires_grad_()
        with torch.enable_grad():
            loss = _losses(how, lm, leaf_BLE, core_BLE, near_Bk, weight_Bk).sum()
            (slope_BLE,) = torch.autograd.grad(loss, leaf_BLE)
        w_BLE = torch.where(core_BLE, (w_BLE - how.rate * slope_BLE).clamp(min=0), w_BLE)
    return w_BLE


def _losses(how: C3PO, lm: LM, w_BLE: Tensor, core_BLE: Tensor | None, near_Bk: Tensor, weight_Bk: Tensor) -> Tensor:
    """(B,) the neighbours' loss, by the kernel, where the last tokens of their prompts are routed by these scores."""
    known, k = how.pathways, near_Bk.shape[1]
    answers = [known.answers[row] for row in near_Bk.flatten().tolist()]
    batch = batch_of([known.prompts[row] for row in near_Bk.flatten().tolist()], answers, w_BLE.device)
    core = None if core_BLE is None else core_BLE.repeat_interleave(k, 0)
    detour = Rerouted(batch.last_B, w_BLE.repeat_interleave(k, 0), len(lm.routers), core)
    hidden_RSD = lm.hidden(batch.id_BS, batch.length_B, detour=detour)[0]
    nats = [_nats(lm, hidden_RSD[row], int(batch.last_B[row]), answer) for row, answer in enumerate(answers)]
    return (torch.stack(nats).view(-1, k) * weight_Bk.to(w_BLE)).sum(1)


def _nats(lm: LM, hidden_SD: Tensor, last: int, answer: Sequence[int]) -> Tensor:
    """The mean loss of an answer's tokens."""
    logit_AV = lm.scores(hidden_SD[last : last + len(answer)])
    return F.cross_entropy(logit_AV.float(), torch.tensor(answer, device=logit_AV.device))
