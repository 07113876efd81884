"""Balance over a whole optimizer step: what one large batch would ask for, however it is cut."""

import types

import pytest
import torch
from stand_in import Tiny, tiny_config
from test_step import batch, stepped

from turnout.errors import UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.train.step import Step


def quiet():
    model = Tiny()
    model.drop.p = 0.0
    model.router.eval()  # no noise, which is drawn a micro-batch
    model.router.train = lambda mode=True: model.router
    return model


CONFIG = {"clip": None, "aux_weight": 2.0, "weight_decay": 0.0}


def both(*parts):
    return types.SimpleNamespace(**{n: torch.cat([getattr(p, n) for p in parts]) for n in ("id_BS", "target_BS")})


def lm():
    moe = MoEConfig(num_experts=4, top_k=2, hidden=16)
    return LM(LMConfig(vocab_size=32, width=16, layers=2, heads=2, hidden=32, max_seq=16, moe=moe, init_std=0.3))


@pytest.mark.parametrize("padded", [0, 10])
def test_two_micro_batches_are_one_large_batch(padded):
    """Also where one has less tokens: those after the last target of a row are padding."""
    first, second = batch(0), batch(1)
    first.target_BS[1, 16 - padded :] = -100
    two, one, micro = lm(), lm(), lm()
    a = stepped(two, tiny_config(accumulate=2, balance_scope="step", **CONFIG), first, second)
    b = stepped(one, tiny_config(accumulate=1, **CONFIG), both(first, second))
    c = stepped(micro, tiny_config(accumulate=2, **CONFIG), first, second)
    torch.testing.assert_close(torch.tensor(a.window.means()[:2]), torch.tensor(b.window.means()[:2]))
    assert abs(a.window.means()[1] - c.window.means()[1]) > 1e-4
    torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-4, atol=0)
    for p, q in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert [load_E.tolist() for load_E in a.window.load_L] == [load_E.tolist() for load_E in b.window.load_L]


def test_with_one_micro_batch_it_is_the_same_to_the_bit():
    found = []
    for scope in ("step", "micro"):
        model = quiet()
        stepped(model, tiny_config(accumulate=1, balance_scope=scope, **CONFIG), batch(3))
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_noise_is_drawn_as_it_was_counted():
    """The first pass sees the decisions of the second: counted and trained demand are one."""
    model = Tiny().train()
    work = Step(model, tiny_config(accumulate=2, balance_scope="step"), None)
    batches = [batch(0), batch(1)]
    work.stream = types.SimpleNamespace(batch=lambda index: batches[index])
    counted = work._chosen(0, batches)
    work.run(0, 0.001)
    assert [load_E.tolist() for load_E in counted] == [work.window.load_L[0].tolist()]


def test_a_schedule_refuses_it():
    team = types.SimpleNamespace(schedules=True)
    with pytest.raises(UsageError, match="balance_scope"):
        Step(Tiny(), tiny_config(accumulate=2, balance_scope="step"), None, team)
