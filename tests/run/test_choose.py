"""The choice of an executor, its reasons, and the refit of its constants."""

import json
import os

import pytest
import torch

from turnout.errors import StorageError, UnknownNameError
from turnout.run import EXECUTORS, calibrate, choose, execute
from turnout.run.calibrate import _fit
from turnout.run.choose import _constants, _path, constants_path
from turnout.types import ExpertWeights, Routing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for this machine's constants."""
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path))
    return tmp_path / "executors.json"


def case(dtype=torch.float32, device="cpu", tokens=17):
    weights = ExpertWeights(
        torch.ones(2, 8, 32, dtype=dtype, device=device), torch.ones(2, 16, 8, dtype=dtype, device=device)
    )
    routing = Routing.from_topk(torch.ones(tokens, 1).long(), torch.full((tokens, 1), 0.5), num_experts=2)
    return torch.ones(tokens, 8, dtype=dtype, device=device), routing, weights


def write(path, **seconds):
    _constants.cache_clear()
    path.write_text(json.dumps({"torch": torch.__version__, "seconds": {"cpu float32 forward": seconds}}))


def test_says_why(cache):
    choice = choose(*case())
    assert choice.name in EXECUTORS
    assert choice.reasons and all(isinstance(reason, str) for reason in choice.reasons)


def test_takes_the_cheapest_by_this_machines_constants(cache):
    write(cache, sort=[2.0, 0, 0, 0], grouped=[1.0, 0, 0, 0])
    choice = choose(*case())
    assert choice.name == "grouped"
    assert any("grouped would take 1e+03 ms" in reason for reason in choice.reasons)
    assert any("T=17, R=17, E=2" in reason for reason in choice.reasons)


def test_sort_wins_when_it_is_close_and_where_grouped_would_pad(cache):
    write(cache, sort=[1.2, 0, 0, 0], grouped=[1.0, 0, 0, 0])
    assert choose(*case()).name == "sort"
    write(cache, sort=[9.0, 0, 0, 0], grouped=[1.0, 0, 0, 0])
    odd = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 2, 3))
    assert choose(torch.ones(17, 3), case()[1], odd).name == "sort"


def test_few_tokens_go_to_sort_whatever_was_measured(cache):
    write(cache, sort=[2.0, 0, 0, 0], grouped=[1.0, 0, 0, 0])
    choice = choose(*case(tokens=2))
    assert choice.name == "sort" and "T=2 without gradients" in choice.reasons
    torch.testing.assert_close(execute(*case(tokens=2)), execute(*case(tokens=2), backend="reference"))


def test_other_versions_constants_are_not_used(cache):
    cache.write_text(json.dumps({"torch": "0.1", "seconds": {"cpu float32 forward": {"reference": [0, 0, 0, 0]}}}))
    assert choose(*case()).name in ("sort", "grouped")


GOOD = {"sort": [1.0, 0, 0, 0], "grouped": [2.0, 0, 0, 0]}
MALFORMED = {
    "cut off": "{",
    "a list": "[]",
    "no version": {"torch": ..., "seconds": {}},
    "a version of another type": {"torch": 2, "seconds": {}},
    "no seconds": {"seconds": ...},
    "seconds of another type": {"seconds": []},
    "a situation of another type": {"seconds": {"cpu float32 forward": [1, 2]}},
    "seconds that are no list": {"seconds": {"cpu float32 forward": GOOD | {"sort": 1.0}}},
    "words": {"seconds": {"cpu float32 forward": GOOD | {"sort": ["1", "2", "3", "4"]}}},
    "too few": {"seconds": {"cpu float32 forward": GOOD | {"sort": [1.0]}}},
    "too many": {"seconds": {"cpu float32 forward": GOOD | {"sort": [1.0] * 5}}},
    "below zero": {"seconds": {"cpu float32 forward": GOOD | {"sort": [-1.0, 0, 0, 0]}}},
    "null": {"seconds": {"cpu float32 forward": None}},
    "an executor of no such name": {"seconds": {"cpu float32 forward": GOOD | {"warp": [0, 0, 0, 0]}}},
    "without sort": {"seconds": {"cpu float32 forward": {"grouped": [1.0, 0, 0, 0]}}},
    "not a number": {"seconds": {"cpu float32 forward": GOOD | {"sort": [float("nan"), 0, 0, 0]}}},
    "deep": "[" * 100_000,
    "half a character": b'{"torch": "\xff"}',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_constants_are_ignored_and_that_is_said_once(cache, name, recwarn):
    body = MALFORMED[name]
    if isinstance(body, dict):
        body = {"torch": torch.__version__, "seconds": {}} | body
        body = json.dumps({key: value for key, value in body.items() if value is not ...})
    _constants.cache_clear()
    cache.write_bytes(body if isinstance(body, bytes) else body.encode())
    for _ in range(3):
        assert choose(*case()).name in ("sort", "grouped")
        torch.testing.assert_close(execute(*case()), execute(*case(), backend="reference"))
    said = [str(one.message) for one in recwarn.list]
    assert len(said) == 1 and "executors.json is ignored" in said[0] and "remove it" in said[0], said


def test_a_user_without_a_home_has_the_shipped_constants(monkeypatch, recwarn):
    for name in ("HOME", "TURNOUT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", nobody)
    _path.cache_clear()
    torch.testing.assert_close(execute(*case()), execute(*case(), backend="reference"))
    assert choose(*case()).name in EXECUTORS
    with pytest.raises(StorageError, match="set TURNOUT_CACHE"):
        constants_path()
    _path.cache_clear()
    assert not recwarn.list


@pytest.mark.parametrize("what", ["a pipe", "a folder", "below a file"])
def test_a_cache_that_is_no_file_is_ignored(cache, what, recwarn, monkeypatch, tmp_path):
    _constants.cache_clear()
    if what == "a pipe":
        os.mkfifo(cache)
    elif what == "a folder":
        cache.mkdir()
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path / "file" / "below"))
    torch.testing.assert_close(execute(*case()), execute(*case(), backend="reference"))
    assert len(recwarn.list) == (what != "below a file")


def test_double_precision_never_goes_to_a_product_that_lacks_it(cache):
    assert choose(*case(dtype=torch.float64)).name == "sort"


def test_choice_can_be_overridden(cache):
    write(cache, sort=[1.0, 0, 0, 0], grouped=[2.0, 0, 0, 0])
    expected = execute(*case(), backend="reference")
    for name in [*EXECUTORS, "auto"]:
        torch.testing.assert_close(execute(*case(), backend=name), expected)
    with pytest.raises(UnknownNameError, match="Did you mean 'grouped'"):
        execute(*case(), backend="group")


def test_calibrate_writes_what_choose_reads(cache):
    shapes = [(4, 8, 2, 1, 8), (8, 16, 2, 1, 8), (16, 8, 4, 2, 8), (32, 16, 4, 2, 8)]
    assert calibrate(dtypes=(torch.float32,), shapes=shapes) == cache
    assert any("would take" in reason for reason in choose(*case()).reasons)


def test_fit_finds_the_constants_it_was_made_from():
    rows = [(1.0, e, m * 1e6, n * 1e3) for e, m, n in [(2, 1, 5), (8, 2, 1), (64, 3, 9), (4, 40, 7), (1, 9, 80)]]
    values = [sum(a * b for a, b in zip((1e-4, 2e-5, 1e-11, 3e-9), row, strict=True)) for row in rows]
    assert _fit(rows, values) == pytest.approx([1e-4, 2e-5, 1e-11, 3e-9], rel=1e-3)
    assert min(_fit(rows, [1.0 / (1 + i) for i in range(5)])) >= 0
