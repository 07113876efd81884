"""What the surrogate says is what autograd does, the features are the kernel, and each part does its own thing."""

import math

import pytest
import torch
from torch import Tensor

from turnout.errors import ShapeError, TrainingError, UsageError
from turnout.train.zeroth import FZooS, features, fedzo, surrogate
from turnout.train.zeroth import fzoos as solve_fzoos

HOW = {"rate": 0.1, "length": 2.0, "local_steps": 3, "active": 2, "shared_active": 8, "candidates": 20,
       "num_features": 60}  # fmt: skip


def fzoos(functions, start, *, rounds, seed=0, **how):
    return solve_fzoos(functions, start, FZooS(**how), rounds=rounds, seed=seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bowls(clients: int = 3, width: int = 4):
    """Quadratics with curvatures and centres of their own."""
    bent, at = 0.2 + drawn(clients, width).square(), drawn(clients, width, seed=1)
    return [lambda x, b=b, a=a: b @ (x - a).square() for b, a in zip(bent, at, strict=True)], (bent * at).sum(
        0
    ) / bent.sum(0)


def posterior(points: Tensor, values: Tensor, length: float, noise: float):
    """Slow and obvious: kernel entry by entry, and a solve."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a - b).square().sum() / (2 * length**2))

    def gram(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([torch.stack([k(x, y) for y in b]) for x in a])

    whole = gram(points, points) + noise * torch.eye(len(points), dtype=torch.float64)
    centred = values - values.mean()

    def mean(x: Tensor) -> Tensor:
        return values.mean() + gram(x[None], points)[0] @ torch.linalg.solve(whole, centred)

    def covariance(x: Tensor, y: Tensor) -> Tensor:
        return k(x, y) - gram(x[None], points)[0] @ torch.linalg.solve(whole, gram(points, y[None]))[:, 0]

    return mean, covariance


@pytest.mark.parametrize("count, width, length", [(1, 2, 1.0), (7, 3, 0.7), (12, 5, 3.0)])
def test_gradient_and_doubt_are_the_derivatives_of_the_posterior(count, width, length):
    points, values, x = drawn(count, width), drawn(count, seed=1), drawn(width, seed=2)
    near = surrogate(points, values, length=length, noise=1e-3)
    mean, covariance = posterior(points, values, length, 1e-3)
    torch.testing.assert_close(near.mean(x), mean(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(near.gradient(x), torch.func.grad(mean)(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(near.gradient(x), torch.func.grad(near.mean)(x), rtol=1e-8, atol=1e-8)
    both = torch.func.jacrev(torch.func.grad(covariance, argnums=0), argnums=1)(x, x)
    torch.testing.assert_close(near.doubt(x[None])[0], both.trace(), rtol=1e-6, atol=1e-8)


def test_doubt_is_least_where_it_was_asked():
    around = 0.01 * drawn(40, 3)
    near = surrogate(around, drawn(40, seed=1), length=1.0)
    here, far = near.doubt(torch.stack((torch.zeros(3), 5 * torch.ones(3))).double())
    assert 0 <= here < 0.5 < far <= 3.0 + 1e-9


def test_far_from_the_origin_nothing_is_lost():
    points, values = drawn(10, 3), drawn(10, seed=1)
    one, other = (surrogate(points + by, values, length=1.0) for by in (0.0, 1e6))
    at = drawn(3, seed=2)
    torch.testing.assert_close(one.gradient(at), other.gradient(at + 1e6), rtol=1e-2, atol=1e-4)


def test_features_are_the_kernel_and_more_are_nearer():
    x, y = drawn(5, 4), drawn(6, 4, seed=1)
    kernel = torch.exp(-torch.cdist(x, y).square() / (2 * 1.5**2))
    worst = [
        float((phi(x) @ phi(y).T - kernel).abs().max()) for phi in (features(4, m, length=1.5) for m in (100, 40000))
    ]
    assert worst[1] < 0.03 < worst[0], worst


def test_weights_in_features_are_the_surrogate_and_their_gradient_is_autograd():
    points, values, x = drawn(12, 3), drawn(12, seed=1), drawn(3, seed=2)
    phi = features(3, 30_000, length=2.0)
    weight = phi.weights(points, values, noise=0.1)
    slope = phi.gradient(weight, x)
    torch.testing.assert_close(slope, torch.func.grad(lambda z: phi(z[None])[0] @ weight)(x), rtol=1e-9, atol=1e-9)
    exact = surrogate(points, values, length=2.0, noise=0.1).gradient(x)
    assert (slope - exact).norm() < 0.05 * exact.norm()


def test_without_correction_clients_descend_their_own_surrogates_and_the_server_averages():
    functions, _ = bowls()
    start = torch.zeros(4, dtype=torch.float64)
    run = fzoos(functions, start, rounds=2, correction=0.0, **(HOW | {"active": 0, "shared_active": 0}))
    server = start
    asked = [[start] for _ in functions]
    for _ in range(2):
        ends = []
        for function, points in zip(functions, asked, strict=True):
            x = server
            for _ in range(HOW["local_steps"]):
                said = torch.stack([function(point) for point in points])
                x = x - HOW["rate"] * surrogate(torch.stack(points), said, length=HOW["length"]).gradient(x)
                points.append(x)
            ends.append(x)
        server = torch.stack(ends).mean(0)
        for points in asked:
            points.append(server)
    torch.testing.assert_close(run.x_RD[-1], server, rtol=1e-7, atol=1e-9)
    assert run.queries_R[-1] == sum(map(len, asked)) and run.sent_R == (0, 24, 48)


def test_correction_starts_after_the_first_round_and_is_sent():
    functions, _ = bowls()
    on, off = (fzoos(functions, torch.zeros(4), rounds=3, correction=each, **HOW) for each in (1.0, 0.0))
    assert torch.equal(on.x_RD[:2], off.x_RD[:2]) and not torch.equal(on.x_RD[2], off.x_RD[2])
    assert on.queries_R == off.queries_R == tuple(3 * (9 + r * (3 + 2 * 2 + 9)) for r in range(4))
    assert on.sent_R[-1] == 3 * 2 * 3 * (4 + 60) and off.sent_R[-1] == 3 * 2 * 3 * 4


def test_alike_clients_need_no_correction():
    functions = [bowls(1)[0][0]] * 3
    how = HOW | {"active": 0, "shared_active": 0}
    on, off = (fzoos(functions, torch.zeros(4), rounds=4, correction=each, **how) for each in (1.0, 0.0))
    torch.testing.assert_close(on.x_RD, off.x_RD)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_is_the_same_run_and_the_start_is_left_as_it_was(seed):
    functions, _ = bowls()
    start = torch.zeros(4)
    for solve in (
        lambda s: fzoos(functions, start, rounds=2, seed=s, **HOW),
        lambda s: fedzo(functions, start, rounds=2, rate=0.1, directions=2, seed=s),
    ):
        one, again, other = solve(seed), solve(seed), solve(seed + 7)
        assert torch.equal(one.x_RD, again.x_RD) and not torch.equal(one.x_RD, other.x_RD)
        assert one.x_RD.dtype == torch.float64 and torch.equal(start, torch.zeros(4))


def test_both_find_the_least_of_the_mean_and_correction_is_nearer_to_it():
    functions, least = bowls()
    how = HOW | {"local_steps": 10, "num_features": 200, "nearest": 60}
    far = {
        each: float(
            (fzoos(functions, torch.zeros(4), rounds=8, correction=each, decay=0.0, **how).x_RD[-1] - least).norm()
        )
        for each in (0.0, 1.0)
    }
    plain, scaffold, prox = (
        float((fedzo(functions, torch.zeros(4), rounds=25, rate=0.1, directions=4, radius=1e-4, correction=kind,
                     strength=strength).x_RD[-1] - least).norm())
        for kind, strength in (("none", 1.0), ("scaffold", 1.0), ("prox", 2.0))
    )  # fmt: skip
    assert far[1.0] < 0.2 * far[0.0] and scaffold < 0.2 * plain and prox < plain, (far, plain, scaffold, prox)


def test_with_all_directions_differences_are_the_gradient():
    functions, _ = bowls(1)
    run = fedzo(functions, torch.zeros(4), rounds=1, rate=0.1, local_steps=1, directions=4, radius=1e-6)
    slope = torch.func.grad(functions[0])(torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(run.x_RD[1], -0.1 * slope, rtol=1e-4, atol=1e-5)
    assert run.queries_R == (0, 5) and run.sent_R == (0, 8)


@pytest.mark.parametrize(
    "wrong", [{"rate": 0.0}, {"length": -1.0}, {"active": 21}, {"correction": -1.0}, {"memory": 0}]
)
def test_settings_out_of_range_are_told(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        fzoos(bowls()[0], torch.zeros(4), rounds=1, **(HOW | wrong))


@pytest.mark.parametrize("wrong", [{"rate": -1.0}, {"directions": 5}, {"correction": "adam"}, {"radius": 0.0}])
def test_settings_of_the_baseline_are_told_too(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        fedzo(bowls()[0], torch.zeros(4), rounds=1, **({"rate": 0.1, "directions": 2} | wrong))


def test_what_is_no_number_or_does_not_fit_is_refused():
    with pytest.raises(TrainingError, match="client 0"):
        fzoos([lambda x: math.nan], torch.zeros(4), rounds=1, **HOW)
    with pytest.raises(TrainingError, match="client 0 in round 0"):
        fedzo([lambda x: math.inf], torch.zeros(4), rounds=1, rate=0.1, directions=1)
    with pytest.raises(ShapeError, match="points and values"):
        surrogate(drawn(3, 2), drawn(2), length=1.0)
    with pytest.raises(UsageError, match="noise"):
        features(2, 5, length=1.0).weights(drawn(3, 2), drawn(3), noise=0.0)
    with pytest.raises(UsageError, match="count=0"):
        features(2, 0, length=1.0)
    with pytest.raises(UsageError, match="functions"):
        fzoos("f", torch.zeros(4), rounds=1, **HOW)
    with pytest.raises(UsageError, match="0 functions"):
        fzoos([], torch.zeros(4), rounds=1, **HOW)
