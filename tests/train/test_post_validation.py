"""A step that is taken back leaves, to the bit, what an optimizer that waited for all stages would have left."""

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch import Tensor, nn

from turnout.decide.device.interleaved import interleaved
from turnout.decide.device.one_f_one_b import one_f_one_b
from turnout.decide.device.zbv import zbv
from turnout.decide.device.zero_bubble import zb_h2
from turnout.errors import UsageError
from turnout.models import LM, LMConfig
from turnout.models.stages import cut, even_stages, shared_parameters
from turnout.run.ranks.pipeline import Pipeline
from turnout.run.ranks.processes import Ranks
from turnout.train.post_validation import PostValidation

CLIP = 0.8
NORM = 3.0  # of the pipelines' models: between those of any three ranks' stages and of all four's


def gradients(step: int, weights: list[nn.Parameter]) -> None:
    """Small ones, large ones, and some that are no numbers, now in one stage and now in another."""
    generator = torch.Generator().manual_seed(step)
    for index, weight in enumerate(weights):
        scale = 40.0 if step % 4 == index else 0.1
        weight.grad = scale * torch.randn(weight.shape, generator=generator)
        if step % 7 == 5 and index == step % 4:
            weight.grad[0] = float("nan")


def optimizers(kind: str) -> tuple[list[nn.Parameter], list[torch.optim.Optimizer]]:
    weights = [nn.Parameter(torch.linspace(-1, 1, 5 + stage)) for stage in range(4)]
    made = {
        "AdamW": lambda w: torch.optim.AdamW([w], lr=0.1),
        "fused AdamW": lambda w: torch.optim.AdamW([w], lr=0.1, fused=True),
        "SGD with momentum": lambda w: torch.optim.SGD([w], lr=0.1, momentum=0.9),
    }
    return weights, [made[kind](weight) for weight in weights]


@pytest.mark.parametrize("clip", [CLIP, 100.0, None])
@pytest.mark.parametrize("kind", ["AdamW", "fused AdamW", "SGD with momentum"])
def test_stages_that_step_at_once_end_as_those_that_wait(kind, clip):
    weights, early = optimizers(kind)
    patient, late = optimizers(kind)
    posts = [PostValidation(each, clip=clip) for each in early]
    waits = [PostValidation(each, clip=clip) for each in late]
    redone = 0
    for step in range(20):
        gradients(step, weights)
        gradients(step, patient)
        part = torch.zeros((), dtype=torch.float64)
        for post in posts:
            part = post.eager(part)
        verdicts = [post.validate(part) for post in posts]
        total = torch.zeros((), dtype=torch.float64)
        for wait in waits:
            total = total + wait._sum()
        assert {each.finite for each in verdicts} == {wait.validate(total).finite for wait in waits}
        redone += sum(each.redone for each in verdicts)
        for one, other, a, b in zip(weights, patient, early, late, strict=True):
            assert torch.equal(one, other), step
            for key, value in a.state[one].items():
                assert torch.equal(value, b.state[other][key]), (step, key)
    assert redone > 0 or clip == 100.0


def test_a_first_step_that_is_taken_back_leaves_no_state():
    weight = nn.Parameter(torch.ones(3))
    post = PostValidation(torch.optim.AdamW([weight]), clip=None)
    weight.grad = torch.ones(3)
    post.eager(torch.zeros((), dtype=torch.float64))
    assert not torch.equal(weight, torch.ones(3))
    assert post.validate(torch.tensor(float("inf"), dtype=torch.float64)).redone
    assert torch.equal(weight, torch.ones(3)) and not post.optimizer.state and weight.grad is None


def test_a_clip_that_is_none_is_refused():
    with pytest.raises(UsageError, match="be above 0"):
        PostValidation(torch.optim.SGD([nn.Parameter(torch.ones(1))]), clip=0.0)


# ---- in a pipeline, where the verdict comes while the next step is on its way


def lm() -> LM:
    return LM(LMConfig(vocab_size=32, width=16, layers=8, heads=2, max_seq=16, tie_embeddings=True), seed=3)


def batch(step: int, count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(step)
    id_BS = [torch.randint(0, 32, (2, 8), generator=generator) for _ in range(count)]
    weight = 8.0 if step % 3 == 1 else 0.2  # a few steps have large gradients
    return [{"id_BS": each, "target_BS": each.roll(-1, 1), "predicted": count * 16 / weight} for each in id_BS]


def trained(ranks: Ranks, schedule, early: bool) -> tuple[list[Tensor], list[Tensor], int]:
    whole, sizes = lm(), even_stages(8, schedule.stages)
    stages = cut(whole, sizes, only=[s for s, rank in enumerate(schedule.rank_of_stage) if rank == ranks.rank])
    shared = shared_parameters(whole, sizes)
    pipeline = Pipeline(stages, schedule, device=ranks.device, shared=shared)
    named = [(s, name, p) for s, stage in stages.items() for name, p in stage.named_parameters()]
    once = [p for s, name, p in named if shared.get(name, (s,))[-1] == s]
    optimizer = torch.optim.AdamW([p for _, _, p in named], lr=1e-2)

    def square() -> Tensor:
        return sum(p.grad.double().square().sum() for p in once)

    post = PostValidation(optimizer, clip=NORM, chain=pipeline.chain, square=square)
    redone, losses = 0, []

    def settle() -> bool:
        verdict = post.settle()
        nonlocal redone
        redone += verdict is not None and verdict.redone
        return verdict is not None and not (verdict.finite and verdict.norm <= NORM)

    for step in range(6):
        microbatches = batch(step, schedule.microbatches)
        got = pipeline.step(microbatches, settle=settle if early else None)
        losses += [got[index] for index in sorted(got)]
        if early:
            post.step()
            continue
        parts = [torch.zeros((), dtype=torch.float64) for _ in range(ranks.world)]
        dist.all_gather(parts, square())
        total = parts[pipeline.chain[0]]
        for rank in pipeline.chain[1:]:
            total = total + parts[rank]
        post.validate(total)
    settle()
    return [p.detach() for _, _, p in named], losses, redone


def both(ranks: Ranks) -> list[str]:
    found = []
    for schedule in (one_f_one_b(4, 5), zb_h2(4, 7), interleaved(4, 4), zbv(4, 6)):
        weights, losses, redone = trained(ranks, schedule, True)
        patient, wanted, _ = trained(ranks, schedule, False)
        found += [
            f"{schedule.name}: weight {i}"
            for i, (a, b) in enumerate(zip(weights, patient, strict=True))
            if not torch.equal(a, b)
        ]
        found += [
            f"{schedule.name}: loss {i}"
            for i, (a, b) in enumerate(zip(losses, wanted, strict=True))
            if not torch.equal(a, b)
        ]
        counts = [torch.zeros(1) for _ in range(ranks.world)]
        dist.all_gather(counts, torch.tensor([float(redone)]))
        if not 0 < sum(map(float, counts)):
            found.append(f"{schedule.name}: no step was taken back, so that nothing was tested")
    return found


@pytest.mark.slow
def test_a_pipeline_that_steps_early_trains_as_one_that_waits():
    assert [each for rank in spawn(4, both) for each in rank] == []
