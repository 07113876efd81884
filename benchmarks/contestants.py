"""The layers that benchmarks.moe_layer times: each takes the same tokens and decision and gives the same output.

Those of other libraries are in benchmarks.peers.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from turnout.paths import Bank, FeedForward
from turnout.run import EXECUTORS
from turnout.types import Routing

# The module: turnout.run.sort is the function.
sort = importlib.import_module("turnout.run.sort")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: tokens, width, experts, experts per token, hidden width of one expert."""

    T: int
    D: int
    E: int
    K: int
    F: int
    dtype: str = "fp32"
    skew: float = 0.0

    def __str__(self) -> str:
        return f"{self.dtype} {self.T},{self.D},{self.E},{self.K},{self.F}" + (
            f" zipf {self.skew}" if self.skew else ""
        )

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return 6.0 * self.T * self.K * self.D * self.F


@dataclasses.dataclass
class Inputs:
    """The tokens, one decision and the upstream gradient; x and weight_TK are leaves with gradients."""

    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    grad_TD: Tensor


def decide(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """A random decision: K different experts a token, expert e with probability proportional to (1 + e) ** -skew."""
    g = torch.Generator().manual_seed(seed)
    popularity_E = torch.arange(1, case.E + 1, dtype=torch.float32).pow(-case.skew)[torch.randperm(case.E, generator=g)]
    gumbel_TE = -torch.log(-torch.log(torch.rand(case.T, case.E, generator=g).clamp_(1e-9, 1 - 1e-7)))
    index_TK = (popularity_E.log() + gumbel_TE).topk(case.K).indices
    return index_TK, torch.rand(case.T, case.K, generator=g).softmax(-1)


def draw(case: Case, seed: int) -> Inputs:
    index_TK, weight_TK = decide(case, seed)
    g = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    x_TD, grad_TD = (torch.randn(case.T, case.D, generator=g).to(dtype) for _ in range(2))
    return Inputs(x_TD.requires_grad_(), index_TK, weight_TK.requires_grad_(), grad_TD)


class Contestant:
    """A layer to time. ``run`` is the work of one step; ``leaves`` are what it gives gradients to."""

    exact = True  # computes the function that reference computes, and is checked against it
    last = False  # takes its turn after all others of a round
    normalises = False  # with weights that sum to 1 for each token, whatever they were

    def __init__(self, name: str, call: Callable[[Inputs], Tensor], parameters: list[Tensor]) -> None:
        self.name, self.call, self.parameters = name, call, parameters

    def prepare(self, inputs: Inputs) -> None:
        """Before the clock starts."""
        for tensor in (inputs.x_TD, inputs.weight_TK, *self.parameters):
            tensor.grad = None

    def run(self, inputs: Inputs, train: bool) -> Tensor:
        """One step."""
        with torch.set_grad_enabled(train):
            y_TD = self.call(inputs)
        if train:
            y_TD.backward(inputs.grad_TD)
        return y_TD


class Dense(Contestant):
    """A SwiGLU layer of equal active FLOPs as people have it: three products of torch, gate and value apart."""

    exact = False

    def __init__(self, case: Case) -> None:
        F, D, dtype = case.K * case.F, case.D, DTYPES[case.dtype]
        gate, value = (torch.empty(F, D).normal_(0, 0.02).to(dtype).requires_grad_() for _ in range(2))
        down = torch.empty(D, F).normal_(0, 0.02).to(dtype).requires_grad_()

        def call(inputs: Inputs) -> Tensor:
            x = inputs.x_TD
            return linear(silu(linear(x, gate)) * linear(x, value), down)

        super().__init__("dense", call, [gate, value, down])


class OurDense(Contestant):
    """turnout's own layer of equal active FLOPs, whose products take this machine's fastest kernel."""

    exact = False

    def __init__(self, case: Case) -> None:
        layer = FeedForward(case.D, case.K * case.F).to(DTYPES[case.dtype])
        super().__init__("dense, ours", lambda inputs: layer(inputs.x_TD), list(layer.parameters()))


class Floor(Contestant):
    """The products of every expert alone, on rows already sorted, with the row counts and the batches of sort.

    It comes last in a round, so that sort pays for the kernels that oneDNN compiles for both.
    """

    exact, last = False, True

    def __init__(self, case: Case, bank: Bank) -> None:
        super().__init__("floor", lambda _: torch.empty(0), [])
        self.case, self.weights, self.rows = case, bank.weights(), 0
        self.up, self.down = self.weights.up_EDH.detach(), self.weights.down_EFD.detach()
        self.dup, self.ddown = torch.zeros_like(self.up), torch.zeros_like(self.down)
        self.plan: Any = None

    def prepare(self, inputs: Inputs) -> None:
        """Plans the products, and sees that there is memory for them."""
        routing = Routing.from_topk(inputs.index_TK, inputs.weight_TK.detach(), num_experts=self.case.E)
        self.plan = sort.plan_rows(routing, self.weights, inputs.x_TD.detach())
        if self.plan.rows > self.rows:
            self.rows, dtype = self.plan.rows + self.plan.rows // 8, self.up.dtype
            self.x, self.y, self.dx = (torch.randn(self.rows, self.case.D).to(dtype) for _ in range(3))
            self.h, self.a, self.da = (torch.randn(self.rows, n * self.case.F).to(dtype) for n in (2, 1, 1))

    @torch.no_grad()
    def run(self, inputs: Inputs, train: bool) -> Tensor:
        """The products of one step."""
        assert self.plan is not None, "prepare() comes first"
        for group in self.plan.groups:
            sort._products(group, self.x[group.rows], self.up, self.h[group.rows])
            sort._products(group, self.a[group.rows], self.down, self.y[group.rows])
        for group in self.plan.groups if train else ():
            sort._products(group, self.y[group.rows], self.down.transpose(1, 2), self.da[group.rows])
            sort._outer(group, self.a[group.rows], self.y[group.rows], self.ddown)
            sort._products(group, self.h[group.rows], self.up.transpose(1, 2), self.dx[group.rows])
            sort._outer(group, self.x[group.rows], self.h[group.rows], self.dup)
        return self.y


def of_turnout(case: Case, bank: Bank, name: str) -> Contestant:
    def call(inputs: Inputs) -> Tensor:
        routing = Routing.from_topk(inputs.index_TK, inputs.weight_TK, num_experts=case.E)
        return EXECUTORS[name](inputs.x_TD, routing, bank.weights())

    return Contestant(f"turnout {name}", call, list(bank.parameters()))


class Even(Contestant):
    """turnout's sort on evenly drawn experts beside a skewed case: what the bar for skew is measured against."""

    def __init__(self, case: Case, bank: Bank) -> None:
        sort = of_turnout(case, bank, "sort")
        super().__init__("turnout sort, even loads", sort.call, sort.parameters)
        self.case, self.turn = dataclasses.replace(case, skew=0.0), 0
        self.even = draw(self.case, seed=0)

    exact = False

    def prepare(self, inputs: Inputs) -> None:
        """Draws a decision with even loads."""
        self.turn += 1
        self.even = draw(self.case, seed=self.turn)
        super().prepare(self.even)

    def run(self, inputs: Inputs, train: bool) -> Tensor:
        """One step on them."""
        return super().run(self.even, train)
