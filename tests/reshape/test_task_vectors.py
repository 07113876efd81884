"""Task arithmetic: sums and negations by hand, and its limits, which are other methods."""

import pytest
import torch
from small import make
from torch import nn

from turnout.errors import UsageError
from turnout.reshape import average, task_vectors


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


@pytest.mark.parametrize("scales", [0.3, [0.3, -1.5], [0.0, 1.0]])
def test_by_hand(scales) -> None:
    start, a, b = make(0), make(1), make(2)
    new, report = task_vectors(start, [a, b], scales=scales)
    one, two = (scales, scales) if isinstance(scales, float) else scales
    want = flat(start) + one * (flat(a) - flat(start)) + two * (flat(b) - flat(start))
    torch.testing.assert_close(flat(new), want, rtol=1e-6, atol=1e-7)
    assert report["scales"] == [one, two]
    assert report["lengths"] == pytest.approx([float((flat(m) - flat(start)).norm()) for m in (a, b)])
    cosine = torch.cosine_similarity(flat(a) - flat(start), flat(b) - flat(start), dim=0)
    assert report["cosines"][0][1] == report["cosines"][1][0] == pytest.approx(float(cosine))
    assert report["cosines"][0][0] == pytest.approx(1.0)


def test_a_scale_of_zero_is_the_start_to_the_bit_and_one_is_the_tuned() -> None:
    start, tuned = make(0), make(1)
    assert torch.equal(flat(task_vectors(start, [tuned], scales=0.0)[0]), flat(start))
    assert torch.equal(flat(task_vectors(start, [tuned], scales=1.0)[0]), flat(tuned))


def test_one_over_n_is_the_average() -> None:
    start, tuned = make(0), [make(1), make(2)]
    new, mean = task_vectors(start, tuned, scales=0.5)[0], average(tuned)[0]
    torch.testing.assert_close(flat(new), flat(mean), rtol=1e-6, atol=1e-7)


def test_an_addition_taken_away_again_leaves_the_start() -> None:
    start, tuned = make(0), make(1)
    new, _ = task_vectors(start, [tuned, tuned], scales=[0.7, -0.7])
    torch.testing.assert_close(flat(new), flat(start), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scales", [float("nan"), [1.0], [1.0, 1.0, 1.0], [1.0, float("inf")]])
def test_scales_that_do_not_fit_are_refused(scales) -> None:
    with pytest.raises(UsageError, match="scales must be one finite number, or 2"):
        task_vectors(make(0), [make(1), make(2)], scales=scales)


def test_no_tuned_model_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        task_vectors(make(0), [])
