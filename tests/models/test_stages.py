"""A language model in stages computes what the whole does, and its parts have the names of the whole."""

import pytest
import torch

from turnout.errors import ShapeError, UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.stages import cut, even_stages, shared_parameters
from turnout.run.ranks.pipeline import Carried


def lm_of(**more) -> LM:
    moe = MoEConfig(num_experts=4, top_k=2, hidden=16)
    config = {"vocab_size": 32, "width": 16, "layers": 4, "heads": 2, "max_seq": 16, "moe": moe} | more
    return LM(LMConfig(**config), seed=1)


VARIANTS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "learned positions, no experts": {"learned_positions": True, "moe": None, "norm": "layer"},
    "scaled and capped": {
        "embedding_scale": 4.0, "embedding_rounded": True, "logit_softcap": 5.0, "logit_divisor": 3.0,
        "window": 3, "window_layers": (1, 2), "local_rope_theta": 100.0,
    },
    "a router of all layers": {"moe": MoEConfig(num_experts=4, top_k=2, hidden=16, router="PreGate")},
}  # fmt: skip


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (0, 3, 1), (1, 3, 0)])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_stages_one_after_the_other_are_the_whole(name, sizes, side):
    lm = lm_of(**VARIANTS[name])
    id_BS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    target_BS = id_BS.roll(-1, 1)
    mask = None if side == "none" else torch.ones(2, 8)
    if mask is not None:
        mask[1, slice(5, None) if side == "right" else slice(None, 3)] = 0
    x, logits = None, None
    stages = cut(lm, sizes)
    for number, stage in stages.items():
        before = x
        x = stage(before, id_BS=id_BS, target_BS=target_BS, attention_mask=mask, predicted=2)
        if number == len(sizes) - 1:
            logits = stage(before, id_BS=id_BS, attention_mask=mask)
        else:
            assert stage.carries(id_BS=id_BS) == Carried.of(x)
    torch.testing.assert_close(x, lm.loss(id_BS, target_BS, attention_mask=mask).nats / 2)
    real = torch.ones(2, 8).bool() if mask is None else mask.bool()
    torch.testing.assert_close(logits[real], lm(id_BS, attention_mask=mask).logits_BSV[real])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_in_the_stages_that_it_is_said_to_be_in(name):
    lm, sizes = lm_of(**VARIANTS[name]), (1, 2, 1)
    shared = shared_parameters(lm, sizes)
    where: dict[str, list[int]] = {}
    for number, stage in cut(lm, sizes).items():
        for parameter, _ in stage.named_parameters():
            where.setdefault(parameter, []).append(number)
    assert set(where) == {parameter for parameter, _ in lm.named_parameters()}
    assert {parameter: tuple(held) for parameter, held in where.items() if len(held) > 1} == shared
    assert list(map(type, cut(lm, sizes, only=[1])[1].routers)) == list(map(type, lm.routers[1:3]))


def test_what_routers_draw_is_another_thing_in_each_stage_and_the_same_again():
    lm = lm_of(moe=MoEConfig(num_experts=4, top_k=2, hidden=16, router="NoisyTopK")).train()
    id_BS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    first, second = cut(lm, (2, 2)).values()
    x = first(id_BS=id_BS, seed=1)
    assert torch.equal(x, first(id_BS=id_BS, seed=1)) and not torch.equal(x, first(id_BS=id_BS, seed=2))
    assert torch.equal(second(x, id_BS=id_BS, seed=1), second(x, id_BS=id_BS, seed=1))


def test_the_gradient_of_a_loss_beside_enters_where_the_routings_are():
    lm = lm_of()
    id_BS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    stage = cut(lm, (2, 2))[0]
    stage.side = lambda routings: sum(routing.score_TE.square().sum() for routing in routings)
    (stage(id_BS=id_BS) * 0).sum().backward()  # what comes from behind does not weigh it
    have = lm.routers[1].weight.grad.clone()
    lm.zero_grad()
    sum(routing.score_TE.square().sum() for routing in lm(id_BS).routings[:2]).backward()
    torch.testing.assert_close(have, lm.routers[1].weight.grad)


def test_a_stage_without_blocks_is_cast_along():
    stage = cut(lm_of(), (2, 0, 2))[1].double()
    x = torch.rand(1, 2, 16, dtype=torch.float64)
    id_BS = torch.zeros(1, 2, dtype=torch.long)
    assert torch.equal(stage(x, id_BS=id_BS), x) and stage.carries(id_BS=id_BS) == Carried.of(x)


def test_what_cannot_be_cut_is_refused():
    lm = lm_of()
    for sizes in ((2, 1), (5, -1), ()):
        with pytest.raises(UsageError, match="sum to the model's 4 blocks"):
            cut(lm, sizes)
    with pytest.raises(UsageError, match="be below 2"):
        cut(lm, (2, 2), only=[2])
    with pytest.raises(UsageError, match="at most 4 stages"):
        even_stages(4, 5)
    stages = cut(lm, (2, 2))
    with pytest.raises(UsageError, match="the stage before"):
        stages[1](id_BS=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(UsageError, match="be from 0 to 31"):
        stages[0].carries(id_BS=torch.full((1, 2), 32))
    with pytest.raises(ShapeError, match="S up to 16"):
        stages[0].carries(id_BS=torch.zeros(1, 17, dtype=torch.long))
