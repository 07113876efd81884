"""What a run that goes on is told about the bits of its losses."""

import dataclasses

import torch

from turnout.run.compiled import why_not_compiled
from turnout.run.tuned import as_tuned, tuning
from turnout.train.place import Place, crossing


def test_kernels_chosen_otherwise_are_said_when_a_run_goes_on():
    place, here = Place(torch.device("cpu"), "fp32"), "cpu, 1 threads, torch 2.13"
    body = {"arithmetic": here, "place": place.to_json_dict(), "config": {"dtype": "fp32"}}
    assert body["place"]["executors"].items() > tuning().to_json_dict().items()
    assert (
        body["place"]["executors"]["compiled"] == why_not_compiled()
        or "numba" in body["place"]["executors"]["compiled"]
    )
    assert not [*crossing(body, place, here)]
    with as_tuned(dataclasses.replace(tuning(), onednn=12345, origin="measured")):
        (said,) = crossing(body, place, here)
        now = tuning()
    assert body["place"]["executors"]["digest"] in said and now.digest in said and "last bits" in said


def test_a_run_without_compiled_kernels_is_told_apart(monkeypatch, compiled):
    place, here = Place(torch.device("cpu"), "fp32"), "cpu, 1 threads, torch 2.13"
    body = {"arithmetic": here, "place": place.to_json_dict(), "config": {"dtype": "fp32"}}
    monkeypatch.setenv("TURNOUT_COMPILED", "0")
    (said,) = crossing(body, place, here)
    assert "compiled by numba" in said and "TURNOUT_COMPILED=0" in said


def test_an_older_checkpoint_says_nothing_of_kernels():
    place, here = Place(torch.device("cpu"), "fp32"), "cpu, 1 threads, torch 2.13"
    (said,) = crossing({"arithmetic": here, "config": {"dtype": "fp32"}}, place, here)
    assert "of an older turnout" in said
    assert "executors" not in Place(torch.device("meta"), "fp32").to_json_dict()
