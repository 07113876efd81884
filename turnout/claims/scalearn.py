"""Claim: scaling the outputs of adapters that exist transfers to a new task, better without a constraint on the sum."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.token import TopK
from turnout.layers import Adapter
from turnout.paths import LoRA, ScaLearn
from turnout.train import train_routers

_WIDTH, _HIDDEN, _OUT, _RANK, _TASKS = 24, 48, 8, 3, 4
_EXAMPLES, _BATCH, _STEPS, _SOURCE_STEPS, _NOISE = 96, 32, 400, 400, 0.1
_ARMS = ("vector", "uniform", "softmax", "fresh", "mean", "base")


def scalearn() -> Claim:
    """On a task with 96 examples, scaled adapters of four other tasks lose less than unscaled, or under a softmax.

    The base is a frozen layer with a bend; each task shifts it by a matrix of rank 3, and the new task by a weighted
    sum of theirs, with weights of a quarter give or take a quarter, so that they sum to 1 on average as those of a
    softmax do, and a little of its own. The last control is an adapter of its own, with more numbers to learn.

    >>> scalearn().off
    'scales not learned: the mean of the adapters'

    Source: Frohmann et al., 2024, "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale".
    """
    metric, own = "held-out squared error over the variance of the task", "an adapter of its own"
    sizes = _TASKS * _HIDDEN, _TASKS, _RANK * (_WIDTH + _HIDDEN)
    softmax = "the same scales under a softmax"
    return Claim(
        name="scalearn",
        statement="Learned scales of frozen adapters, free in their sum, carry over to a new task with few examples.",
        source="Frohmann et al., 2024, ScaLearn",
        off="scales not learned: the mean of the adapters",
        switched={"vector": "mean", "uniform": "mean"},
        rows=(
            Row(metric, "below", "vector", "mean", "the mean of the adapters"),
            Row(f"{metric}, one scale an adapter", "below", "uniform", "mean", "the mean of the adapters"),
            Row(metric, "below", "vector", "fresh", own, headline=True),
            Row(f"{metric}, one scale an adapter", "below", "uniform", "fresh", own, headline=True),
            Row(metric, "below", "vector", "softmax", softmax, headline=True),
        ),
        measure=_measure,
        seconds=2,
        note=f"{_TASKS} tasks of width {_WIDTH}, rank {_RANK}; numbers to learn: {sizes[0]} as vectors, {sizes[1]} "
        f"uniform, {sizes[2]} as an adapter of its own; the base alone: {{base:.3f}}. The new task is made of the "
        "others; where it is not, scales cannot help",
    )


def _measure(seed: int) -> Values:
    world = _World(seed)
    return {name: world.transfer(name) for name in _ARMS}


class _Under(nn.Module):
    """The scales of each output under a softmax over the adapters: the one difference to ``ScaLearn``."""

    def forward(self, omega_NO: Tensor) -> Tensor:
        return omega_NO.softmax(0)


class _World:
    """Four tasks with adapters that learned them, and a fifth made of theirs."""

    def __init__(self, seed: int) -> None:
        self.seed, self.chance = seed, torch.Generator().manual_seed(seed)
        self.base_HD = torch.randn(_HIDDEN, _WIDTH, generator=self.chance) / _WIDTH**0.5
        self.head_OH = torch.randn(_OUT, _HIDDEN, generator=self.chance) / _HIDDEN**0.5
        shift = [self._low_rank() for _ in range(_TASKS + 1)]
        weight_N = [*((1 + torch.randn(_TASKS, generator=self.chance)) / _TASKS).tolist(), 0.1]
        self.shift = [*shift[:_TASKS], sum(w * one for w, one in zip(weight_N, shift, strict=True))]
        self.taught = LoRA(_WIDTH, _HIDDEN, ranks=(_RANK,) * _TASKS, generator=self.chance)
        for task in range(_TASKS):
            layer = self._fresh()
            self._tune(layer, task, _SOURCE_STEPS, examples=None, adapters=True)
            self.taught.fill(task, *layer.paths.factors(0)[:2])

    def _low_rank(self) -> Tensor:
        a_rD = torch.randn(_RANK, _WIDTH, generator=self.chance) / _WIDTH**0.5
        return torch.randn(_HIDDEN, _RANK, generator=self.chance) / _RANK**0.5 @ a_rD

    def _layer(self, paths: LoRA, router: nn.Module) -> Adapter:
        base = nn.Linear(_WIDTH, _HIDDEN, bias=False)
        base.weight.data.copy_(self.base_HD)
        return Adapter(base, paths, router)

    def _fresh(self) -> Adapter:
        """One adapter that has learned nothing, always taken."""
        router = TopK(_WIDTH, 1, top_k=1, generator=self.chance)
        return self._layer(LoRA(_WIDTH, _HIDDEN, ranks=(_RANK,), generator=self.chance), router)

    def data(self, task: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """(B, D) inputs and (B, O) what is asked for, without noise."""
        generator = torch.Generator().manual_seed(10_000 * self.seed + 100 * task + seed)
        x_BD = torch.randn(rows, _WIDTH, generator=generator)
        return x_BD, self.answer(x_BD @ (self.base_HD + self.shift[task]).t())

    def answer(self, hidden_BH: Tensor) -> Tensor:
        """What the frozen rest of the network makes of the layer's output."""
        return hidden_BH.relu() @ self.head_OH.t()

    def _tune(self, layer: Adapter, task: int, steps: int, *, examples: int | None, adapters: bool) -> None:
        x_BD, y_BO = self.data(task, examples or _BATCH * steps, 1)
        y_BO = y_BO + _NOISE * torch.randn(y_BO.shape, generator=self.chance)
        picks = [torch.randint(len(x_BD), (_BATCH,), generator=self.chance) for _ in range(steps)]
        batches = [(x_BD[pick], y_BO[pick]) for pick in picks]

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return (self.answer(model(batch[0])) - batch[1]).square().mean()

        train_routers(layer, batches, loss=loss, rate=1e-2, adapters=adapters)

    def transfer(self, name: str) -> float:
        """The held-out error on the new task of one way to use the adapters."""
        torch.manual_seed(self.seed)  # of dropout
        router = ScaLearn(_TASKS, _HIDDEN, uniform=name == "uniform", generator=self.chance)
        layer = self._fresh() if name == "fresh" else self._layer(self.taught, router)
        if name == "softmax":
            router.omega.data.zero_()
            parametrize.register_parametrization(router, "omega", _Under())
        if name in ("mean", "base"):
            router.omega.data.fill_(1 / _TASKS if name == "mean" else 0.0)
        else:
            self._tune(layer, _TASKS, _STEPS, examples=_EXAMPLES, adapters=name == "fresh")
        x_BD, y_BO = self.data(_TASKS, 4096, 2)
        with torch.no_grad():
            return float((self.answer(layer.eval()(x_BD)) - y_BO).square().mean() / y_BO.var(0).mean())
