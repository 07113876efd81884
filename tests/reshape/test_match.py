"""Which models go together: the first difference is named, with what would help."""

import pytest
import torch
from torch import nn

from turnout.errors import ShapeError, UsageError
from turnout.reshape.many_to_one.match import blend, combine, matched, shares, tensors


def net(width: int = 3, **kind) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width, **kind), nn.BatchNorm1d(width, **kind))


def message(*models, error=UsageError) -> str:
    with pytest.raises(error) as caught:
        matched(models, "here")
    return str(caught.value)


def test_the_first_name_that_differs_is_told_with_the_fix() -> None:
    assert "model 1 must have '0.bias', as model 0 has in here" in message(net(), nn.Sequential(nn.Linear(2, 3, False)))
    wrapped = nn.Module()
    wrapped.module = net()
    assert "unwrap model 1: its names begin with 'module.'" in message(net(), wrapped)
    assert "unwrap model 0: its names begin with 'module.'" in message(wrapped, net())
    more = net()
    more.append(nn.Linear(1, 1))
    assert "model 0 must have '2.weight', as model 1 has" in message(net(), more)


def test_shapes_and_dtypes_too() -> None:
    text = message(net(), net(), net(4), error=ShapeError)
    assert "'0.weight' of model 2" in text and "(3, 2)" in text and "(4, 2)" in text
    assert "convert model 1 with .to(torch.float32)" in message(net(), net().half())
    assert "load the weights first" in message(net(), net(device="meta"))


def test_what_is_not_a_sequence_of_models_is_refused() -> None:
    assert "0 of them" in message()
    assert "a dict" in message(net(), {})


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]])
def test_weights_that_give_no_mean_are_refused(weights) -> None:
    with pytest.raises(UsageError):
        shares(weights, 2, "here")


def test_shares_have_sum_one() -> None:
    assert shares(None, 4, "here") == [0.25] * 4
    assert shares([3, 1], 2, "here") == [0.75, 0.25]


def test_a_combination_of_equal_tensors_is_the_tensor_in_float64_as_well() -> None:
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(combine([x, x, x], [0.1, 0.2, 0.7]), x)
    assert torch.equal(combine([x, other], [0.0, 1.0]), other)
    torch.testing.assert_close(combine([x, other], [0.25, 0.75]), 0.25 * x + 0.75 * other)


def test_buffers_go_along_and_those_of_whole_numbers_are_told() -> None:
    a, b = net(), net()
    a[1].running_mean += 2
    b[1].num_batches_tracked += 5
    new, values, notes = blend([a, b], lambda _, found: combine(found, [0.5, 0.5]), "here")
    assert torch.equal(new[1].running_mean, torch.ones(3))
    assert new[1].num_batches_tracked == 0
    assert any("num_batches_tracked" in note for note in notes)
    assert any("running_mean is merged" in note for note in notes)
    assert values["equal_tensors"] + values["merged_tensors"] == len(tensors(a))


def test_infinite_weights_and_a_result_that_does_not_fit_are_refused() -> None:
    a, b = net(), net()
    with torch.no_grad():
        b[0].weight[1, 1] = float("inf")
    with pytest.raises(UsageError, match=r"'0.weight' of model 1 must be finite"):
        blend([a, b], lambda _, found: found[0], "here")
    with pytest.raises(UsageError, match=r"fit torch.float16"):
        blend([net().half(), net().half()], lambda _, found: found[0] + 1e6, "here")


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    new, _, _ = blend([Tied(), Tied()], lambda _, found: (found[0] + found[1]) / 2, "here")
    assert new.b.weight is new.a.weight
    assert "a.weight" in tensors(new) and "b.weight" not in tensors(new)
