"""Claim: averages that are a round old hide behind local steps; a penalty on the gap and a clip keep them in hand."""

import contextlib
from typing import Any

import torch
from torch import nn

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.scale.replicas import Fleet
from turnout.train.local import CO2, overlap

_REPLICAS, _EVERY, _STEPS, _BATCH, _RATE, _MOMENTUM, _CLIP = 4, 10, 500, 32, 2e-3, 0.1, 0.01
_STEP_S, _AVERAGE_S = 1.0, 10.0  # an average takes as long as a round


def co2() -> Claim:
    """With stale averages four replicas learn more in the same time than with averages that are waited for.

    An average takes as long as the ten local steps of a round. The off arm is as stale, without penalty and clip.

    >>> co2().simulated
    True

    Source: Sun et al., 2024, "CO2: Efficient Distributed Training with Full Communication-Computation Overlap".
    """
    loss, same = "held-out nats", "in the same simulated time"
    why = "what DiLoCo is allowed against data parallelism"
    return Claim(
        name="co2",
        statement="Averages a round old cost no waiting, and with the staleness gap penalty and a clipped outer "
        "momentum replicas learn more in the same time than by LocalSGD or data parallelism.",
        source="Sun et al., 2024, CO2",
        off="the same staleness without penalty and clip",
        switched={"co2": "unguarded"},
        rows=(
            Row(loss, "below", "co2", "unguarded", "as stale, without penalty and clip"),
            Row(loss, "below", "co2", "local, same time", f"LocalSGD {same}"),
            Row(loss, "below", "co2", "parallel, same time", f"data parallelism {same}", headline=True),
            Row("waiting over computing", "within", "exposed", "exposed, local", "LocalSGD", bound=0.0, headline=True),
            Row(loss, "no_worse", "co2", "local", "LocalSGD, as many steps", margin=0.05, why=why, headline=True),
        ),
        measure=_measure,
        seconds=12,
        note=f"{_REPLICAS} replicas with AdamW on shards of unlike digits, {_STEPS} steps of {_BATCH} in rounds of "
        f"{_EVERY}; an average as long as a round. With the penalty alone {{penalty:.3f}}, with the clip alone "
        "{clip:.3f}. Data parallelism, as many steps: {parallel:.3f}. The formula of the gap is ours: the released "
        "code divides by a constant, and its clip does nothing",
        limits=(0.0, 5.0),
        simulated=True,
    )


def _measure(seed: int) -> Values:
    fleet = Fleet(seed, _REPLICAS)
    waited: dict[str, object] = {"staleness": 0, "momentum": 0.0, "clip": None}
    stale: dict[str, object] = {"momentum": _MOMENTUM, "clip": _CLIP}
    none: dict[str, object] = {"penalty": False, "clip": None}
    rounds = _STEPS // _EVERY
    hidden = overlap(rounds=rounds, every=_EVERY, step_s=_STEP_S, average_s=_AVERAGE_S)
    exposed = overlap(rounds=rounds, every=_EVERY, step_s=_STEP_S, average_s=_AVERAGE_S, staleness=0)
    fewer = int(_STEPS * hidden.total_s / exposed.total_s)
    arms = {
        "co2": (stale, _STEPS),
        "unguarded": (stale | none, _STEPS),
        "penalty": (stale | {"clip": None}, _STEPS),
        "clip": (stale | {"penalty": False}, _STEPS),
        "local": (waited, _STEPS),
        "local, same time": (waited, fewer),
    }
    found = {name: _loss(fleet, settings, steps) for name, (settings, steps) in arms.items()}
    in_time = int(hidden.total_s / (_STEP_S + _AVERAGE_S))
    return found | {
        "parallel": _loss(fleet, None, _STEPS),
        "parallel, same time": _loss(fleet, None, in_time),
        "exposed": hidden.exposed_s / (_STEPS * _STEP_S),
        "exposed, local": exposed.exposed_s / (_STEPS * _STEP_S),
    }


def _loss(fleet: Fleet, settings: dict[str, Any] | None, steps: int) -> float:
    if settings is None:
        models, _ = fleet.train(_adam, lambda m, o: contextlib.nullcontext(), steps=steps, batch=_BATCH, together=True)
    else:
        models, _ = fleet.train(_adam, lambda m, o: CO2(m, o, every=_EVERY, **settings), steps=steps, batch=_BATCH)
    return fleet.loss(models)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=_RATE, fused=True)
