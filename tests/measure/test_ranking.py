"""A winner only among runs on the same text, the fastest only on one machine, and seeds beside a percentage."""

import dataclasses

import pytest

from turnout.measure import ReportData, RunData, results_table
from turnout.measure.ranking import unranked
from turnout.measure.report import result_lines
from turnout.show import report_html
from turnout.show.headline import headline


def run(name: str, bits: float = 2.0, *, seed: int = 0, width: int = 8, **changes: object) -> RunData:
    found = RunData(
        name,
        config={"model": {"width": width}, "train": {"seed": seed}},
        result={"bits_per_byte": bits, "bytes": 100, "max_vio": bits, "by_domain": {"a": bits}},
        tokens_per_s=1000 * bits,
        hardware={"cpu": "x", "torch": "2"},
        texts=("held_out_text a", f"tokens_digest {name}"),
    )
    return dataclasses.replace(found, **changes)


def best(runs: list[RunData]) -> dict[str, int | None]:
    return {label.strip(): at for label, _, at in result_lines(runs)}


def test_one_text_is_ranked_whatever_its_tokens() -> None:
    runs = [run("x", 2.0), run("y", 1.5, width=16)]
    assert unranked(runs) == ""
    assert best(runs) == {"held-out bits per byte": 1, "a": 1, "training tokens/s": 0, "load MaxVio": 1}
    assert headline(runs) == "y needs 1.500 bits per byte on held-out text, 25.0 % less than x (one seed each)"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"texts": ("held_out_text b",)}, "x and y were measured on different held-out texts"),
        ({"texts": ()}, "y does not say which held-out text was measured"),
        ({"result": {"bits_per_byte": 1.5, "bytes": 50}}, "x and y were measured on 100 and 50 bytes of"),
        ({"result": {"bits_per_byte": 1.5}}, "on 100 and an unknown number of bytes"),
    ],
)
def test_other_texts_have_no_winner_anywhere(changes: dict, why: str) -> None:
    runs = [run("x", 2.0), run("y", 1.5, width=16, **changes)]
    assert why in unranked(runs)
    assert {label: at for label, at in best(runs).items() if at is not None} == {"training tokens/s": 0}
    assert "less than" not in headline(runs) and why in headline(runs)
    page = report_html(ReportData("t", runs))
    assert "less than" not in page and "No best is marked" in page
    assert page.count('<td class="best"') == 1, "the speed's"
    assert why in results_table(runs) and "Not ranked" in results_table(runs, style="markdown")


def test_speeds_compare_on_one_machine_only() -> None:
    runs = [run("x", 2.0), run("y", 1.5, width=16, hardware={"cpu": "other", "torch": "2"})]
    assert best(runs)["training tokens/s"] is None and best(runs)["held-out bits per byte"] == 1
    assert best([run("x"), run("y", 1.5, hardware={})])["training tokens/s"] is None


def test_seeds_stand_together_with_their_spread() -> None:
    seeds = [run(f"x{n}", 2.0 + n / 10, seed=n) for n in range(3)]
    other = run("y", 4.0, width=16)
    said = headline([*seeds, other])
    assert said.startswith("x0 needs 2.100 ± 0.100 bits per byte over 3 seeds on held-out text, 47.5 % less than y")
    assert said.endswith("(y: one seed)")
    close = headline([*seeds, run("y", 2.15, width=16)])
    assert close.endswith("which is within the spread of seeds")
    assert headline(seeds) == "x0 needs 2.100 ± 0.100 bits per byte over 3 seeds on held-out text"
