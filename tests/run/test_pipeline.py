"""Pipelines on torch's engine: the gradients of one process, whatever the schedule and whatever the shapes.

The first stage of torch's runtime does all of its backward pass as W; that and everything else of its engine is judged
here by its gradients alone, against ``LM.loss`` in one process.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from processes import outcomes, spawn
from torch import Tensor, nn

from turnout.decide.device.dual_pipe_v import dual_pipe_v
from turnout.decide.device.one_f_one_b import one_f_one_b
from turnout.decide.device.zero_bubble import zb_h1, zb_h2
from turnout.errors import MissingExtraError, TrainingError, UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.stages import cut, even_stages, shared_parameters
from turnout.run.ranks import torch_pipeline
from turnout.run.ranks.pipeline import Carried, Pipeline, torch_schedule
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import mesh, shard
from turnout.run.ranks.watch import answering
from turnout.train import load_balance_loss
from turnout.types import Action, Layout, Plan, Schedule

SEVEN = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
AUX, TOLERANCE = 0.1, 1e-6


def model(layers: int, *, tied: bool = True, router: str = "TopK") -> LM:
    moe = MoEConfig(num_experts=4, top_k=2, hidden=16, router=router)
    config = LMConfig(vocab_size=32, width=16, layers=layers, heads=2, max_seq=16, moe=moe, tie_embeddings=tied)
    return LM(config, seed=3)


def batches(count: int, *, rows: int = 2, seq: int = 8, vary: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """Microbatches of unlike lengths, padded ones among them, that know how many targets all of them have."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        id_BS = torch.randint(0, 32, (rows, seq - (index % 3 if vary else 0)), generator=generator)
        target_BS = id_BS.roll(-1, 1)
        target_BS[0, -2:] = -100
        found.append({"id_BS": id_BS, "target_BS": target_BS})
        if vary and index % 2:
            found[-1]["attention_mask"] = target_BS != -100
    predicted = sum(int((each["target_BS"] != -100).sum()) for each in found)
    return [each | {"predicted": predicted} for each in found]


def balance(routings: Sequence[Any], layers: int) -> Tensor:
    return AUX / layers * torch.stack([load_balance_loss(routing) for routing in routings]).sum()


def alone(lm: LM, microbatches: Sequence[Mapping[str, Any]]) -> tuple[dict[int, float], dict[str, Tensor | None]]:
    """Losses and gradients of one process."""
    losses = {}
    for index, each in enumerate(microbatches):
        done = lm.loss(each["id_BS"], each["target_BS"], attention_mask=each.get("attention_mask"))
        loss = done.nats / each["predicted"]
        losses[index] = loss.item()
        (loss + balance(done.routings, lm.config.layers)).backward()
    return losses, {name: p.grad for name, p in lm.named_parameters()}


def wrong(pipeline: Pipeline, wanted: Mapping[str, Tensor | None]) -> list[str]:
    """Every parameter of this rank's stages whose gradient is not the one that is wanted."""
    found = []
    for stage, module in pipeline.stages.items():
        for name, parameter in module.named_parameters():
            want, have = wanted[name], parameter.grad
            have = have.full_tensor() if hasattr(have, "full_tensor") else have
            error = 9.0 if have is None or want is None else float((have - want).norm() / want.norm())
            if not error <= TOLERANCE:
                found.append(f"stage {stage} {name}: {error:.2g}")
    return found


def build(ranks: Ranks, schedule: Schedule, lm: LM, group: Any = None, **more: Any) -> Pipeline:
    sizes = even_stages(lm.config.layers, schedule.stages)
    rank = torch.distributed.get_rank(group)
    stages = cut(lm, sizes, only=[s for s, holder in enumerate(schedule.rank_of_stage) if holder == rank])
    for stage in stages.values():
        stage.side = lambda routings: balance(routings, lm.config.layers)
    shared = shared_parameters(lm, sizes)
    return Pipeline(stages, schedule, device=ranks.device, group=group, shared=shared, **more)


def hand_written() -> Schedule:
    """Microbatches in another order on the last stage, and parameters gathered and dropped as it says itself."""
    first = "0UNSHARD 0F1 0F0 0F2 0B1 0B0 0B2 0RESHARD"
    second = "1UNSHARD 1F1 1I1 1F0 1F2 1W1 1B0 1I2 1W2 1RESHARD"
    return Schedule.of("by hand", [[Action.parse(one) for one in row.split()] for row in (first, second)])


# ---- exactness


def every_schedule(ranks: Ranks) -> list[str]:
    found = []
    made = [torch_schedule(name, ranks=4, microbatches={"DualPipeV": 9}.get(name, 5)) for name in SEVEN[:4]]
    made += [torch_schedule(name, ranks=4, microbatches=9 if name == "DualPipeV" else 6) for name in SEVEN[4:]]
    made += [zb_h1(4, 5), zb_h2(4, 7), dual_pipe_v(4, 8)]
    for schedule in made:
        microbatches = batches(schedule.microbatches)
        losses, wanted = alone(model(8), microbatches)
        pipeline = build(ranks, schedule, model(8), early=schedule.name != "ZBH1")
        got = pipeline.step(microbatches)
        found += [f"{schedule.name}: {each}" for each in wrong(pipeline, wanted)]
        if schedule.rank_of_stage[-1] == ranks.rank:
            found += [f"{schedule.name}: loss {i}" for i in losses if not abs(got[i].item() - losses[i]) <= 1e-6]
        elif got:
            found.append(f"{schedule.name}: losses on a rank without the last stage")
    return found


@pytest.mark.slow
def test_the_gradients_of_every_schedule_are_those_of_one_process():
    assert [each for rank in spawn(4, every_schedule) for each in rank] == []


def two_ranks(ranks: Ranks) -> dict[str, Any]:
    """Everything that two ranks are enough for."""
    found: dict[str, Any] = {}
    for name, schedule, router in (
        ("out of order, gathers of its own", hand_written(), "TopK"),
        ("a router of all layers", one_f_one_b(2, 3), "PreGate"),
    ):
        microbatches = batches(3)
        _, wanted = alone(model(4, router=router), microbatches)
        pipeline = build(ranks, schedule, model(4, router=router))
        pipeline.step(microbatches)
        found[name] = wrong(pipeline, wanted)
    found |= shapes(ranks) | widths(ranks)
    return found


def shapes(ranks: Ranks) -> dict[str, Any]:
    """Steps of unlike shapes one after the other, in between a forward pass alone, and what has to be refused."""
    found: dict[str, Any] = {}
    pipeline = build(ranks, one_f_one_b(2, 3), model(4))
    for step, (rows, seq) in enumerate([(2, 8), (2, 8), (3, 5), (1, 12), (2, 8)]):
        microbatches = batches(3, rows=rows, seq=seq, seed=step)
        _, wanted = alone(model(4), microbatches)
        pipeline.step(microbatches)
        found[f"step {step}"] = wrong(pipeline, wanted)
        for module in pipeline.stages.values():
            module.zero_grad(set_to_none=True)
        told = [{"id_BS": each["id_BS"]} for each in batches(3, rows=rows + 1, seq=seq, seed=step)]
        logits = pipeline.forward(told)
        if ranks.rank == 1:
            want = [model(4)(each["id_BS"]).logits_BSV for each in told]
            found[f"forward {step}"] = [i for i in range(3) if not torch.allclose(logits[i], want[i], atol=1e-5)]
    for name, given in {
        "count": batches(2 if ranks.rank else 3),
        "shapes": batches(3, rows=2 + ranks.rank),
        "other data": batches(3, seed=ranks.rank),
        "an id": [each | {"id_BS": each["id_BS"] + 99} for each in batches(3)],
    }.items():
        try:
            pipeline.step(given)
        except UsageError as error:
            found[name] = str(error)
        for module in pipeline.stages.values():
            module.zero_grad(set_to_none=True)
    pipeline.step(batches(3))
    try:
        pipeline.step(batches(3))
    except UsageError as error:
        found["gradients"] = str(error)
    return found


class Wide(nn.Module):
    """A stage whose output is as wide as it is told for each microbatch; the last one sums."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.weight = last, nn.Parameter(torch.full((9, 9), 0.5))

    def carries(self, *, x: Tensor, width: int) -> Carried:
        return Carried((len(x), width), x.dtype)

    def forward(self, carried: Tensor | None = None, *, x: Tensor, width: int) -> Tensor:
        carried = x if carried is None else carried
        y = torch.tanh(carried @ self.weight[: carried.shape[1], :width])
        return y.square().sum() if self.last else y.t().contiguous().t()  # not contiguous


def widths(ranks: Ranks) -> dict[str, Any]:
    """Stages whose width changes from microbatch to microbatch, as a supernet's do."""
    found = []
    schedule = Schedule.of(
        "zb",
        [[Action.parse(one) for one in row.split()] for row in ("0F0 0F1 0I0 0I1 0W0 0W1", "1F0 1I0 1F1 1I1 1W0 1W1")],
    )
    pipeline = Pipeline({ranks.rank: Wide(ranks.rank == 1)}, schedule, device=ranks.device)
    for widths in ((3, 5), (9, 1), (5, 5)):
        microbatches = [{"x": torch.full((2, 4), 0.1 * w), "width": w} for w in widths]
        whole = [Wide(False), Wide(True)]
        sum(whole[1](whole[0](**each), **each) for each in microbatches).backward()
        pipeline.step(microbatches)
        module = pipeline.stages[ranks.rank]
        if not torch.allclose(module.weight.grad, whole[ranks.rank].weight.grad, atol=1e-6):
            found.append(widths)
        module.zero_grad(set_to_none=True)
    return {"widths": found}


@pytest.mark.slow
def test_shapes_change_and_what_cannot_be_is_refused_by_every_rank():
    one, two = spawn(2, two_ranks)
    both = ("out of order, gathers of its own", "a router of all layers", "widths", *(f"step {s}" for s in range(5)))
    for name in both:
        assert one[name] == [] and two[name] == [], name
    assert [two[f"forward {step}"] for step in range(5)] == [[]] * 5
    refused = {
        "count": "microbatches must be 3",
        "shapes": "same shapes",
        "gradients": "on ranks 0 and 1 of the pipeline",
    }
    for name, word in (refused | {"other data": "be the same", "an id": "be from 0 to 31"}).items():
        assert word in one[name], name
        assert one[name] == two[name], name


# ---- with other kinds of parallelism


def with_data(ranks: Ranks) -> list[str]:
    """pp=2 x dp_shard=2, once with whole experts everywhere and once with ep=2."""
    found = []
    for ep, zero, schedule in (
        (1, 3, one_f_one_b(2, 3)),
        (2, 3, zb_h1(2, 3)),
        (1, 0, zb_h1(2, 3)),
        (2, 1, torch_schedule("ZBVZeroBubble", ranks=2, microbatches=3)),
    ):
        layout = Layout(pp=2, dp_shard=2, ep=ep, zero=zero)
        meshes = mesh(layout)
        parts = [batches(3, seed=seed) for seed in (1, 2)]
        predicted = sum(part[0]["predicted"] for part in parts)
        parts = [[each | {"predicted": predicted} for each in part] for part in parts]
        reference = model(4)
        for part in parts:
            _, wanted = alone(reference, part)
        pipeline = build(ranks, schedule, model(4), group=meshes.dense["pp"].get_group())
        for module in pipeline.stages.values():
            shard(module, layout, meshes)
        pipeline.step(parts[meshes.data_rank])
        name = f"ep={ep} zero={zero} {schedule.name}"
        found += [f"{name}: {each}" for each in wrong(pipeline, wanted)]
    return found


@pytest.mark.slow
def test_pipelines_with_fsdp_and_expert_parallelism_have_the_gradients_of_one_process():
    assert [each for rank in spawn(4, with_data) for each in rank] == []


# ---- failures


def one_dies(ranks: Ranks) -> str:
    pipeline = build(ranks, one_f_one_b(2, 3), model(4))
    step = [0]
    try:
        with answering(ranks, lambda: f"step {step[0]}"):
            for step[0] in range(3):
                if step[0] == 1 and ranks.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                pipeline.step(batches(3))
                for module in pipeline.stages.values():
                    module.zero_grad(set_to_none=True)
    except TrainingError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_a_rank_that_dies_in_a_step_is_named_by_the_others():
    survivor, dead = outcomes(2, one_dies, wait_s=20.0)
    assert dead.exit_code == -signal.SIGKILL
    assert "step 1" in survivor.value and "rank 1" in survivor.value


def test_a_torch_with_other_private_names_is_refused_with_its_version(monkeypatch):
    monkeypatch.setattr(torch_pipeline, "_PRIVATE", ((torch_pipeline.PipelineStage, "carries_everything"),))
    with pytest.raises(MissingExtraError, match=f"torch {torch.__version__}".replace("+", r"\+")):
        torch_pipeline._check_private()


def test_torchs_schedules_are_schedules():
    for name in SEVEN:
        schedule = torch_schedule(name, ranks=2, microbatches=4)
        assert (schedule.ranks, schedule.microbatches) == (2, 4)
    with pytest.raises(UsageError, match="Unknown schedule"):
        torch_schedule("GPip", ranks=2, microbatches=4)
    assert Plan(Layout(pp=2), schedule="1F1B", microbatches=4).schedule in SEVEN
