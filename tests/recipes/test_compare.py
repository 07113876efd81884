"""The demo end to end on a small text: what it leaves, what it says, and how long it says it will take."""

import dataclasses
import json
import re

import pytest
from clocks import set_clock

from turnout.measure import read_run
from turnout.recipes import compare, pace
from turnout.recipes.run import Run
from turnout.recipes.tiny import tiny, tiny_dense

SMALL = ["width=16", "heads=2", "kv_heads=1", "layers=2", "seq=32", "batch=2", "eval_every=2", "eval_tokens=128"]


@pytest.fixture
def small(tmp_path, monkeypatch) -> dict[str, Run]:
    """The demo's recipes, small and on two domains of numbers."""
    for domain, word in (("ones", "one"), ("twos", "two")):
        (tmp_path / domain).mkdir()
        for n in range(20):
            text = f"{word} {n}: " + " ".join(f"{word}{n * k}" for k in range(60))
            (tmp_path / domain / f"{n}.txt").write_text(text)
    domains = {name: (str(tmp_path / name),) for name in ("ones", "twos")}
    runs = {}
    for recipe in (tiny, tiny_dense):
        sizes = [*SMALL, "vocab_size=300", "held_out=0.3", "hidden=16"][: None if recipe is tiny_dense else -1]
        run = recipe().override([*sizes, *(["moe.hidden=8", "model.hidden=16"] if recipe is tiny else [])])
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, domains=domains, limit_mb=None))
        runs[recipe.__name__] = run
        monkeypatch.setattr(compare, recipe.__name__, lambda run=run: run)
    return runs


def test_the_demo_leaves_two_runs_a_table_and_a_page_and_goes_on_where_it_stopped(small, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    done = compare.demo(out, steps=4)
    said = capsys.readouterr().err
    assert re.match(r"about \d+ minutes? on this machine \(dense \d+\.\d, moe \d+\.\d\)\n", said)
    rows = json.loads((out / "table.json").read_text())
    assert [row["name"] for row in rows] == ["dense", "moe"]
    assert all(row["seconds"] > 0 and row["peak_memory_bytes"] > 10**7 and row["steps"] == 4 for row in rows)
    assert "training time" in done.table() and "peak memory" in done.table()
    assert done.said().count("one seed each") in (1, 2) and " as long" in done.said()
    page = (out / "report.html").read_text()
    assert "Held-out text by seconds" in page and page.count('data-passage="') == 2
    again = compare.demo(out, steps=4)
    assert "about" not in capsys.readouterr().err.partition("\n")[0]
    assert [row["bits_per_byte"] for row in again.rows()] == [row["bits_per_byte"] for row in rows]


def test_result_json_is_read_by_people_and_routes_json_by_the_page(small, tmp_path) -> None:
    out = tmp_path / "out"
    compare.demo(out, steps=2, quiet=True)
    text = (out / "moe" / "result.json").read_text()
    assert len(text.splitlines()) < 40 and "[" not in text
    run = read_run(out / "moe")
    assert [passage.domain for passage in run.passages] == ["ones", "twos"]
    assert all(len(passage.tokens) == 32 for passage in run.passages), "as much context as the model has"
    assert set(run.load_by_domain) == {"ones", "twos"} and len(run.load) == 2
    assert sum(run.load[0]) == pytest.approx(1)
    assert run.notes == () and run.seconds == json.loads(text)["seconds"]
    assert not (out / "dense" / "routes.json").exists()


def test_the_estimate_is_of_the_steps_and_of_what_is_measured(small, monkeypatch) -> None:
    ticks = iter(range(100))
    set_clock(monkeypatch, pace, monotonic=lambda: float(next(ticks)))
    run = small["tiny"].override(["steps=1000", "warmup=1", "eval_every=500", "eval_tokens=64000"])
    measured = (2 * 64_000 + 300_000) / (2 * 32)
    assert pace.estimate_s(run) == pytest.approx(1000 + 0.4 * measured)
