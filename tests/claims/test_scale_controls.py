"""Controls of the claims on scale are ones that could win, and rows see what their words are about."""

import importlib
from typing import Any

import pytest
import torch

from turnout import claims
from turnout.claims.claim import PUBLISHED_SEEDS, Result
from turnout.decide.device.flows import Flows
from turnout.train.zeroth import OneByte


def room(name: str) -> Any:
    return importlib.import_module(f"turnout.claims.scale.{name}")


def verdicts(name: str, values: dict[str, float]) -> dict[str, bool]:
    """Each row's, by its measured value, when all seeds give these."""
    claim = claims.find(name)()
    found = Result(claim, PUBLISHED_SEEDS, (values,) * len(PUBLISHED_SEEDS))
    return {f"{one.row.measured} {one.row.control}": one.holds for one in found.evidence}


def test_spraying_every_flow_is_not_taken_for_single_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as even, and has no single path left."""
    assert all(verdicts("flows", room("flows")._measure(0)).values())

    def sprayed(count: int, paths: int) -> Flows:
        return Flows(tuple((f, s, 1 / paths) for f in range(count) for s in range(paths)), count, paths)

    monkeypatch.setattr(room("flows"), "split", sprayed)
    held = verdicts("flows", room("flows")._measure(0))
    assert held["ethereal hashed"]
    assert not held["split split, sprayed"]
    assert not held["extra extra, sprayed"]


def test_slopes_in_full_are_not_taken_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent is counted, not asserted."""
    module = room("one_byte")
    monkeypatch.setattr(module, "_STEPS", 2)
    assert module._World(0).together()[1] == 1.0
    measure = OneByte.measure
    monkeypatch.setattr(OneByte, "measure", lambda self, loss: measure(self, loss) + 0.5)
    with pytest.raises(TypeError):
        module._World(0).together()


@pytest.mark.parametrize(("name", "measured", "little"), [("exflow", "left", 0.9), ("moetuner", "time over", 0.95)])
def test_less_than_the_paper_says_is_not_its_headline(name: str, measured: str, little: float) -> None:
    (row,) = [row for row in claims.find(name)().rows if row.headline]
    assert row.measured == measured
    for value, holds in ((little, False), (0.3, True)):
        values = {each: 1.0 for one in claims.find(name)().rows for each in (one.measured, one.control)}
        assert verdicts(name, values | {measured: value})[f"{measured} {row.control}"] is holds


def test_comets_controls_try_all_that_it_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each layer without order, and over all layers with one number."""
    module, seen = room("comet"), set[tuple[int, bool]]()
    layer = module._layer

    def watched(wire: float, product: float, own: int, ordered: bool, chance: object) -> float:
        seen.add((own, ordered))
        return layer(wire, product, own, ordered, chance)

    monkeypatch.setattr(module, "_layer", watched)
    values = module._measure(0)
    assert {own for own, ordered in seen if ordered} == {own for own, ordered in seen if not ordered}
    assert values["adaptive"] <= values["fixed"] < 1.1 * values["adaptive"], "a control that is nearly as good"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_no_best_rate_lies_between_or_beyond_those_tried(kind: type[torch.optim.Optimizer]) -> None:
    module = room("agvm")
    found = {rate: module._distance(kind, rate, False, 0) for rate in module._RATES}
    best = min(found, key=found.__getitem__)
    assert min(module._RATES) < best < max(module._RATES)
    finer = [module._distance(kind, best * 2 ** (step / 16), False, 0) for step in range(-3, 4)]
    assert found[best] <= 1.02 * min(finer)


def test_surco_is_held_against_who_knows_the_domain() -> None:
    """A search by load, which does better: the row says so."""
    (row,) = [row for row in claims.find("surco")().rows if row.control == "load"]
    assert row.headline
    values = room("surco")._measure(0)
    assert values["load"] < values["affinity"]
    assert not verdicts("surco", values)["learned load"]
