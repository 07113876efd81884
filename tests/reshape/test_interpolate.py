"""The line between two models: its ends to the bit, its middle, and the barrier of a known landscape."""

import pytest
import torch
from small import make
from torch import nn

from turnout.errors import UsageError
from turnout.reshape import average, interpolate, interpolation_path


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def point(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_the_ends_are_the_models_to_the_bit_and_the_middle_is_the_average() -> None:
    first, second = make(0).double(), make(1).double()
    assert torch.equal(flat(interpolate(first, second, position=0)[0]), flat(first))
    assert torch.equal(flat(interpolate(first, second, position=1)[0]), flat(second))
    assert torch.equal(flat(interpolate(first, second)[0]), flat(average([first, second])[0]))
    new, report = interpolate(first, second, position=0.25)
    torch.testing.assert_close(flat(new), 0.75 * flat(first) + 0.25 * flat(second))
    gap = [float((flat(new) - flat(m)).norm() / flat(m).norm()) for m in (first, second)]
    assert report["relative_distances"] == pytest.approx(gap)


def test_the_barrier_is_the_height_over_the_line_between_the_ends() -> None:
    # Losses 0 and 2 at the ends, and a hill of 1 in the middle: (alpha = 0.5) is 2 against 1 on the line.
    best, report = interpolation_path(
        point(0.0), point(1.0), lambda m: 2 * float(m.weight) + 4 * float(m.weight * (1 - m.weight)), positions=5
    )
    assert report["barrier"] == pytest.approx(1.0)
    assert report["barrier_position"] == 0.5
    assert report["best_position"] == 0 and best.weight.item() == 0
    assert report["losses"] == pytest.approx([0, 1.25, 2, 2.25, 2])


def test_a_convex_loss_has_no_barrier_and_its_best_point_is_inside() -> None:
    best, report = interpolation_path(point(-1.0), point(3.0), lambda m: float(m.weight.square()), positions=9)
    assert report["barrier"] == 0 and best.weight.item() == 0 and report["best_position"] == 0.25


def test_the_ends_are_measured_even_when_they_are_not_asked_for() -> None:
    _, report = interpolation_path(point(0.0), point(1.0), lambda m: float(m.weight), positions=[0.3])
    assert (report["loss_first"], report["loss_second"]) == (0.0, 1.0)
    assert report["positions"] == [0.3] and report["barrier"] == pytest.approx(0, abs=1e-7)


def test_the_loss_sees_a_model_in_evaluation_mode_and_the_result_has_the_mode_of_the_first() -> None:
    seen = []
    first = make(0).train()
    best, _ = interpolation_path(first, make(1), lambda m: float(seen.append(m.training) or 0.0), positions=3)
    assert seen == [False] * 3 and best.training and first.training


@pytest.mark.parametrize("position", [-0.1, 1.5, float("nan")])
def test_beyond_the_ends_is_refused_with_what_goes_there(position) -> None:
    with pytest.raises(UsageError, match=r"\[0, 1\].*task_vectors"):
        interpolate(point(0.0), point(1.0), position=position)


def test_too_few_points_and_a_loss_that_is_not_a_number_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        interpolation_path(point(0.0), point(1.0), lambda m: 0.0, positions=1)
    with pytest.raises(UsageError, match=r"loss at 0\.5"):
        interpolation_path(point(0.0), point(1.0), lambda m: float("nan"), positions=[0.5])
