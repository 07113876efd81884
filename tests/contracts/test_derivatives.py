"""What is differentiated twice, or by torch.func, is right: all executors, and everything whose gradient is our own."""

import ast
import dataclasses
import functools
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import turnout
from turnout.models import LM, LMConfig, MoEConfig, head_loss, token_loss
from turnout.models.fused import rms_norm, turn
from turnout.run import EXECUTORS, execute
from turnout.run.low_rank import low_rank, low_rank_reference
from turnout.run.product import linear
from turnout.run.shipped import has_onednn
from turnout.run.tuned import as_tuned, tuning
from turnout.types import ExpertWeights, Routing
from turnout.types.low_rank import LowRankWeights
from turnout.types.weights import GATED, Activation

# torch.func compiles some of its own rules in a way that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

SOURCES = Path(turnout.__file__).parent
INDEX_TK = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0]])  # nobody takes expert 2
TARGET = torch.tensor([1, -100, 3, 0])


def chance(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]), dim=-1)


def nats(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, TARGET, ignore_index=-100, reduction="sum")


ANGLES = chance(5, 3)
# By where the gradient is written: the function, what it is by torch's own operations, and its arguments.
CASES = {
    "run.product._Linear": (linear, F.linear, (chance(4, 3), chance(5, 3), chance(5))),
    "models.fused._Norm": (lambda x, w: rms_norm(x, w, 0.1), norm, (chance(4, 6), chance(6))),
    "models.fused._Turn": (turn, turned, (chance(1, 5, 2, 6), ANGLES.cos(), ANGLES.sin())),
    "models.fused._Loss": (lambda x: token_loss(x, TARGET), nats, (chance(4, 5),)),
    "models.head._HeadLoss": (
        lambda x, w: head_loss(x, w, TARGET),
        lambda x, w: nats(x @ w.t()),
        (chance(4, 3), chance(5, 3)),
    ),
}
# By test_executors_* below, and in Triton's interpreter by tests/run/interpreted_kernels.py.
ELSEWHERE = {"run.sort._Sort", "run.kernels.executor._Layer"}
# What passes a gradient on to other processes or to later: held against one process by the tests of its own room.
ELSEWHERE |= {"models.stages._Beside", "run.blocks.halves._PutOff"}
ELSEWHERE |= {"run.ranks.switch._Gathered", "run.ranks.expert_parallel._CopiesSummed"}


def test_every_gradient_of_our_own_is_here():
    found = set()
    for path in SOURCES.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "autograd" in text else ():
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Function") for base in node.bases):
                found.add(".".join(path.relative_to(SOURCES).with_suffix("").parts) + "." + node.name)
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
            assert name != "once_differentiable", f"{path}: it is silent where a second derivative is asked by inputs="
    assert found == set(CASES) | ELSEWHERE


@pytest.fixture(autouse=True)
def every_product_by_onednn():
    """So that the gradient of our own is taken at any size, wherever torch carries oneDNN."""
    least = 1 if has_onednn() else None
    with as_tuned(dataclasses.replace(tuning(), onednn=least, onednn_turned=least)):
        yield


def scalar(function, x, others):
    return function(x, *others).square().sum() + function(x, *others).sum()


def hessians(function, inputs: tuple[Tensor, ...], place: int, *, forward: bool = True) -> dict[str, Tensor]:
    """d2/dx2 of sum(f^2 + f) by all ways that torch has (without ``forward``, by reverse ones), x the input here."""

    def loss(x: Tensor) -> Tensor:
        made = function(*inputs[:place], x, *inputs[place + 1 :])
        return made.square().sum() + made.sum()

    x, along = inputs[place], torch.ones_like(inputs[place]).cumsum(-1)
    hessian = torch.autograd.functional.hessian
    size = x.numel()
    times = functools.partial(torch.einsum, "ij,j->i")
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    full = hessian(loss, x).reshape(size, size)
    ahead = {}
    if forward:
        by_forward = hessian(loss, x, vectorize=True, outer_jacobian_strategy="forward-mode")
        ahead = {"forward over reverse": by_forward.reshape(size, size)}
        ahead["torch.func"] = torch.func.hessian(loss)(x).reshape(size, size)
        ahead["jvp of grad"] = torch.func.jvp(torch.func.grad(loss), (x,), (along,))[1].flatten()
        ahead["jvp of grad"] -= times(full, along.flatten())
    return ahead | {
        "hessian": full,
        "vectorized": hessian(loss, x, vectorize=True).reshape(size, size),
        "hvp": torch.autograd.functional.hvp(loss, x, along)[1].flatten() - times(full, along.flatten()),
        "vhp": torch.autograd.functional.vhp(loss, x, along)[1].flatten() - times(full, along.flatten()),
        "create_graph": torch.autograd.grad((slope * along).sum(), leaf)[0].flatten() - times(full, along.flatten()),
    }


def agree(ours: dict[str, Tensor], wanted: Tensor, tolerance: float) -> None:
    scale = float(wanted.abs().max())
    assert scale > 0
    for name, found in ours.items():
        right = wanted if found.shape == wanted.shape else torch.zeros(found.shape, dtype=wanted.dtype)
        torch.testing.assert_close(found.to(wanted.dtype), right, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name):
    ours, theirs, inputs = CASES[name]
    for place in range(len(inputs)):
        want = hessians(theirs, inputs, place)["hessian"]
        agree(hessians(ours, tuple(one.float() for one in inputs), place), want, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_mixed_derivatives_by_backward(name):
    """As a step of training through a step of training: all leaves, no ``inputs=``."""
    ours, theirs, inputs = CASES[name]
    slopes = []
    for function, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        leaves = [one.to(dtype, copy=True).requires_grad_() for one in inputs]
        first = torch.autograd.grad(scalar(function, leaves[0], leaves[1:]), leaves, create_graph=True)
        sum(slope.square().sum() for slope in first).backward()
        slopes.append([leaf.grad for leaf in leaves])
    for found, right in zip(*slopes, strict=True):
        agree({name: found}, right, 1e-4)


def experts(activation: str, bias: bool, interleaved: bool, dtype: torch.dtype):
    D, hidden, E = 8, 8, 4
    H = 2 * hidden if activation in GATED else hidden
    tensors = [chance(5, D), chance(5, 2), chance(E, D, H), chance(E, hidden, D)]
    tensors += [chance(E, H), chance(E, D)] if bias else []
    tensors = [0.5 * one.to(dtype) for one in tensors]

    def run(backend: str, x_TD: Tensor, weight_TK: Tensor, up: Tensor, *rest: Tensor) -> Tensor:
        routing = Routing.from_topk(INDEX_TK, weight_TK, num_experts=E)
        weights = ExpertWeights(up, *rest, activation=typing.cast(Activation, activation), interleaved=interleaved)
        return execute(x_TD, routing, weights, backend=backend)

    return run, tuple(tensors)


KINDS = [(one, one in GATED, False) for one in typing.get_args(Activation)] + [("swiglu", False, True)]


@pytest.mark.parametrize("backend", [name for name in EXECUTORS if name != "reference"] + ["auto"])
@pytest.mark.parametrize(("activation", "bias", "interleaved"), KINDS)
def test_executors_differentiate_twice(backend, activation, bias, interleaved):
    dtype = torch.float32 if backend == "grouped" else torch.float64
    run, inputs = experts(activation, bias, interleaved, dtype)
    _, exact = experts(activation, bias, interleaved, torch.float64)
    for place in range(2):  # the tokens and the combine weights
        want = hessians(functools.partial(run, "reference"), exact, place)["hessian"]
        agree(hessians(functools.partial(run, backend), inputs, place), want, 1e-4 if backend == "grouped" else 1e-10)
    slopes = []
    for name, given in ((backend, inputs), ("reference", exact)):
        leaves = [one.clone().requires_grad_() for one in given]
        first = torch.autograd.grad(run(name, *leaves).square().sum(), leaves, create_graph=True)
        sum(slope.square().sum() for slope in first).backward()
        slopes.append([leaf.grad for leaf in leaves])
    for found, right in zip(*slopes, strict=True):
        agree({"all": found}, right, 1e-4 if backend == "grouped" else 1e-10)


def test_torchs_own_check():
    run, inputs = experts("swiglu", True, False, torch.float64)
    leaves = tuple(one.clone().requires_grad_() for one in inputs)
    assert torch.autograd.gradgradcheck(functools.partial(run, "sort"), leaves, fast_mode=True)


def test_the_same_tensor_twice_has_a_gradient_in_each_place():
    for backend in ("reference", "sort"):
        x = chance(4, 6).requires_grad_()
        stack = chance(3, 6, 6, seed=1).requires_grad_()
        routing = Routing.from_topk(torch.tensor([[0], [1], [2], [0]]), torch.ones(4, 1), num_experts=3)
        y = execute(x, routing, ExpertWeights(stack, stack, activation="gelu"), backend=backend)
        (slope,) = torch.autograd.grad(y.square().sum(), stack, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), stack)
        wanted = (slope.detach(), second) if backend == "reference" else wanted  # noqa: F821
    torch.testing.assert_close(slope.detach(), wanted[0])
    torch.testing.assert_close(second, wanted[1])


def test_no_entry_has_zero_derivatives():
    x, none = chance(3, 4).requires_grad_(), torch.zeros(3, 2, dtype=torch.float64)
    weights = ExpertWeights(chance(2, 4, 8).requires_grad_(), chance(2, 4, 4))
    y = execute(x, Routing.from_dense(none), weights, backend="sort")
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(slope, torch.zeros_like(x))


def test_low_rank_maps():
    for few in (True, False):
        weights = LowRankWeights(chance(4, 3), chance(4, 5), (0, 2, 4), (2.0, 0.5))
        index = torch.zeros(6, 1, dtype=torch.long) if few else torch.tensor([[0, 1]]).expand(6, 2)

        def run(function, x, weight):
            return function(x, Routing.from_topk(index, weight, num_experts=2), weights)  # noqa: B023

        inputs = chance(6, 3), chance(6, index.shape[1])
        for place in range(2):
            want = hessians(functools.partial(run, low_rank_reference), inputs, place, forward=False)["hessian"]
            agree(hessians(functools.partial(run, low_rank), inputs, place), want, 1e-10)


def test_a_language_model_has_the_curvature_that_differences_show():
    config = LMConfig(
        vocab_size=11, layers=2, width=16, heads=2, hidden=24, max_seq=8, moe=MoEConfig(4, top_k=2, hidden=12)
    )
    torch.manual_seed(0)
    lm = LM(config)
    id_BS = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
    leaves = [p for p in lm.parameters() if p.requires_grad]
    directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * p.detach().abs() for p in leaves]

    def slope(graph: bool) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            nats = lm.loss(id_BS[:, :-1], id_BS[:, 1:]).nats
        grads = torch.autograd.grad(nats, leaves, create_graph=graph, allow_unused=True)
        return sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)

    found = torch.autograd.grad(slope(True), leaves, allow_unused=True)
    curvature = float(sum((g * d).sum() for g, d in zip(found, directions, strict=True) if g is not None))
    ends = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for p, d in zip(leaves, directions, strict=True):
                p.add_(d, alpha=step)
        ends.append(float(slope(False)))
    assert curvature == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.05)
    assert abs(curvature) > 1e-3
