"""Every claim is run in CI, keeps the verdict that the table shows, and has three seeds and a control."""

import json

import pytest

from house import ROOT
from turnout import claims

TABLE = ROOT / "docs" / "claims.json"


@pytest.mark.slow
@pytest.mark.parametrize("name", claims.__all__)
def test_the_verdict_of_the_table_is_seen_here(name):
    told = {claim["name"]: claim["holds"] for claim in json.loads(TABLE.read_text())}
    lines = []
    claim = claims.find(name)(note=lines.append)
    assert claim.name == name
    assert claim.holds is told[name], "\n".join([*lines, claims.show(claim)])


@pytest.mark.parametrize("name", claims.__all__)
def test_every_claim_is_in_the_table_with_its_evidence(name):
    (claim,) = [claim for claim in json.loads(TABLE.read_text()) if claim["name"] == name]
    assert claim["evidence"]
    assert all(len(row["measured"]) == len(row["control"]) >= 3 for row in claim["evidence"])
    assert claim["seconds"] <= 120
