"""What the executors choose by: measured, kept, read by the same machine alone, and never a reason not to run."""

import dataclasses
import importlib
import json
import os

import pytest
import torch

from turnout.errors import StorageError, UsageError
from turnout.run import calibrate, execute
from turnout.run.shipped import has_onednn, shipped
from turnout.run.tuned import as_tuned, forget, kept, tuning, tuning_path
from turnout.types import ExpertWeights, Routing
from turnout.types.processor import Processor, processor
from turnout.types.tuning import Tuning

GOOD = {"sort": [1.0, 0, 0, 0], "grouped": [2.0, 0, 0, 0]}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for this machine's tunings."""
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path))
    forget()
    yield tmp_path / "executors.json"
    forget()


def here(**changes):
    return dataclasses.replace(shipped(processor(), torch.get_num_threads()), origin="measured", **changes)


def write(path, *tunings):
    path.write_text(json.dumps({"tunings": [one.to_json_dict() for one in tunings]}))
    forget()


def runs():
    weights = ExpertWeights(torch.ones(2, 8, 32), torch.ones(2, 16, 8))
    routing = Routing.from_topk(torch.ones(17, 1).long(), torch.full((17, 1), 0.5), num_experts=2)
    given = torch.ones(17, 8), routing, weights
    torch.testing.assert_close(execute(*given), execute(*given, backend="reference"))


def test_what_was_measured_here_is_taken(cache, recwarn):
    assert tuning().origin in ("shipped", "assumed")
    mine = here(group=1 << 15, onednn=1 << 25 if has_onednn() else None)
    write(cache, here(threads=99), mine)
    assert tuning() == mine and tuning().group == 1 << 15
    runs()
    assert not recwarn.list


@pytest.mark.parametrize("other", [{"processor": "another"}, {"torch": "0.1"}, {"threads": 99}])
def test_what_was_measured_elsewhere_is_ignored_and_that_is_said_once(cache, other, recwarn):
    write(cache, here(group=1, **other))
    for _ in range(3):
        assert tuning().group == shipped(processor(), torch.get_num_threads()).group
        runs()
    said = [str(one.message) for one in recwarn.list]
    assert len(said) == 1 and str(next(iter(other.values()))) in said[0] and "turnout doctor --calibrate" in said[0]


def test_a_calibration_beside_a_process_does_not_change_it(cache):
    before = tuning()
    cache.write_text(json.dumps({"tunings": [here(group=1 << 14).to_json_dict()]}))
    assert tuning() is before
    forget()
    assert tuning().group == 1 << 14


def damaged(**changes):
    return {"tunings": [here().to_json_dict() | changes]}


MALFORMED = {
    "cut off": "{",
    "a list": "[]",
    "of before": {"torch": torch.__version__, "seconds": {}},
    "no list": {"tunings": {}},
    "a list of numbers": {"tunings": [1]},
    "no threads": {"tunings": [{"processor": "a", "torch": "b"}]},
    "threads of another type": damaged(threads="2"),
    "no threads at all": damaged(threads=0),
    "a field of no such name": damaged(warp=1),
    "no rows at once": damaged(group=0),
    "less than no products": damaged(onednn=-1),
    "half a step": damaged(steps=0.5),
    "seconds of another type": damaged(seconds=[]),
    "a situation of another type": damaged(seconds={"cpu float32 forward": [1, 2]}),
    "seconds that are no list": damaged(seconds={"cpu float32 forward": GOOD | {"sort": 1.0}}),
    "words": damaged(seconds={"cpu float32 forward": GOOD | {"sort": ["1", "2", "3", "4"]}}),
    "too few": damaged(seconds={"cpu float32 forward": GOOD | {"sort": [1.0]}}),
    "too many": damaged(seconds={"cpu float32 forward": GOOD | {"sort": [1.0] * 5}}),
    "below zero": damaged(seconds={"cpu float32 forward": GOOD | {"sort": [-1.0, 0, 0, 0]}}),
    "null": damaged(seconds={"cpu float32 forward": None}),
    "an executor of no such name": damaged(seconds={"cpu float32 forward": GOOD | {"warp": [0, 0, 0, 0]}}),
    "without sort": damaged(seconds={"cpu float32 forward": {"grouped": [1.0, 0, 0, 0]}}),
    "not a number": damaged(seconds={"cpu float32 forward": GOOD | {"sort": [float("nan"), 0, 0, 0]}}),
    "deep": "[" * 100_000,
    "half a character": b'{"tunings": "\xff"}',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_ignored_and_that_is_said_once(cache, name, recwarn):
    body = MALFORMED[name]
    body = json.dumps(body) if isinstance(body, dict) else body
    cache.write_bytes(body if isinstance(body, bytes) else body.encode())
    forget()
    for _ in range(3):
        assert tuning() == shipped(processor(), torch.get_num_threads())
        runs()
    said = [str(one.message) for one in recwarn.list]
    assert len(said) == 1 and "executors.json is ignored" in said[0] and "remove it" in said[0], said


@pytest.mark.parametrize("what", ["a pipe", "a folder", "below a file"])
def test_a_cache_that_is_no_file_is_ignored(cache, what, recwarn, monkeypatch, tmp_path):
    if what == "a pipe":
        os.mkfifo(cache)
    elif what == "a folder":
        cache.mkdir()
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path / "file" / "below"))
    runs()
    assert len(recwarn.list) == (what != "below a file")


def test_a_user_without_a_home_has_what_is_shipped(monkeypatch, recwarn):
    for name in ("HOME", "TURNOUT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", nobody)
    forget()
    runs()
    with pytest.raises(StorageError, match="set TURNOUT_CACHE"):
        tuning_path()
    forget()
    assert not recwarn.list


def test_calibrate_keeps_what_is_read_beside_that_of_others(cache, monkeypatch):
    monkeypatch.setattr("turnout.run.kernel_choice._PRODUCTS", ((4, 8, 8), (8, 8, 8)))
    monkeypatch.setattr(
        "turnout.run.kernel_choice._LAYERS", dict.fromkeys(("group", "steps", "call"), (32, 8, 4, 2, 8))
    )
    for name in ("_TILED", "_PACKED", "_ROWS"):
        monkeypatch.setattr(f"turnout.run.kernel_choice.{name}", (2, 4))
    monkeypatch.setattr(importlib.import_module("turnout.run.calibrate"), "_PATIENCE_S", 0.0)
    shapes = [(4, 8, 2, 1, 8), (8, 16, 2, 1, 8), (16, 8, 4, 2, 8), (32, 16, 4, 2, 8)]
    other, said = here(processor="another"), []
    write(cache, other, here(group=7))
    made = calibrate(dtypes=(torch.float32,), shapes=shapes, say=said.append)
    assert made.origin == "measured" and made == tuning() and [*kept(cache).values()] == [other, made]
    assert said[-1] == "costs, cpu float32 training" and (said[0] == "fp32 products") == has_onednn()
    assert made.seconds["cpu float32 training"]["sort"] != other.seconds["cpu float32 training"]["sort"]


def test_stopping_a_calibration_writes_nothing(cache, monkeypatch):
    def stop(text):
        if text.startswith("costs"):
            raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("turnout.run.calibrate"), "choose_kernels", lambda usual, say: usual)
    with pytest.raises(KeyboardInterrupt):
        calibrate(say=stop)
    assert not cache.exists()


def test_a_tuning_holds_for_a_thread_and_comes_back():
    before, taken = tuning(), here(group=3)
    with as_tuned(taken):
        assert tuning() is taken
    assert tuning() == before


def test_the_digest_is_that_of_the_choices():
    assert here().digest == here(threads=9, processor="another").digest == shipped(processor(), 1).digest
    assert here().digest != here(group=5).digest
    assert Tuning.from_json_dict(json.loads(json.dumps(here().to_json_dict()))) == here()
    with pytest.raises(UsageError, match="be 1 or more"):
        here(steps=0)


def test_what_was_measured_before_there_were_more_choices_is_read_and_keeps_its_digest(cache):
    old = Tuning("a processor", "2.13", 1)
    assert old.digest == "8776c46f"
    body = old.to_json_dict()
    for name in ("compiled_rows", "packed_rows", "panel_rows", "panel_rows_short", "tiled_rows", "tiled_rows_short"):
        assert body.pop(name) is not None
        assert dataclasses.replace(old, **{name: 3}).digest != old.digest
        with pytest.raises(UsageError, match=name):
            dataclasses.replace(old, **{name: -1})
    cache.write_text(json.dumps({"tunings": [body]}))
    (read,) = kept(cache).values()
    assert read == old


def test_what_is_shipped_is_by_the_kind_of_processor():
    zen4, zen5 = (shipped(Processor("AMD EPYC", f"AuthenticAMD {n} AVX512"), 1) for n in (25, 26))
    assert zen4.origin == zen5.origin == "shipped" and zen4.onednn_turned is None
    assert zen4.own_rows(torch.float32) == 1024 and zen4.own_rows(torch.bfloat16) == 512
    assert (zen5.onednn is not None) == has_onednn()
    intel = shipped(Processor("Xeon", "GenuineIntel 6 AVX512"), 1)
    assert intel.origin == "assumed" and intel.onednn is None and intel.own_rows(torch.float32) == 0
    assert (shipped(Processor("new", "HygonGenuine 30 AVX512"), 1).onednn is not None) == has_onednn()
