"""The average: worked by hand, exact for equal models, and refused where it has no meaning."""

import pytest
import torch
from small import ids, make, sparse
from torch import nn

from turnout.errors import UsageError
from turnout.reshape import average


def linear(value: float, dtype=torch.float32) -> nn.Linear:
    layer = nn.Linear(2, 2, dtype=dtype)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def test_by_hand() -> None:
    new, report = average([linear(1.0), linear(2.0), linear(6.0)], weights=[1, 2, 1])
    assert all((p == 2.75).all() for p in new.parameters())
    assert report["shares"] == [0.25, 0.5, 0.25]
    assert report["relative_distances"] == pytest.approx([1.75, 0.375, 3.25 / 6])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equal_weights_of_one_model_are_that_model_to_the_bit(dtype) -> None:
    lm = sparse().to(dtype)
    other = sparse(seed=7).to(dtype)
    for count in (1, 2, 3, 7):
        new, _ = average([lm] * count)
        assert all(torch.equal(a, b) for a, b in zip(new.parameters(), lm.parameters(), strict=True)), count
    new, _ = average([lm, other, lm], weights=[0, 3, 0])
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), other.parameters(), strict=True))


def test_it_is_rounded_once() -> None:
    models = [linear(1.0, torch.bfloat16), linear(1 + 2**-7, torch.bfloat16), linear(1.0, torch.bfloat16)]
    total = sum(m.weight[0, 0].item() for m in models) / 3
    assert average(models)[0].weight[0, 0].item() == float(torch.tensor(total, dtype=torch.bfloat16))


def test_the_order_of_equal_weights_does_not_matter() -> None:
    models = [make(seed) for seed in range(3)]
    first, second = average(models)[0], average(models[::-1])[0]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1.3e-7, atol=1e-9)


def test_the_result_still_runs_and_carries_no_gradient() -> None:
    a, b = make(0), make(1)
    a(ids()).logits_BSV.sum().backward()
    new, _ = average([a, b])
    assert all(p.grad is None and p.requires_grad for p in new.parameters())
    assert new(ids()).logits_BSV.isfinite().all()
    assert not torch.equal(new(ids()).logits_BSV, a(ids()).logits_BSV)


def test_negative_weights_point_to_task_vectors() -> None:
    with pytest.raises(UsageError, match="task_vectors"):
        average([linear(1.0), linear(2.0)], weights=[2, -1])
