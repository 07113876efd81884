"""Optimizers go on from what turnout 0.1 saved, whose banks had shape (out, in) and memory (in, out)."""

import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

from turnout.paths import Bank, layout

OPTIMIZERS = {
    "AdamW": lambda given, **how: AdamW(given, lr=0.1, **how),
    "Adam, amsgrad": lambda given, **how: Adam(given, lr=0.1, amsgrad=True, **how),
    "SGD": lambda given, **how: SGD(given, lr=0.1, momentum=0.9, **how),
    "Adagrad": lambda given, **how: Adagrad(given, lr=0.1, **how),
}


def bank(old: bool) -> Bank:
    made = Bank(3, 8, 16, std=0.5, bias=True, generator=torch.Generator().manual_seed(0))
    for name in ("up", "down") if old else ():
        memory = getattr(made, name).detach().transpose(1, 2).contiguous()
        setattr(made, name, nn.Parameter(memory.transpose(1, 2)))
    return made


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step()


def saved(content: object) -> object:
    """What comes back of a file of ``torch.save``."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("whole", [False, True], ids=["state dicts", "pickled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_a_run_of_0_1_goes_on(monkeypatch, name, how, whole):
    called = []
    monkeypatch.setattr("turnout.paths.bank.align_fused_optimizers", lambda: called.append(layout._align))
    expected, begun = bank(False), bank(True)
    wanted = OPTIMIZERS[name](expected.parameters(), foreach=False)
    first = OPTIMIZERS[name](begun.parameters(), **{how: True})
    for seed in range(2):
        step(expected, wanted, seed)
        step(begun, first, seed)
    if whole:
        model, optimizer = saved((begun, first))
    else:
        model = bank(False)
        optimizer = OPTIMIZERS[name](model.parameters(), **{how: True})
        weights, states = saved((begun.state_dict(), first.state_dict()))
        optimizer.load_state_dict(states)
        model.load_state_dict(weights)
    assert model.up.is_contiguous()
    assert called
    optimizer.register_step_pre_hook(called[0])
    for seed in range(2, 4):
        step(expected, wanted, seed)
        step(model, optimizer, seed)
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_nothing_is_watched_where_nothing_is_old(monkeypatch):
    called = []
    monkeypatch.setattr("turnout.paths.bank.align_fused_optimizers", lambda: called.append(True))
    model = saved(bank(False))
    model.load_state_dict(saved(bank(False).state_dict()))
    assert not called


def test_what_lies_well_stays_where_it_is():
    model = bank(False)
    optimizer = AdamW(model.parameters(), fused=True)
    optimizer.register_step_pre_hook(layout._align)
    model.up.sum().backward()
    address = model.up.grad.data_ptr()
    optimizer.step()
    state = [one.data_ptr() for one in optimizer.state[model.up].values()]
    optimizer.step()
    assert model.up.grad.data_ptr() == address
    assert [one.data_ptr() for one in optimizer.state[model.up].values()] == state
