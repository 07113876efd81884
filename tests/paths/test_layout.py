"""Optimizers get the same weights whatever order their gradients and states have in memory."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

from turnout.paths import Bank, bank

OPTIMIZERS = {
    "AdamW": lambda given, **how: AdamW(given, lr=0.1, **how),
    "Adam, amsgrad": lambda given, **how: Adam(given, lr=0.1, amsgrad=True, **how),
    "SGD": lambda given, **how: SGD(given, lr=0.1, momentum=0.9, **how),
    "Adagrad": lambda given, **how: Adagrad(given, lr=0.1, **how),
}


def assigned(model: nn.Module) -> None:
    """Gradients as someone brings them who knows only the shapes: from a file, another process, a meta-optimizer."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad.contiguous()


def expanded(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones(1).expand(parameter.shape)


def read_back(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state from a format that keeps no strides."""
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.update({name: one.contiguous() for name, one in state.items() if isinstance(one, torch.Tensor)})
    optimizer.load_state_dict(saved)


def moved(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The parameters to other memory, as torch.nn.utils.vector_to_parameters does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


def trained(make, change, **how) -> torch.Tensor:
    model = Bank(3, 8, 16, std=0.5, bias=True, generator=torch.Generator().manual_seed(0))
    optimizer = make(model.parameters(), **how)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(drawn)
        if change in (assigned, expanded):
            change(model)
        optimizer.step()
        if change in (read_back, moved) and step == 1:
            change(model, optimizer)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("change", [None, assigned, expanded, read_back, moved])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_memory_order_changes_no_weight(name, change, how):
    wanted = trained(OPTIMIZERS[name], expanded if change is expanded else None, foreach=False)
    torch.testing.assert_close(trained(OPTIMIZERS[name], change, **{how: True}), wanted, rtol=1e-4, atol=1e-5)


def test_what_lies_well_stays_where_it_is():
    model = Bank(3, 8, 16)
    optimizer = AdamW(model.parameters(), fused=True)
    model.up.sum().backward()
    address = model.up.grad.data_ptr()
    optimizer.step()
    state = [one.data_ptr() for one in optimizer.state[model.up].values()]
    optimizer.step()
    assert model.up.grad.data_ptr() == address
    assert [one.data_ptr() for one in optimizer.state[model.up].values()] == state


def test_a_bank_from_another_process_is_cared_for(monkeypatch):
    sent, called = pickle.dumps(Bank(3, 8, 16)), []
    monkeypatch.setattr(bank, "align_fused_optimizers", lambda: called.append(True))
    pickle.loads(sent)
    assert called
