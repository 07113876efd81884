"""metrics.jsonl and its TensorBoard twin."""

import errno
import os
import sys
from pathlib import Path

import pytest

from turnout.errors import MissingExtraError, StorageError
from turnout.train.metrics import Metrics, need_tensorboard, read_metrics, rewind


def test_lines_are_there_before_the_file_is_closed(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.write({"kind": "train", "step": 1})
    assert read_metrics(tmp_path / "m.jsonl") == [{"kind": "train", "step": 1}]
    metrics.close()


def test_rewind_drops_later_lines_and_half_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "eval", "step": 2}\n{"kind": "train", "step": 3}\n{"ki')
    assert [record["step"] for record in rewind(path, 2)] == [1, 2]
    assert path.read_text() == '{"kind": "train", "step": 1}\n{"kind": "eval", "step": 2}\n'
    metrics = Metrics(path)
    metrics.write({"kind": "train", "step": 3})
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_rewind_makes_the_file(tmp_path):
    assert rewind(tmp_path / "m.jsonl", 0) == []
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_a_full_disk_is_named(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    metrics = Metrics(Path("/dev/full"))
    with pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)):
        metrics.write({"kind": "train", "step": 1})
    metrics.close()


def test_tensorboard_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'turnout\[tensorboard\]'"):
        need_tensorboard()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path / "m.jsonl", tensorboard=tmp_path / "events")
    metrics.write({"kind": "train", "step": 5, "loss": 2.5, "aux_loss": None})
    metrics.write({"kind": "eval", "step": 5, "bits_per_byte": 1.5, "by_domain": {"code": 1.25}})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/bits_per_byte", "eval/bits_per_byte/code"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 2.5)]
