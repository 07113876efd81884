"""The engine over experts in files: the same tokens, counters by name, and a file that goes ends requests alone."""

from pathlib import Path

import pytest
from variants import make

from turnout.models import generate
from turnout.models.checkpoint import load_offloaded, to_hf
from turnout.serve.engine import Engine, Request


@pytest.mark.usefixtures("compiled")
def test_experts_in_files_are_served_and_their_loss_is_said(tmp_path: Path) -> None:
    to_hf(lm := make("moe"), tmp_path)
    few = load_offloaded(tmp_path, expert_memory=2 * 3 * 32 * 24 * 4)
    want = generate(lm, [[3, 1, 4]], tokens=6, temperature=0).rows[0]
    with Engine(few, name="few", slots=2) as engine:
        tickets = [engine.submit(Request((3, 1, 4), tokens=6)) for _ in range(2)]
        for ticket in tickets:
            *tokens, end = list(ticket)
            assert [one.id for one in tokens] == list(want) and end.reason == "length", end
        assert engine.stats().counts["expert_misses"] > 0
        weights = tmp_path / "model.safetensors"
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size // 2)
        *_, end = list(engine.submit(Request((3, 1, 4), tokens=6)))
        assert end.reason == "error" and "model.safetensors" in end.message
        *_, end = list(engine.submit(Request((5, 1), tokens=2)))
        assert end.reason == "error" and engine.stats().alive
