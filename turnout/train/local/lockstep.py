"""Replicas that take their steps together: who is called when all of them have taken one."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word

__all__ = ["Lockstep", "replicas_of"]


class Lockstep:
    """A context in which ``after`` is called with the number of the step when every optimizer has taken it.

    Source: torchft, local_sgd.py: hooks on the inner optimizer, between enter and exit.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], after: Callable[[int], None], *, where: str
    ) -> None:
        self.optimizers, self.after, self.where = optimizers, after, where
        self.steps = [0] * len(optimizers)
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def enter(self) -> None:
        """Hooks onto the optimizers."""
        if self.hooks:
            fix = "leave it before it is entered again"
            got, allowed = "a second `with` inside the first", "be entered once at a time"
            raise UsageError(word("the context", got=got, allowed=allowed, where=self.where, fix=fix))
        for at, optimizer in enumerate(self.optimizers):
            self.hooks.append(optimizer.register_step_post_hook(functools.partial(self._stepped, at)))

    def exit(self) -> None:
        """Takes the hooks off."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _stepped(self, at: int, *_: object) -> None:
        self.steps[at] += 1
        if self.steps[at] > min(self.steps) + 1:
            got = f"replica {at} at step {self.steps[at]} while replica {self.steps.index(min(self.steps))} is behind"
            fix = "step every replica's optimizer once before any steps again"
            raise UsageError(word("the replicas", got=got, allowed="step together", where=self.where, fix=fix))
        if min(self.steps) == max(self.steps):
            self.after(self.steps[at])


def replicas_of(
    models: "nn.Module | Sequence[nn.Module]",
    optimizers: "torch.optim.Optimizer | Sequence[torch.optim.Optimizer]",
    where: str,
) -> tuple[list[dict[str, Tensor]], list[torch.optim.Optimizer]]:
    """The trained parameters of each replica by name, and the optimizers; all replicas start from the same numbers.

    Raises:
        UsageError: no replica, another number of optimizers, or replicas that differ.
    """
    several = [models] if isinstance(models, nn.Module) else list(models)
    steppers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    if not several or len(several) != len(steppers):
        got = f"{len(several)} models and {len(steppers)} optimizers"
        fix = "pass each model's own optimizer"
        raise UsageError(
            word("the replicas", got=got, allowed="be models with an optimizer each", where=where, fix=fix)
        )
    found: list[dict[str, Tensor]] = [
        {name: one for name, one in model.named_parameters() if one.requires_grad} for model in several
    ]
    for at, (named, stepper) in enumerate(zip(found, steppers, strict=True)):
        theirs = {id(one) for group in stepper.param_groups for one in group["params"]}
        missing = [name for name, one in named.items() if id(one) not in theirs]
        if missing or not named:
            got = f"an optimizer of replica {at} without {missing[0] if missing else 'any parameter to train'}"
            fix = "build each optimizer on the parameters of its own model"
            raise UsageError(word("the optimizer", got=got, allowed="step all of its model", where=where, fix=fix))
        unlike = [name for name in {**found[0], **named} if not _same(found[0].get(name), named.get(name))]
        if unlike:
            got, fix = f"replica {at} with another {unlike[0]}", "copy the first model: copy.deepcopy(model)"
            raise UsageError(word("the replicas", got=got, allowed="start from the same numbers", where=where, fix=fix))
    return found, steppers


def _same(one: "Tensor | None", other: "Tensor | None") -> bool:
    return one is not None and other is not None and one.shape == other.shape and bool(torch.equal(one, other))
