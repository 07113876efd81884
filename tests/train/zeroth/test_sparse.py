"""Which entries are tuned, what is left of the others, and a tiny language model that learns so."""

import copy

import pytest
import torch
from torch import nn

from turnout.errors import TrainingError, UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.train.zeroth import mezo, overlay, sensitive


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))


def losses(count: int):
    chance = torch.Generator().manual_seed(1)
    for _ in range(count):
        x, label = torch.randn(8, 6, generator=chance), torch.randint(3, (8,), generator=chance)
        yield lambda model, x=x, label=label: nn.functional.cross_entropy(model(x), label)


def test_the_most_sensitive_are_those_with_the_largest_squared_gradients():
    model, every = network(), []
    for loss in losses(5):
        model.zero_grad()
        loss(model).backward()
        every.append(torch.cat([one.grad.flatten() for one in model.parameters()]).square())
    model.zero_grad()
    index = sensitive(model, losses(5), share=0.1)
    total = torch.stack(every).sum(0)
    parts = dict(zip(dict(model.named_parameters()), total.split([p.numel() for p in model.parameters()]), strict=True))
    inside = torch.cat([parts[name][here] for name, here in index.items()])
    assert len(inside) == int(0.1 * len(total))
    assert inside.min() >= total.topk(len(inside)).values.min() * (1 - 1e-6)
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("bits, worst", [(32, 0.0), (8, 0.5 / 127), (4, 0.5 / 7)])
def test_the_rest_is_what_its_bits_hold_and_what_is_tuned_is_whole(bits, worst):
    model = network()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    index = {"0.weight": torch.tensor([0, 7, 119]), "2.bias": torch.tensor([1])}
    names = overlay(model, index, bits=bits)
    assert sum(model.get_parameter(name).numel() for name in names) == 4
    assert [name for name, one in model.named_parameters() if one.requires_grad] == names
    for name, was in before.items():
        owner, leaf = name.split(".")
        now = getattr(model[int(owner)], leaf).detach()
        groups = nn.functional.pad(was.flatten(), (0, -was.numel() % 64)).view(-1, 64).abs().amax(1)
        limit = groups.repeat_interleave(64)[: was.numel()].view(was.shape) * (worst if was.dim() > 1 else 0.0)
        assert ((now - was).abs() <= limit + 1e-7).all(), name
        here = index.get(name, torch.zeros(0, dtype=torch.long))
        assert torch.equal(now.flatten()[here], was.flatten()[here])
    held = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n.endswith(("code", "scale")))
    if bits == 4:
        assert held < 0.3 * sum(was.numel() * 4 for was in before.values() if was.dim() > 1)


@pytest.mark.parametrize("bits", [32, 4])
def test_gradients_reach_the_tuned_entries_and_them_alone(bits):
    whole, model = network(), network()
    index = {"0.weight": torch.tensor([3, 50])}
    (name,) = overlay(model, index, bits=bits)
    loss = next(losses(1))
    loss(model).backward()
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    with torch.no_grad():
        for at in (0, 2):
            for leaf in ("weight", "bias"):
                getattr(whole[at], leaf).copy_(getattr(model[at], leaf))
    loss(whole).backward()
    assert torch.allclose(gradient, whole[0].weight.grad.flatten()[[3, 50]], atol=1e-7)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_only_the_sensitive_entries_of_a_language_model_move_and_its_loss_falls(bits):
    config = LMConfig(
        vocab_size=24, width=16, layers=2, heads=2, hidden=24, moe=MoEConfig(num_experts=4, top_k=2, hidden=12)
    )
    lm = LM(config, seed=0)
    chance = torch.Generator().manual_seed(0)
    id_BS = torch.arange(24).repeat(4, 2)[:, :33] + torch.randint(24, (4, 1), generator=chance)
    id_BS = id_BS % 24

    def loss(model, step=0):
        return nn.functional.cross_entropy(model(id_BS[:, :-1]).logits_BSV.flatten(0, 1), id_BS[:, 1:].flatten())

    index = sensitive(lm, [loss], share=0.02)
    overlay(lm, index, bits=bits)
    frozen = {name: b.clone() for name, b in lm.named_buffers() if name.endswith(("code", "scale"))}
    with torch.no_grad():
        first = float(loss(lm))
    mezo(lm, loss, steps=150, rate=2e-2)
    with torch.no_grad():
        assert float(loss(lm)) < first - 0.05
    assert frozen and all(torch.equal(was, lm.get_buffer(name)) for name, was in frozen.items())


def test_mezo_is_the_formula_and_repeats():
    one, other = network(), network()
    given = next(losses(1))
    seen = mezo(one, lambda model, step: given(model), steps=3, rate=0.1, seed=5)
    assert seen == mezo(other, lambda model, step: given(model), steps=3, rate=0.1, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    double = copy.deepcopy(network()).double()
    before = torch.cat([p.detach().flatten() for p in double.parameters()])
    x = torch.ones(2, 6, dtype=torch.float64)
    mezo(double, lambda model, step: model(x).square().sum(), steps=1, rate=1e-4, eps=1e-4)
    moved = torch.cat([p.detach().flatten() for p in double.parameters()]) - before
    model = network().double()
    model(x).square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    z = moved / moved.norm()
    size = moved.norm() / (1e-4 * abs(float(gradient @ z)))  # |z|: its length cancels once
    assert float(gradient @ moved) < 0 and float(size) == pytest.approx(
        float(moved.norm() / 1e-4 / abs(float(gradient @ z)))
    )


def test_a_loss_that_is_not_finite_ends_it():
    with pytest.raises(TrainingError, match="finite"):
        mezo(network(), lambda model, step: torch.tensor(float("inf")), steps=1, rate=0.1)


def test_what_cannot_be_is_refused():
    model = network()
    with pytest.raises(UsageError, match="share"):
        sensitive(model, losses(1), share=0.0)
    with pytest.raises(UsageError, match="losses"):
        sensitive(model, [])
    with pytest.raises(UsageError, match="bits"):
        overlay(model, {}, bits=2)
    with pytest.raises(UsageError, match="index"):
        overlay(model, {"1.weight": torch.tensor([0])})
    for wrong in ([60000], [-1], [2, 2]):
        with pytest.raises(UsageError, match="the positions"):
            overlay(model, {"0.weight": torch.tensor(wrong)})
    model[2].weight = nn.Parameter(torch.zeros(3, 20))
    model.tied = nn.Linear(20, 3)
    model.tied.weight = model[2].weight
    with pytest.raises(UsageError, match="untie"):
        overlay(model, {})
    with pytest.raises(UsageError, match="the settings"):
        mezo(network().requires_grad_(False), lambda model, step: torch.zeros(()), steps=1, rate=0.1)
