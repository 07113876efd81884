import pytest

from turnout.errors import CheckpointError, UsageError
from turnout.types import Budget, Cost, Report


def test_costs_add_field_by_field_and_unknown_stays_unknown():
    total = Cost(params=10, flops=4.0, latency_ms=1.0) + Cost(params=5, flops=6.0, memory_bytes=3)
    assert total == Cost(params=15, flops=10.0)
    assert Cost(params=2, flops=1.5) * 3 == Cost(params=6, flops=4.5)
    assert repr(Cost()) == "Cost()" and repr(Cost(money=2.0)) == "Cost(money=2.0)"
    assert sum([Cost(params=1), Cost(params=2)], start=Cost(params=0)) == Cost(params=3)


def test_a_budget_limits_what_it_names():
    budget = Budget(flops=5.0, memory_bytes=10)
    assert budget.allows(Cost(flops=5.0, memory_bytes=10, latency_ms=1e9))
    assert not budget.allows(Cost(flops=5.1, memory_bytes=1))
    assert not budget.allows(Cost(flops=1.0, memory_bytes=11))
    assert Budget().allows(Cost())


def test_a_budget_says_nothing_about_the_unknown():
    with pytest.raises(UsageError, match="memory_bytes"):
        Budget(memory_bytes=10).allows(Cost(flops=1.0))


def test_budget_and_cost_have_the_same_fields():
    assert list(Budget.__dataclass_fields__) == list(Cost.__dataclass_fields__)


def report() -> Report:
    return Report("load", {"max_vio": 0.25, "by_layer": [1, 2], "name": None}, ("a note",), {"torch": "2"})


def test_reports_go_to_disk_and_back(tmp_path):
    report().save(tmp_path / "sub" / "report.json")
    assert Report.from_json((tmp_path / "sub" / "report.json").read_text()) == report()
    assert report()["max_vio"] == 0.25


def test_reports_print_their_values_and_notes():
    assert str(report()).splitlines() == [
        "load",
        "  max_vio   0.25",
        "  by_layer  [1, 2]",
        "  name      None",
        "  note: a note",
    ]
    assert str(Report("empty", {})) == "empty"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"format": "other/1"}', '{"format": "turnout.report/1"}'])
def test_other_text_is_no_report(text):
    with pytest.raises(CheckpointError, match=r"turnout\.report/1"):
        Report.from_json(text)
