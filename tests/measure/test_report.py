"""Reports and results as text."""

import dataclasses
import math

import pytest

from turnout.errors import UsageError
from turnout.measure import RunData, compare, markdown, quantity, results_rows, results_table
from turnout.measure.report import duration
from turnout.types import Cost, Report


def test_comparing_takes_the_common_numbers_and_names_the_rest() -> None:
    first = Report("load", {"max_vio": 0.5, "dead": 0, "name": "a", "old": 1.0}, ("seed 0",))
    second = Report("load", {"max_vio": 0.25, "dead": 2, "name": "b", "new": 1.0}, ("seed 0", "seed 1"))
    found = compare(first, second)
    assert found["max_vio"] == {"before": 0.5, "after": 0.25, "change": -0.25, "ratio": 0.5}
    assert found["dead"] == {"before": 0, "after": 2, "change": 2}
    assert set(found.values) == {"max_vio", "dead"}
    assert found.notes == ("seed 0", "seed 1", "only the first has old", "only the second has new")
    assert Report.from_json(found.to_json()) == found


def test_numbers_that_are_not_finite_are_not_compared() -> None:
    before, after = Report("x", {"a": math.nan, "b": 1.0}), Report("x", {"a": math.nan, "b": 2.0})
    found = compare(before, after)
    assert list(found.values) == ["b"] and "a is not compared: nan and nan" in found.notes[0]
    with pytest.raises(UsageError, match="number in common"):
        compare(Report("x", {"a": math.inf}), Report("x", {"a": 1.0}))


def test_reports_without_a_common_number_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="in common"):
        compare(Report("a", {"x": 1}), Report("b", {"x": True, "y": 2}))


def test_markdown_of_a_comparison_has_a_column_for_each_part() -> None:
    text = markdown(compare(Report("m", {"a": 0, "b|c": 2.0}), Report("m", {"a": 1, "b|c": 3.0})))
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert rows[0] == "|  | before | after | change | ratio |"
    assert rows[2] == "| a | 0 | 1 | 1 | – |"
    assert rows[3] == r"| b\|c | 2 | 3 | 1 | 1.5 |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.9, "1.00 k"),
        (12345, "12.3 k"),
        (999_700, "1.00 M"),
        (5.4e6, "5.40 M"),
        (3e12, "3.00 T"),
    ],
)
def test_quantities_have_three_digits(value: float, text: str) -> None:
    assert quantity(value) == text


def test_the_table_lines_up_and_leaves_out_what_nobody_knows() -> None:
    runs = [
        RunData("dense", result={"bits_per_byte": 1.75, "by_domain": {"code": 1.5}}, cost=Cost(params=1000)),
        RunData("a longer name", result={"bits_per_byte": 1.5, "by_domain": {"prose": 2.0}}, tokens_per_s=1234.0),
    ]
    runs = [dataclasses.replace(run, texts=("one text",)) for run in runs]
    lines = results_table(runs).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("  ")[0].strip() for line in lines if not line.startswith(" ")] == [
        "held-out bits per byte",
        "parameters",
        "training tokens/s",
    ]
    assert lines[2].split() == ["code", "1.500", "–"]
    assert lines[3].split() == ["prose", "–", "2.000"]
    assert results_table(runs, style="markdown").splitlines()[0] == "|  | dense | a longer name |"
    assert [row["params"] for row in results_rows(runs)] == [1000, None]


def test_no_runs_and_no_numbers_make_an_empty_table() -> None:
    assert results_table([]).strip() == ""
    assert results_table([RunData("x")]).split() == ["x"]


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(UsageError, match="markdown"):
        results_table([], style="latex")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3600, "1:00:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text
