"""TrainConfig refuses what cannot work."""

import dataclasses

import pytest

from turnout.errors import UnknownNameError, UsageError
from turnout.fields import build, plain
from turnout.train import TrainConfig

GOOD = TrainConfig(steps=10, batch=2, seq=8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("seq", -1),
        ("accumulate", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("min_lr", 1.0),
        ("warmup", 11),
        ("decay", 1.5),
        ("clip", 0.0),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -0.1),
        ("aux_weight", -1.0),
        ("keep_checkpoints", 0),
        ("eval_tokens", 0),
        ("seed", -1),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(UsageError, match=f"^{name} must .*{name}="):
        dataclasses.replace(GOOD, **{name: value})


@pytest.mark.parametrize(("name", "value", "near"), [("schedule", "cosin", "cosine"), ("dtype", "bf61", "bf16")])
def test_unknown_names_get_the_nearest(name, value, near):
    with pytest.raises(UnknownNameError, match=f"Did you mean '{near}'"):
        dataclasses.replace(GOOD, **{name: value})


def test_goes_to_json_and_back():
    assert build(TrainConfig, plain(GOOD), "test") == GOOD


def test_lr_follows_the_schedule():
    stable = dataclasses.replace(GOOD, schedule="wsd", decay=0.2, lr=1.0)
    assert [stable.lr_at(s) for s in (0, 7, 9)] == [1.0, 1.0, 0.0]
    assert GOOD.lr_at(5) < GOOD.lr
