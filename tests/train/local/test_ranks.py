"""On real processes the same numbers come out as with the same replicas in one process."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.processes import spawn
from tests.train.local.fleet import batches, flat, fleet, step, walk
from turnout.train.local import CO2, DiLoCo, over, payload_bytes

WORLD, STEPS = 2, 8
RUNS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (DiLoCo, {"every": 4}),
    "streaming": (DiLoCo, {"every": 4, "fragments": 2, "delay": 1, "mix": 0.5}),
    "int8": (DiLoCo, {"every": 4, "bits": 8}),
    "e3m0": (DiLoCo, {"every": 4, "fragments": 2, "bits": 4}),
    "stale": (CO2, {"every": 2}),
    "local": (CO2, {"every": 2, "staleness": 0, "momentum": 0.0, "clip": None}),
}


def one_rank(ranks) -> dict[str, tuple[torch.Tensor, int]]:
    found = {}
    for name, (method, settings) in RUNS.items():
        (model,), (inner,) = fleet(1)
        data = batches(STEPS, dist.get_rank())
        with method(model, inner, average=over(), **settings) as met:
            for _ in range(STEPS):
                step(model, inner, next(data))
        found[name] = (flat(model).tolist(), met.sent_bytes)
    return found


@pytest.mark.slow
def test_ranks_of_gloo_do_what_replicas_in_one_process_do():
    ranks = spawn(WORLD, one_rank)
    for name, (method, settings) in RUNS.items():
        models, inner = fleet(WORLD)
        with method(models, inner, **copy.deepcopy(settings)) as met:
            walk(models, inner, STEPS)
        for rank in range(WORLD):
            values, sent = ranks[rank][name]
            # What is in few bits is summed in float32.
            worst = 1e-6 if settings.get("bits") else 1e-12
            assert (torch.tensor(values, dtype=torch.float64) - flat(models[rank])).abs().max() <= worst, name
            assert sent == met.sent_bytes, name
    assert ranks[0]["e3m0"][1] == 2 * sum(payload_bytes(n, 4) for n in _sizes())
    assert all(ranks[0][name][0] == ranks[1][name][0] for name in ("plain", "int8", "stale", "local"))


def _sizes() -> list[int]:
    models, inner = fleet(1)
    met = DiLoCo(models, inner, every=4, fragments=2)
    return [sum(one.numel() for one in anchors.values()) for anchors, _ in met._fragments]
