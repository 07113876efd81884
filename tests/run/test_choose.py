"""The choice of an executor, its reasons, and the refit of its constants."""

import contextlib
import dataclasses

import pytest
import torch

from turnout.errors import UnknownNameError
from turnout.run import EXECUTORS, choose, execute
from turnout.run.calibrate import _fit
from turnout.run.tuned import as_tuned, tuning
from turnout.types import ExpertWeights, Routing


@pytest.fixture
def measured():
    """Sets what the executors cost."""
    with contextlib.ExitStack() as stack:

        def costs(**seconds):
            seconds = {"cpu float32 forward": {name: tuple(map(float, each)) for name, each in seconds.items()}}
            stack.enter_context(as_tuned(dataclasses.replace(tuning(), seconds=seconds)))

        yield costs


def case(dtype=torch.float32, device="cpu", tokens=17):
    weights = ExpertWeights(
        torch.ones(2, 8, 32, dtype=dtype, device=device), torch.ones(2, 16, 8, dtype=dtype, device=device)
    )
    routing = Routing.from_topk(torch.ones(tokens, 1).long(), torch.full((tokens, 1), 0.5), num_experts=2)
    return torch.ones(tokens, 8, dtype=dtype, device=device), routing, weights


def test_says_why(measured):
    choice = choose(*case())
    assert choice.name in EXECUTORS
    assert choice.reasons and all(isinstance(reason, str) for reason in choice.reasons)


def test_takes_the_cheapest_by_this_machines_constants(measured):
    measured(sort=[2.0, 0, 0, 0], grouped=[1.0, 0, 0, 0])
    choice = choose(*case())
    assert choice.name == "grouped"
    assert any("grouped would take 1e+03 ms" in reason for reason in choice.reasons)
    assert any("T=17, R=17, E=2" in reason for reason in choice.reasons)


def test_sort_wins_when_it_is_close_and_where_grouped_would_pad(measured):
    measured(sort=[1.2, 0, 0, 0], grouped=[1.0, 0, 0, 0])
    assert choose(*case()).name == "sort"
    measured(sort=[9.0, 0, 0, 0], grouped=[1.0, 0, 0, 0])
    odd = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 2, 3))
    assert choose(torch.ones(17, 3), case()[1], odd).name == "sort"


def test_few_tokens_go_to_sort_whatever_was_measured(measured):
    measured(sort=[2.0, 0, 0, 0], grouped=[1.0, 0, 0, 0])
    choice = choose(*case(tokens=2))
    assert choice.name == "sort" and "T=2 without gradients" in choice.reasons
    torch.testing.assert_close(execute(*case(tokens=2)), execute(*case(tokens=2), backend="reference"))


def test_double_precision_never_goes_to_a_product_that_lacks_it(measured):
    assert choose(*case(dtype=torch.float64)).name == "sort"


def test_choice_can_be_overridden(measured):
    measured(sort=[1.0, 0, 0, 0], grouped=[2.0, 0, 0, 0])
    expected = execute(*case(), backend="reference")
    for name in [*EXECUTORS, "auto"]:
        torch.testing.assert_close(execute(*case(), backend=name), expected)
    with pytest.raises(UnknownNameError, match="Did you mean 'grouped'"):
        execute(*case(), backend="group")


def test_fit_finds_the_constants_it_was_made_from():
    rows = [(1.0, e, m * 1e6, n * 1e3) for e, m, n in [(2, 1, 5), (8, 2, 1), (64, 3, 9), (4, 40, 7), (1, 9, 80)]]
    values = [sum(a * b for a, b in zip((1e-4, 2e-5, 1e-11, 3e-9), row, strict=True)) for row in rows]
    assert _fit(rows, values) == pytest.approx([1e-4, 2e-5, 1e-11, 3e-9], rel=1e-3)
    assert min(_fit(rows, [1.0 / (1 + i) for i in range(5)])) >= 0
