"""An optimizer step that waits for nobody: it is done at once, and taken back where all stages together forbid it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.errors import UsageError, word

__all__ = ["PostValidation", "Verdict"]

_TAG = 1  # what pipelines send has another
_TINY = 1e-6  # as torch clips: by clip / (norm + 1e-6)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What all stages together say of a step that each has done by itself.

    Args:
        norm: of all gradients.
        finite: whether it is; where it is not, no stage has stepped.
        redone: whether this stage had stepped too early, and was taken back.

    >>> Verdict(norm=0.5, finite=True, redone=False).finite
    True

    Source: none; plain bookkeeping.
    """

    norm: float
    finite: bool
    redone: bool


class PostValidation:
    """Clipping to the norm of all stages' gradients without a barrier between the backward pass and the step.

    Each stage adds its gradients' squares to what the stages before it have, hands the sum on, and steps at once,
    unless that part is already too large or not finite. The whole sum comes back while the next step's forward passes
    run. Only where it asks for clipping, or is not finite, does a stage take its step back: parameters and the
    optimizer's state are put back from copies, and the step is done again with clipped gradients, or not at all.
    Weights are then, to the bit, those of an optimizer that waited.

    Args:
        optimizer: of this rank's stages, with gradients that are kept until ``settle``.
        clip: the largest norm; None for any, so that only numbers that are not finite are taken back.
        group: the pipeline's ranks; None for all of the process group.
        chain: these in the order in which their sums are added, ``Pipeline.chain``; None for their own.
        square: gives the sum of this rank's squared gradients, over all data ranks, each parameter once; None for that
            of the optimizer's parameters.

    Raises:
        UsageError: a clip that is not above 0.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> post = PostValidation(torch.optim.SGD([weight], lr=1.0), clip=1.0)
    >>> weight.grad = torch.tensor([0.0, 0.5])
    >>> total = post.eager(torch.zeros((), dtype=torch.float64))
    >>> post.validate(total + 100.0).redone, [round(w, 3) for w in weight.tolist()]  # another stage has large gradients
    (True, [1.0, 0.95])

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", section 4. Theirs takes AdamW back by arithmetic, which
    rounds; here copies are kept from the step until its verdict (parameters and state once more, of this stage alone).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None,
        group: dist.ProcessGroup | None = None,
        chain: Sequence[int] | None = None,
        square: Callable[[], Tensor] | None = None,
    ) -> None:
        if clip is not None and not clip > 0:
            fix = "pass clip=1.0, or None for no clipping"
            raise UsageError(word("clip", got=clip, allowed="be above 0", where="PostValidation", fix=fix))
        self.optimizer, self.clip, self.group = optimizer, clip, group
        self._chain = chain
        self._square = square or self._sum
        self._kept: list[tuple[Tensor, Tensor, dict[str, Any] | None]] | None = None
        self._part: Tensor | None = None
        self._sent: Any = None

    # ---- over the ranks of a pipeline

    def step(self) -> None:
        """Steps at once; what the ranks before have is received, and the sum sent on."""
        before, behind = self._neighbours()
        part = torch.zeros((), dtype=torch.float64, device=self._parameters()[0].device)
        if before is not None:
            dist.recv(part, group=self.group, group_src=before, tag=_TAG)
        self._part = self.eager(part)
        if behind is not None:
            self._sent = dist.isend(self._part, group=self.group, group_dst=behind, tag=_TAG)

    def settle(self) -> Verdict | None:
        """Waits for the sum of all and acts on it, once; None where nothing is open."""
        if self._part is None:
            return None
        before, behind = self._neighbours()
        total, self._part = self._part, None
        if behind is not None:
            self._sent.wait()
            total = torch.zeros_like(total)
            dist.recv(total, group=self.group, group_src=behind, tag=_TAG)
        if before is not None:
            dist.send(total, group=self.group, group_dst=before, tag=_TAG)
        return self.validate(total)

    def _neighbours(self) -> tuple[int | None, int | None]:
        chain = list(range(dist.get_world_size(self.group)) if self._chain is None else self._chain)
        place = chain.index(dist.get_rank(self.group))
        return (chain[place - 1] if place else None), (chain[place + 1] if place + 1 < len(chain) else None)

    # ---- of one stage

    def eager(self, before: Tensor) -> Tensor:
        """Steps, unless what the stages before have and this one's own gradients forbid it already.

        Args:
            before: the sum of the squared gradients of the stages before; 0 for the first.

        Returns:
            The same with this stage's, for the next stage.
        """
        part = before + self._square().to(before)
        allowed = bool(torch.isfinite(part)) and (self.clip is None or math.sqrt(float(part)) <= self.clip)
        if allowed:
            self._keep()
            self.optimizer.step()
        return part

    @torch.no_grad()
    def validate(self, total: Tensor) -> Verdict:
        """Takes an eager step back where the sum over all stages forbids it, and does it as it has to be.

        Args:
            total: the sum of all stages' squared gradients, which ``eager`` of the last stage gave.

        Returns:
            The verdict. Gradients are dropped.
        """
        finite = bool(torch.isfinite(total))
        norm = math.sqrt(float(total)) if finite else math.nan
        right = finite and (self.clip is None or norm <= self.clip)
        redone = self._kept is not None and not right
        if redone:
            self._put_back()
        if finite and (self._kept is None or redone):
            if not right:
                assert self.clip is not None
                for gradient in self._gradients():
                    gradient.mul_(self.clip / (norm + _TINY))
            self.optimizer.step()
        self._kept = None
        self.optimizer.zero_grad(set_to_none=True)
        return Verdict(norm, finite, redone)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters() if p.grad is not None]

    def _sum(self) -> Tensor:
        found = torch.zeros((), dtype=torch.float64, device=self._parameters()[0].device)
        for gradient in self._gradients():
            found += gradient.double().square().sum()
        return found

    @torch.no_grad()
    def _keep(self) -> None:
        state = self.optimizer.state
        self._kept = [
            (
                parameter,
                parameter.detach().clone(),
                {key: value.clone() if isinstance(value, Tensor) else value for key, value in state[parameter].items()}
                if parameter in state
                else None,
            )
            for parameter in self._parameters()
        ]

    @torch.no_grad()
    def _put_back(self) -> None:
        assert self._kept is not None
        for parameter, copy, state in self._kept:
            parameter.copy_(copy)
            if state is None:
                self.optimizer.state.pop(parameter, None)
            else:
                self.optimizer.state[parameter] = state
