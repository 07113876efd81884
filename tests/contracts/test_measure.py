"""Every meter is documented with its source and an example, and never changes what it is given."""

import doctest
import inspect

import pytest
import torch

from turnout import measure

LOAD_METERS = ("max_vio", "entropy", "coefficient_of_variation", "dead_experts")


@pytest.mark.parametrize("name", measure.__all__)
def test_it_says_where_it_comes_from_and_shows_itself(name: str) -> None:
    doc = inspect.getdoc(getattr(measure, name)) or ""
    assert "Source:" in doc
    assert ">>>" in doc


@pytest.mark.parametrize("name", measure.__all__)
def test_its_example_runs(name: str) -> None:
    item = getattr(measure, name)
    module = inspect.getmodule(item)
    examples = doctest.DocTestFinder(recurse=False).find(item, name, globs=dict(vars(module)))
    for example in examples:
        result = doctest.DocTestRunner().run(example)
        assert result.attempted and not result.failed


@pytest.mark.parametrize("name", LOAD_METERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bfloat16, torch.float64])
def test_load_meters_take_any_dtype_do_not_care_for_scale_or_order_and_leave_their_input(name, dtype) -> None:
    meter = getattr(measure, name)
    load_E = torch.tensor([4, 0, 2, 8, 2], dtype=dtype)
    before = load_E.clone()
    found = meter(load_E)
    assert torch.equal(load_E, before)
    assert meter(load_E * 4) == pytest.approx(found)
    if name != "dead_experts":
        assert meter(load_E.flip(0)) == pytest.approx(found)
        assert isinstance(found, float)
