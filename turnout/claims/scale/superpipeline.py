"""Claim: with two fifths of a model's blocks on the device and one fetched ahead, outputs stay and little time goes."""

import statistics

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.device import BlockLoad, foresee
from turnout.models.lm import LM, LMConfig
from turnout.run.swap.offload import Offloaded
from turnout.types import Cluster, OffloadPlan

_BLOCKS, _RESIDENT, _AHEAD, _PROFILES = 10, 4, 1, 100


def superpipeline() -> Claim:
    """Bytes and outputs are those of a real run on a pretended device; times are the planner's.

    >>> superpipeline().off
    'nothing fetched ahead'

    Source: Abbasi et al., 2024, "Superpipeline: A Universal Approach for Reducing GPU Memory Usage in Large Models".
    """
    off, over = "nothing fetched ahead", "over its computation alone, mean of profiles"
    return Claim(
        name="superpipeline",
        statement="Blocks that take turns on the device leave outputs as they are with 60 % less of its memory, and "
        "fetching one ahead hides most of the ways.",
        source="Abbasi et al., 2024, Superpipeline",
        off=off,
        switched={"forward": "forward, none ahead", "step": "step, none ahead"},
        rows=(
            Row(f"time of a forward pass {over}", "below", "forward", "forward, none ahead", off),
            Row(f"time of a training step {over}", "below", "step", "step, none ahead", off),
            Row(
                "bytes of blocks on the device over all of theirs", "within", "memory", "memory, all",
                "all of them resident", bound=0.4, headline=True,
            ),
            Row(
                "largest difference of logits", "within", "changed", "changed, bf16", "weights in bf16, half the bytes",
                bound=0.0, headline=True,
            ),
            Row(f"time of a forward pass {over}", "within", "forward", "forward, none ahead", off, bound=1.15,
                headline=True),
        ),
        measure=_measure,
        seconds=4,
        simulated=True,
        note=f"{_RESIDENT} of {_BLOCKS} blocks; {_PROFILES} profiles in which a block's way to the device takes 0.4 to "
        "1 times its forward pass. Times are simulated, bytes and outputs are measured",
    )  # fmt: skip


def _measure(seed: int) -> Values:
    chance = torch.Generator().manual_seed(seed)
    plans = {"": OffloadPlan(_RESIDENT, _AHEAD), ", none ahead": OffloadPlan(_RESIDENT, 0)}
    times: dict[str, list[float]] = {f"{what}{name}": [] for what in ("forward", "step") for name in plans}
    for _ in range(_PROFILES):
        way, step = (0.4 + 0.6 * torch.rand(2, generator=chance)).tolist()
        loads = [BlockLoad(way, way, 2 * way, forward_s=1.0, backward_s=2.0, step_s=step)] * _BLOCKS
        for name, plan in plans.items():
            for what, computed in (("forward", _BLOCKS), ("step", 3 * _BLOCKS)):
                found = foresee(loads, Cluster(host_bytes_per_s=1.0), plan, training=what == "step")
                times[f"{what}{name}"].append(found.step_s / computed)
    return {**{name: statistics.fmean(each) for name, each in times.items()}, **_run(seed)}


def _run(seed: int) -> Values:
    config = LMConfig(vocab_size=64, width=32, layers=_BLOCKS, heads=4, hidden=64, max_seq=16)
    lm = LM(config, seed=seed)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        want = lm(ids).logits_BSV
        halved = LM(config, seed=seed).bfloat16()(ids).logits_BSV.float()
    whole = sum(p.numel() * p.element_size() for p in lm.blocks.parameters())
    plan = OffloadPlan(_RESIDENT, _AHEAD)
    with Offloaded(lm, plan, lambda own: torch.optim.AdamW(own, lr=1e-3)) as off:
        logits = off.run(lambda: lm(ids).logits_BSV)
        off.step(lambda: lm.loss(ids[:, :-1], ids[:, 1:]).nats)
        peak = off.parameters.peak
    return {
        "memory": peak / whole,
        "memory, all": 1.0,
        "changed": float((logits - want).abs().max()),
        "changed, bf16": float((halved - want).abs().max()),
    }
