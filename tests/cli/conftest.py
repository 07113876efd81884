"""A folder of text, and a run that was trained on it."""

from pathlib import Path

import pytest
from small_run import SMALL

from turnout.cli.main import main


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"document {n}: " + " ".join(str(n * k) for k in range(60)))
    return folder


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "x"
    assert main(["train", "tiny", *SMALL, "--data", f"numbers={text}", "--out", str(out), "--quiet"]) == 0
    return out
