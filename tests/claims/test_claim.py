"""The verdict of a claim is arithmetic: planted numbers give the verdict that they must."""

import math

import pytest

from turnout.claims.claim import PUBLISHED_SEEDS, Claim, Evidence, Result, Row
from turnout.errors import UsageError

LIMITS = {"no_worse": {"margin": 0.1, "why": "nobody would mind"}, "within": {"bound": 0.1}}


def row(relation, measured="on", control="off", **more):
    return Row("metric", relation, measured, control, "control", **(LIMITS.get(relation, {}) | more))


def claim(*rows, switched=None):
    off = {"on": "off"} if switched is None else switched
    return Claim("x", "s", "p", "nothing", off, rows, lambda seed: {"on": 1.0, "off": 2.0 + seed}, 1.0, "{off:.1f}")


def result(said, **values):
    seeds = tuple(range(len(values["on"])))
    return Result(said, seeds, tuple({name: each[n] for name, each in values.items()} for n in seeds))


@pytest.mark.parametrize(
    ("relation", "measured", "control", "holds"),
    [
        ("below", (1.0, 1.1, 0.9), (2.0, 2.1, 1.9), True),
        ("below", (1.0, 1.1, 0.9), (1.0, 1.1, 0.9), False),
        ("below", (2.0, 2.1, 1.9), (1.0, 1.1, 0.9), False),
        ("below", (1.0, 3.0, 1.0), (2.0, 2.0, 2.0), False),  # lower on average, lost in the spread
        ("no_worse", (1.0, 1.1, 0.9), (1.0, 1.1, 0.9), True),
        ("no_worse", (1.05, 1.15, 0.95), (1.0, 1.1, 0.9), True),  # worse by half of the margin, always
        ("no_worse", (1.11, 1.21, 1.01), (1.0, 1.1, 0.9), False),
        ("no_worse", (1.0, 1.0, 1.0), (1.2, 0.8, 1.0), False),  # no worse on average: the noise does not help
        ("no_worse", (2.05, 3.6, 2.7), (2.0, 2.5, 2.2), False),
        ("below", (math.nan, 1.0, 1.0), (2.0, 2.0, 2.0), False),
        ("no_worse", (1.0, 1.0, 1.0), (2.0, math.inf, 2.0), False),
        ("below", (1.0, 1.1), (2.0, 2.2), False),  # two seeds are too few
        ("within", (0.0, 0.1, 0.0), (1.0, 1.0, 1.0), True),
        ("within", (0.0, 0.2, 0.0), (1.0, 1.0, 1.0), False),
        ("within", (0.0, 0.1, 0.0), (1.0, 0.1, 1.0), False),  # a control that passes shows nothing
    ],
)
def test_verdicts(relation, measured, control, holds):
    assert Evidence(row(relation), measured, control).holds is holds


def test_more_noise_never_makes_no_worse_easier():
    for noise in (0.0, 0.03, 0.1, 1.0):
        one = Evidence(row("no_worse"), (1.0 + noise, 1.0 - noise, 1.0), (0.95, 0.95, 0.95))
        assert one.holds is (0.05 + one.spread <= 0.1)
    assert not one.holds


@pytest.mark.parametrize("margin", [0.0, -0.1, math.nan, math.inf])
def test_a_margin_that_allows_nothing_or_anything_is_refused(margin):
    with pytest.raises(UsageError, match="margin"):
        row("no_worse", margin=margin)


@pytest.mark.parametrize(
    ("relation", "more"),
    [("below", {"margin": 0.1, "why": "x"}), ("no_worse", {"why": ""}), ("no_worse", {"margin": None}),
     ("within", {"bound": None}), ("within", {"bound": math.nan}), ("below", {"bound": 1.0}), ("not_above", {})],
)  # fmt: skip
def test_what_does_not_go_with_a_relation_is_refused(relation, more):
    with pytest.raises(UsageError):
        row(relation, **more)


@pytest.mark.parametrize(("measured", "control"), [((1.0,) * 3, (2.0,) * 2), ((), ()), ((1.0,) * 11, (2.0,) * 11)])
def test_uneven_seeds_are_refused(measured, control):
    with pytest.raises(UsageError):
        Evidence(row("below"), measured, control)


def test_a_claim_without_an_off_arm_is_refused():
    assert claim(row("below"))
    with pytest.raises(UsageError, match="off arm"):
        claim(row("below"), row("below", measured="other"))  # the off arm does not touch it
    with pytest.raises(UsageError, match="off arm"):
        claim(row("below", control="third"))  # nothing is held against the off arm
    with pytest.raises(UsageError, match="off arm"):
        claim(row("no_worse"))  # nor below it
    assert claim(row("below"), row("below", measured="other", headline=True))


def test_switched_off_no_claim_holds_whatever_the_numbers():
    said = claim(row("below"), row("below", control="third"))
    seen = result(said, on=(1.0, 1.1, 0.9), off=(2.0, 2.1, 2.2), third=(3.0, 3.1, 3.3))
    assert seen.holds and not seen.switched_off().holds
    assert seen.switched_off().all("on") == seen.all("off")


def test_the_mechanism_and_the_headline_have_their_own_verdicts():
    said = claim(row("below"), row("below", control="third", headline=True))
    values = {"on": (1.0, 1.1, 0.9), "off": (2.0, 2.1, 2.2)}
    poor = result(said, third=(0.0, 0.1, 0.2), **values)
    assert (poor.mechanism, poor.headline, poor.holds) == (True, False, False)
    assert poor.to_json_dict()["evidence"][1]["holds"] is False
    assert result(said, third=(3.0, 3.1, 3.3), **values).holds
    assert result(claim(row("below")), **values).headline is None


def test_a_run_gives_the_published_seeds_in_their_order():
    told = []
    seen = claim(row("below")).run(note=told.append)
    assert seen.seeds == PUBLISHED_SEEDS and min(PUBLISHED_SEEDS) >= 100 and len(PUBLISHED_SEEDS) == 5
    assert seen.all("off") == tuple(2.0 + seed for seed in PUBLISHED_SEEDS)
    assert seen.note == "104.0" and len(told) == 5


def test_one_seed_has_numbers_and_no_verdict():
    seen = claim(row("below"), row("no_worse", headline=True)).run(seeds=(3,))
    assert seen.to_json_dict()["evidence"][0]["spread"] is None
    assert not seen.holds
