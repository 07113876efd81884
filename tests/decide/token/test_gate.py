import math

import pytest
import torch

from turnout.decide.token.gate import capacity, draw, largest, linear, softmax


def slow_largest(score_TE: torch.Tensor, k: int) -> list[list[int]]:
    """The obvious way: Python's own stable sort."""
    return [sorted(range(len(row)), key=lambda e: -row[e])[:k] for row in score_TE.tolist()]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 3), (40, 64), (7, 300), (2000, 1)])
@pytest.mark.parametrize("kind", ["normal", "coarse", "zeros", "tiny", "huge"])
def test_largest_is_a_stable_sort(shape, kind):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        score_TE = torch.randn(shape, generator=generator)
        if kind == "coarse":
            score_TE = score_TE.round()  # many ties, and zeros of both signs
        elif kind == "zeros":
            score_TE = score_TE * 0
        elif kind == "tiny":
            score_TE = score_TE * 1e-42
        elif kind == "huge":
            score_TE = (score_TE * 1e38).clamp(-3e38, 3e38)
        for k in {1, min(2, shape[1]), shape[1]}:
            assert largest(score_TE, k).tolist() == slow_largest(score_TE, k), (seed, k)


@pytest.mark.parametrize("count", [4, 400])
def test_largest_takes_masked_scores_last(count):
    score_TE = torch.full((count, 6), float("-inf"))
    score_TE[:, 4], score_TE[:, 2] = -5.0, float("inf")
    assert largest(score_TE, 3).tolist() == [[2, 4, 0]] * count


@pytest.mark.parametrize("count", [4, 400])
def test_largest_never_repeats_a_position_even_for_nan(count):
    score_TE = torch.full((count, 6), float("nan"))
    assert largest(score_TE, 6).sort(1)[0].tolist() == [list(range(6))] * count


def test_largest_takes_columns_and_fp64():
    score_TE = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    assert largest(score_TE.t(), 4).tolist() == slow_largest(score_TE.t(), 4)
    assert torch.equal(largest(score_TE.double(), 4), largest(score_TE, 4))
    before = score_TE.clone()
    largest(score_TE, 4)
    assert torch.equal(score_TE, before)


@pytest.mark.parametrize("num_experts", [1, 2, 15, 16, 40])
def test_softmax_is_the_softmax(num_experts):
    logit_TE = torch.randn(33, num_experts, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(softmax(logit_TE), logit_TE.softmax(1))


def test_linear_keeps_fp64_and_widens_the_rest():
    x_TD, weight_ED = torch.ones(2, 3), torch.ones(4, 3)
    assert linear(x_TD.bfloat16(), weight_ED.bfloat16()).dtype == torch.float32
    assert linear(x_TD.double(), weight_ED).dtype == torch.float32
    assert linear(x_TD, weight_ED.double()).dtype == torch.float64
    # 1 + 2^-10 is not a bf16 number: products in bf16 would lose it.
    exact = linear(torch.tensor([[1.0, 2**-10]]), torch.ones(1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(torch.tensor([[1.0, 2**-10]]), torch.ones(1, 2)), exact)
    assert exact.item() == 1 + 2**-10


def test_capacity_formula():
    assert capacity(10, 4, 2, 1.0) == 5
    assert capacity(10, 4, 2, 1.25) == math.ceil(6.25) == 7
    assert capacity(1, 64, 1, 1.0) == capacity(0, 4, 1, 1.0) == 1


def test_draw_takes_the_shape_and_the_generator():
    like = torch.zeros(3, 2, dtype=torch.float64)
    one, two = (draw(torch.rand, like, torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.shape == (3, 2) and one.dtype == torch.float64 and torch.equal(one, two)
