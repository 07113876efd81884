"""Every router by its name in a language model: it trains, its state comes back, and the cache changes nothing."""

import contextlib

import pytest
import torch
from every_router import IDS, NAMES, network, told

from turnout.decide import token
from turnout.layers import given
from turnout.models import Cache


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_all_that_a_model_starts_from(name):
    one, two = network(name, seed=3).state_dict(), network(name, seed=3).state_dict()
    assert [key for key, value in one.items() if not torch.equal(value, two[key])] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_its_state_is_all_there(name):
    lm = network(name).train()
    with told(name):
        done = lm.loss(IDS, IDS.roll(-1, 1), generator=torch.Generator().manual_seed(0))
    asked = [r.penalty for r in done.routings if r.penalty is not None]
    (done.nats + sum(asked)).backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in lm.parameters())
    for router, routing in zip(lm.routers, done.routings, strict=True):
        if hasattr(router, "after_step"):
            told_more = {"num_tokens": IDS.numel()} if name in ("ReMoE", "TopP") else {}
            router.after_step(routing.load_E, **told_more)
    state = {key: value.clone() for key, value in lm.state_dict().items()}
    other = network(name, seed=1)
    assert list(other.state_dict()) == list(state)
    other.load_state_dict(state)
    with told(name), torch.no_grad():
        assert torch.equal(lm.eval()(IDS).logits_BSV, other.eval()(IDS).logits_BSV)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if getattr(getattr(token, n), "sees_later_tokens", False) is not True]
)
def test_one_token_at_a_time_with_a_cache_is_the_whole(name):
    lm, cache = network(name).eval(), Cache()
    with torch.no_grad():
        with told(name):
            whole = lm(IDS).logits_BSV
        parts = []
        for at in range(9):
            so_far = given(task_B=torch.tensor([0, 1]), kind_BS=IDS[:, : at + 1] % 2)
            with so_far if name in ("ByKind", "Skills", "CIGT") else contextlib.nullcontext():
                parts.append(lm(IDS[:, at : at + 1], cache=cache).logits_BSV)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_is_each_text_alone(name):
    """Where a router looks at other tokens, at those of its own text: one text a call."""
    lm = network(name).eval()
    mask_BS, task_B = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]), torch.tensor([0])
    with torch.no_grad(), given(task_B=task_B, kind_BS=IDS[:1] % 2):
        padded = lm(IDS[:1], attention_mask=mask_BS)
    with torch.no_grad(), given(task_B=task_B, kind_BS=IDS[:1, 3:] % 2):
        alone = lm(IDS[:1, 3:])
    torch.testing.assert_close(padded.logits_BSV[:, 3:], alone.logits_BSV, rtol=1e-4, atol=1e-4)
    for a, b in zip(padded.routings, alone.routings, strict=True):
        torch.testing.assert_close(a.dense()[3:], b.dense(), rtol=1e-4, atol=1e-5)


def test_the_recurrent_cell_is_one_and_stands_once_in_the_state():
    lm = network("RMoE")
    first, second = lm.routers
    assert first.cell is second.cell
    names = [name for name in lm.state_dict() if ".cell." in name]
    assert len(names) == 4 and all(name.startswith("blocks.0.") for name in names)
    assert sum(p.numel() for p in lm.parameters()) == sum(
        t.numel() for n, t in lm.state_dict().items() if "label" not in n
    )


def test_zero_computation_experts_are_counted_and_refused_where_they_do_not_go():
    lm = network("MoEPlusPlus")
    assert [r.num_experts for r in lm(IDS).routings] == [7, 7]
    assert lm.cost().params == sum(p.numel() for p in lm.parameters())
