"""The soak of the server, short: nothing is left of what was asked, and it finds a wrong answer."""

import sys

import pytest

from benchmarks import soak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_nothing_is_left_of_it(tmp_path):
    found = soak.soak(soak.made(tmp_path / "moe"), requests=150, seed=1)
    assert found["whole"] > 0 and found["streamed"] > 0 and found["left"] > 0
    for name in ("wrong answers", "errors out of format", "stuck slots", "wrong after a kill"):
        assert found[name] == 0, found
    assert found["memory over half-time"] < 1.1, found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_it_sees_an_answer_that_is_wrong(tmp_path, monkeypatch):
    right = soak.answers
    monkeypatch.setattr(soak, "answers", lambda *given: {one: text + "x" for one, text in right(*given).items()})
    found = soak.soak(soak.made(tmp_path / "moe"), requests=40, seed=1)
    assert found["wrong answers"] == found["whole"] + found["streamed"] > 0
