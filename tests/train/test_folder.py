"""The output folder: one run, one process, and a note when it fails."""

import subprocess
import sys

import pytest

from turnout.errors import StorageError, UsageError
from turnout.train.folder import locked, read_run_json, refuse_missing_run, refuse_other_run, write_failure

HOLD = "import sys, time, pathlib\nfrom turnout.train.folder import locked\n" + (
    "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


def test_two_processes_cannot_share_a_folder_and_a_dead_one_holds_nothing(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"in which process {other.pid} is training"), locked(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError, match="choose another path"), locked(tmp_path / "out"):
        pass


def test_a_run_is_not_written_over(tmp_path):
    refuse_other_run(tmp_path)
    (tmp_path / "tokens").mkdir()
    refuse_other_run(tmp_path)
    (tmp_path / "run.json").write_text('{"recipe": "tiny"}')
    with pytest.raises(UsageError, match=r"recipe tiny, run.json, no checkpoint yet.*--resume.*another --out"):
        refuse_other_run(tmp_path)
    (tmp_path / "checkpoints/step-00000020").mkdir(parents=True)
    with pytest.raises(UsageError, match="last checkpoint step-00000020"):
        refuse_other_run(tmp_path)


def test_a_run_stopped_before_its_first_step_may_start(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": "tiny", "train": {"steps": 3}}')
    begun = {"recipe": "tiny", "train": {"steps": 3}, "command": "turnout train"}
    refuse_other_run(tmp_path, begun)
    with pytest.raises(UsageError, match="recipe tiny"):
        refuse_other_run(tmp_path, begun | {"train": {"steps": 4}})
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="recipe tiny"):
        refuse_other_run(tmp_path, begun)


def test_nothing_to_resume_is_said(tmp_path):
    refuse_missing_run(tmp_path, None)
    with pytest.raises(UsageError, match="leave out --resume"):
        refuse_missing_run(tmp_path, "latest")


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_an_unreadable_run_json_is_empty(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert read_run_json(tmp_path) == {}


def test_a_failure_leaves_what_is_needed_to_understand_it(tmp_path):
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        write_failure(tmp_path, error, 17, {"command": "turnout train tiny"})
    text = (tmp_path / "error.txt").read_text()
    for part in ("time     2", "command  turnout train tiny", "step     17", "torch 2", "Traceback", "boom", "raise"):
        assert part in text


def test_a_failure_that_cannot_be_written_is_a_note(tmp_path):
    (tmp_path / "file").write_text("")
    error = RuntimeError("boom")
    write_failure(tmp_path / "file", error, 0, {})
    assert "error.txt could not be written" in error.__notes__[0]
