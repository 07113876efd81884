"""The verdict of a claim is arithmetic: planted numbers give the verdict that they must."""

import pytest

from turnout.claims.claim import Claim, Evidence
from turnout.errors import UsageError


def evidence(relation, measured, control, bound=None):
    return Evidence("metric", relation, tuple(measured), tuple(control), "control", bound)


@pytest.mark.parametrize(
    ("relation", "measured", "control", "holds"),
    [
        ("below", (1.0, 1.1, 0.9), (2.0, 2.1, 1.9), True),
        ("below", (1.0, 1.1, 0.9), (1.0, 1.1, 0.9), False),
        ("below", (2.0, 2.1, 1.9), (1.0, 1.1, 0.9), False),
        ("below", (1.0, 3.0, 1.0), (2.0, 2.0, 2.0), False),  # lower on average, lost in the spread
        ("not_above", (1.0, 1.1, 0.9), (1.0, 1.1, 0.9), True),
        ("not_above", (1.2, 1.0, 1.0), (1.0, 1.1, 1.0), True),  # higher, within the spread
        ("not_above", (2.0, 2.1, 1.9), (1.0, 1.1, 0.9), False),
        ("below", (float("nan"), 1.0, 1.0), (2.0, 2.0, 2.0), False),
    ],
)
def test_verdicts(relation, measured, control, holds):
    assert evidence(relation, measured, control).holds is holds


def test_within_needs_a_control_that_fails():
    assert evidence("within", (0.0, 0.1, 0.0), (1.0, 1.0, 1.0), bound=0.1).holds
    assert not evidence("within", (0.0, 0.2, 0.0), (1.0, 1.0, 1.0), bound=0.1).holds
    assert not evidence("within", (0.0, 0.1, 0.0), (1.0, 0.1, 1.0), bound=0.1).holds, (
        "a control that passes shows nothing"
    )


@pytest.mark.parametrize(
    "arguments",
    [("below", (1.0, 1.0), (2.0, 2.0)), ("below", (1.0, 1.0, 1.0), (2.0, 2.0)), ("within", (0.0,) * 3, (1.0,) * 3)],
)
def test_too_few_seeds_and_missing_bounds_are_refused(arguments):
    with pytest.raises(UsageError):
        evidence(*arguments)


def test_a_claim_holds_when_all_of_it_does():
    good, bad = evidence("below", (1.0, 1.0, 1.1), (2.0, 2.0, 2.0)), evidence("below", (2.0, 2.0, 2.0), (1.0, 1.0, 1.1))
    assert Claim("x", "s", "p", (good,)).holds
    assert not Claim("x", "s", "p", (good, bad)).holds
    assert Claim("x", "s", "p", (good, bad)).to_json_dict()["evidence"][1]["holds"] is False
