"""Every claim names what switches it off, and is in the table as it was measured; tests/claims measures it, small."""

import json
import random

import pytest

from house import ROOT
from turnout import claims
from turnout.claims.claim import PUBLISHED_SEEDS, Result

TABLE = ROOT / "docs" / "claims.json"


@pytest.mark.parametrize("name", claims.__all__)
def test_switched_off_it_does_not_hold(name):
    claim = claims.find(name)()
    assert claim.name == name and claim.off and claim.seconds <= 40
    assert any(row.control == claim.switched.get(row.measured) for row in claim.rows if not row.headline)
    names = {each for row in claim.rows for each in (row.measured, row.control)} | {*claim.switched.values()}
    for seed in range(20):
        chance = random.Random(seed)
        values = tuple({each: chance.uniform(0, 10) for each in names} for _ in PUBLISHED_SEEDS)
        assert not Result(claim, PUBLISHED_SEEDS, values).switched_off().mechanism, f"seed {seed}"


@pytest.mark.parametrize("name", claims.__all__)
def test_the_table_says_what_its_numbers_say(name):
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert table["seeds"] == list(PUBLISHED_SEEDS)
    (told,) = [claim for claim in table["claims"] if claim["name"] == name]
    rows = zip(*told["values"].values(), strict=True)
    values = tuple(dict(zip(told["values"], row, strict=True)) for row in rows)
    result = Result(claims.find(name)(), tuple(told["seeds"]), values, told["seconds"])
    assert result.seeds == PUBLISHED_SEEDS
    assert json.loads(json.dumps(result.to_json_dict())) == told, "measure it again with turnout verify, do not edit it"
    assert told["seconds"] <= 300, "of processor time: two and a half minutes, and on a slower core twice that"


def test_the_table_holds_every_claim():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert [claim["name"] for claim in table["claims"]] == claims.__all__
