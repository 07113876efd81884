"""Adapters, their routers and what they are worth, on the pretended device; the base model is one of transformers."""

import sys
from pathlib import Path

import pytest
import torch

from turnout.models.checkpoint import read_adapter
from turnout.recipes import adapters as recipe

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent))
from pretend import CUDA, Pretend, pretending
from tables import cases

place = cases("cli/test_convert_adapters.py").place


def learned(place: Path, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """The losses and shares of two adapters by gates that are trained on this device."""
    model = recipe.load_base(place / "base", None).to(device)
    rows = recipe._rows(model, place / "base", place / "text", 256)
    for name in "ab":
        recipe._train(model, place / name, rows, any_base=True)
    found = [read_adapter(place / name) for name in "ab"]
    done = recipe._measure(model, found, "phatgoose", {}, rows, any_base=True)
    return dict(done.loss), dict(done.share)


def test_gates_are_trained_and_routers_measured_there(place) -> None:
    here = learned(place, torch.device("cpu"))
    model = recipe.load_base(place / "base", None)  # transformers builds on "meta", which the pretence takes for CUDA
    with pretending(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "load_base", lambda path, dtype: model)
        there = learned(place, CUDA)
        assert type(next(model.parameters()).data) is Pretend
    for one, other in zip(here, there, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert set(here[0]) == {"base", "a", "b", "all, evenly", "routed"}


@pytest.mark.parametrize("router", ["arrow", "even"])
def test_a_router_that_learns_nothing(place, router: str) -> None:
    found = [read_adapter(place / name) for name in "ab"]
    models = [recipe.load_base(place / "base", None) for _ in range(2)]
    rows = recipe._rows(models[0], place / "base", place / "text", 256)
    here = recipe._measure(models[0], found, router, {}, rows, any_base=True)
    with pretending():
        there = recipe._measure(models[1].to(CUDA), found, router, {}, rows, any_base=True)
    assert dict(here.loss) == pytest.approx(dict(there.loss), rel=1e-4)
    assert dict(here.share) == pytest.approx(dict(there.share), rel=1e-4)
