"""Claim: adapters averaged by task, part by part, learn many tasks better, and a new one by a small table alone."""

import copy
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from turnout.claims.claim import Claim, Row, Values
from turnout.layers import given
from turnout.reshape import add_tasks, attach, detach, fold_adapters, fresh_adapters
from turnout.train import train_routers

_WIDTH, _HIDDEN, _OUT = 24, 48, 8
_TASKS, _NEW, _LATENT, _CHANCE, _NOISE = 32, 8, 6, 0.4, 0.1
_COUNT, _RANK = 8, 4
_ROWS, _STEPS, _BATCH, _TOKENS = 512, 800, 16, 8
_FEW, _FEW_STEPS = 16, 150
_SURE = 60.0  # a logit that no noise and no gradient moves
# How many adapters, of what rank, in how many parts. "each": one of rank 1 for each of the 32 tasks, which is as many
# numbers as the inventory's.
_ARMS = {"mhr": (_COUNT, _RANK, 8), "poly": (_COUNT, _RANK, 1), "each": (_TASKS, 1, 1), "one": (1, _RANK, 1)}

Batch = tuple[Tensor, Tensor, Tensor]


def mhr() -> Claim:
    """On 32 tasks MHR loses less than Poly with the same adapters; a new task with 16 examples needs the table alone.

    The base is a frozen layer with a bend; a task shifts it by a sum of some of six hidden directions with random
    weights. The second control gives each task an adapter of its own, as many numbers in all; on a new task the control
    is one adapter, tuned from nothing or from all tasks, whichever is better.

    >>> mhr().off
    'Poly: one part'

    Source: Caccia et al., 2023, "Multi-Head Adapter Routing for Cross-Task Generalization".
    """
    many, few = (f"held-out squared error over the variance, {which}" for which in ("32 tasks", "a new task"))
    size = _RANK * (_WIDTH + _HIDDEN)
    why = "a tenth of what an untouched model errs"
    own, better = "an adapter of rank 1 for each task, as many numbers", "one adapter, tuned; the better of two starts"
    return Claim(
        name="mhr",
        statement="Adapters averaged part by part learn many tasks better, and carry over to a new one by a table.",
        source="Caccia et al., 2023, Multi-Head Adapter Routing for Cross-Task Generalization (MHR)",
        off="Poly: one part",
        switched={"mhr": "poly"},
        rows=(
            Row(many, "below", "mhr", "poly", "Poly: the same adapters, averaged whole"),
            Row(many, "below", "mhr", "each", own, headline=True),
            Row(f"{few}, all tuned", "below", "mhr, all", "poly, all", "Poly, all tuned", headline=True),
            Row(f"{few}, the table alone", "below", "mhr, z", "poly, z", "Poly, the table alone", headline=True),
            Row(f"{few}, the table alone", "below", "mhr, z", "single", better, headline=True),
            Row(few, "no_worse", "mhr, z", "mhr, all", "MHR, all tuned", margin=0.05, why=why, headline=True),
        ),
        measure=_measure,
        seconds=30,
        note=f"{_COUNT} adapters of rank {_RANK} in 8 parts; {_NEW} new tasks of {_FEW} examples. Numbers to learn: "
        f"{_COUNT * 8} with MHR-z, {size} with one adapter, {_COUNT * (size + 8)} with all. A new task before it is "
        f"learned: {{asis:.3f}}; one adapter of rank {_RANK} on the 32, which are not told apart: {{one:.3f}}",
    )


def _measure(seed: int) -> Values:
    world = Tasks(seed)
    models = {arm: world.joint(arm) for arm in _ARMS}
    found = {arm: world.error(model, range(_TASKS)) for arm, model in models.items()}
    for arm in ("mhr", "poly"):
        found |= {f"{arm}, {how}": world.transfer(models[arm], how) for how in ("all", "z")}
    found["asis"] = world.transfer(models["mhr"], "asis")
    found["single"] = min(world.transfer(models["one"], how) for how in ("all", "fresh"))
    return found


class _Net(nn.Module):
    """A layer that adapters change, and a frozen rest."""

    def __init__(self, base_HD: Tensor, head_OH: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(_WIDTH, _HIDDEN, bias=False)
        self.layer.weight.data.copy_(base_HD)
        self.register_buffer("head_OH", head_OH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu() @ self.head_OH.t()


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    with given(task_B=batch[2]):
        return (model(batch[0]) - batch[1]).square().mean()


class Tasks:
    """The tasks of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed, self.chance = seed, torch.Generator().manual_seed(seed)
        self.base_HD = self._randn(_HIDDEN, _WIDTH) / _WIDTH**0.5
        self.head_OH = self._randn(_OUT, _HIDDEN) / _HIDDEN**0.5
        hidden = self._randn(_LATENT, _HIDDEN, 1) @ (self._randn(_LATENT, 1, _WIDTH) / _WIDTH**0.5)
        shape = _TASKS + _NEW, _LATENT
        weight = self._randn(*shape) * (torch.rand(shape, generator=self.chance) < _CHANCE)
        self.shift = torch.einsum("tk,khd->thd", weight, hidden)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.chance)

    def data(self, task: int, rows: int, *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """(B, D) inputs and (B, O) what is asked for; with noise those to learn from, without those held out."""
        generator = torch.Generator().manual_seed(100_000 * self.seed + 2 * task + (noise > 0))
        x_BD = torch.randn(rows, _WIDTH, generator=generator)
        y_BO = (x_BD @ (self.base_HD + self.shift[task]).t()).relu() @ self.head_OH.t()
        return x_BD, y_BO + noise * torch.randn(y_BO.shape, generator=generator)

    def joint(self, arm: str) -> nn.Module:
        """Adapters and tables trained on all tasks together."""
        count, rank, parts = _ARMS[arm]
        chance = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)  # of what the router draws
        model = _Net(self.base_HD, self.head_OH)
        skills = fresh_adapters(model, ["layer"], count=count, rank=rank, generator=chance)
        attach(model, skills, router="poly", router_options={"num_tasks": _TASKS, "parts": parts})
        if arm == "each":  # the task's own adapter, for certain
            router = model.layer.router
            router.logit.data.copy_(_SURE * (2 * torch.eye(_TASKS).view_as(router.logit) - 1))  # type: ignore[union-attr]
        pairs = [self.data(task, _ROWS, noise=_NOISE) for task in range(_TASKS)]
        x_CND, y_CNO = (torch.stack(side) for side in zip(*pairs, strict=True))

        def batches() -> Iterator[Batch]:
            for _ in range(_STEPS):
                task_B = torch.randint(_TASKS, (_BATCH,), generator=chance)
                pick_BT = torch.randint(_ROWS, (_BATCH, _TOKENS), generator=chance)
                yield x_CND[task_B[:, None], pick_BT], y_CNO[task_B[:, None], pick_BT], task_B

        train_routers(model, batches(), loss=_loss, rate=0.1, adapters=True, adapter_rate=1e-2)
        return model

    def transfer(self, taught: nn.Module, how: str) -> float:
        """The mean error on the new tasks: all is tuned, the table (z), the average (mu), a new adapter, or nothing."""
        errors = []
        for new in range(_TASKS, _TASKS + _NEW):
            torch.manual_seed(self.seed)
            model, task = copy.deepcopy(taught), 0
            if how == "mu":
                average = fold_adapters(model, "mu", task="average")
                detach(model)
                attach(model, [average], router="even")
            elif how == "fresh":
                detach(model)
                chance = torch.Generator().manual_seed(self.seed)
                attach(model, fresh_adapters(model, ["layer"], count=1, rank=_RANK, generator=chance), router="even")
            else:
                add_tasks(model)
                task = _TASKS  # the one after those that were there
            whole = how != "z"
            own = 5e-3 if whole else None
            if how != "asis":
                train_routers(model, self._few(new, task), loss=_loss, rate=0.1, adapters=whole, adapter_rate=own)
            errors.append(self.error(model, [new], known_as=task))
        return statistics.fmean(errors)

    def _few(self, new: int, task: int) -> Iterator[Batch]:
        x_BD, y_BO = self.data(new, _FEW, noise=_NOISE)
        chance = torch.Generator().manual_seed(self.seed)
        for _ in range(_FEW_STEPS):
            pick_BT = torch.randint(_FEW, (4, _TOKENS), generator=chance)
            yield x_BD[pick_BT], y_BO[pick_BT], torch.full((4,), task)

    @torch.no_grad()
    def error(self, model: nn.Module, tasks: range | list[int], *, known_as: int | None = None) -> float:
        """The mean of the tasks' held-out errors."""
        errors = []
        for task in tasks:
            x_BD, y_BO = self.data(task, 2048)
            number = torch.tensor([task if known_as is None else known_as])
            error = _loss(model.eval(), (x_BD.unsqueeze(0), y_BO, number))
            errors.append(float(error / y_BO.var(0).mean()))
        return statistics.fmean(errors)
