"""One byte a gradient: replicas alike to the bit, whoever comes and goes, and a loss that falls."""

import copy

import pytest
import torch
from torch import nn

from tests.processes import spawn
from turnout.errors import TrainingError, UsageError
from turnout.train.zeroth import OneByte, Sent, gather_bytes, perturbed

RATE = 0.02


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def loss_of(machine: str, step: int):
    """The machine's own data of the step."""
    chance = torch.Generator().manual_seed(1000 * step + sum(machine.encode()))
    x = torch.randn(16, 4, generator=chance)
    return lambda model: (model(x) - x.sum(1, keepdim=True)).square().mean()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def machines(names: str) -> dict[str, OneByte]:
    first = network()
    return {name: OneByte(copy.deepcopy(first), name, rate=RATE) for name in names}


def one_of(sent: list) -> Sent:
    assert all(one == sent[0] for one in sent)
    return sent[0]


def go(there: dict[str, OneByte], steps: int) -> list:
    record = []
    for _ in range(steps):
        sent = {name: one.measure(loss_of(name, one.step)) for name, one in there.items()}
        record.append(one_of([one.apply(sent) for one in there.values()]))
    return record


def test_replicas_are_alike_to_the_bit_and_learn():
    there = machines("abc")
    first = float(loss_of("z", 0)(network()).detach())
    go(there, 400)
    assert len({flat(one.model).numpy().tobytes() for one in there.values()}) == 1
    assert float(loss_of("z", 0)(there["a"].model).detach()) < first / 4


def test_measuring_leaves_the_model_as_it_was_to_the_bit():
    one = OneByte(network(), "a", rate=RATE)
    before = flat(one.model)
    one.measure(loss_of("a", 0))
    assert torch.equal(flat(one.model), before)
    with pytest.raises(TrainingError, match="finite"):
        one.measure(lambda model: torch.tensor(float("nan")))
    with pytest.raises(ZeroDivisionError):
        one.measure(lambda model: torch.tensor(1 / 0))
    assert torch.equal(flat(one.model), before)


def test_the_byte_is_the_slope_along_the_shared_direction():
    """Another machine draws the direction again from the name and the step alone."""
    one = OneByte(network().double(), "a", rate=RATE, eps=1e-4, unit=0.06)
    model = copy.deepcopy(one.model)
    byte = one.measure(_double_loss)
    before = flat(model)
    other = OneByte(model, "b", rate=1.0, unit=1.0)
    other.apply({"a": 1})
    z = before - flat(model)
    model = network().double()
    _double_loss(model).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert byte == round(float(gradient @ z) / 0.06)


def _double_loss(model: nn.Module) -> torch.Tensor:
    x = torch.ones(3, 4, dtype=torch.float64)
    return (model(x) - 2).square().mean()


def test_machines_leave_and_a_newcomer_replays():
    there = machines("abc")
    record = go(there, 10)
    del there["b"]
    record += go(there, 10)
    new = OneByte(network(), "d", rate=RATE)
    new.replay(record)
    assert torch.equal(flat(new.model), flat(there["a"].model)) and new.unit == there["a"].unit
    there["d"] = new
    go(there, 5)
    assert len({flat(one.model).numpy().tobytes() for one in there.values()}) == 1
    with pytest.raises(UsageError, match="go on at step 25"):
        new.replay(record)


def test_the_unit_follows_the_largest_byte_alike_everywhere():
    one = OneByte(network(), "a", rate=RATE, unit=1.0)
    one.apply({"a": 127})
    assert one.unit == 2.0
    for _ in range(50):
        one.apply({"a": 1})
    assert one.unit == 1.0
    for _ in range(49):
        one.apply({"a": 1})
    one.apply({"a": 64})
    assert one.unit == 1.0


def test_perturbed_is_the_same_direction_for_the_same_seed():
    x = torch.zeros(5)
    seen = []
    perturbed([x], 7, 0.5, lambda: seen.append(x.clone()) or 0.0)
    assert torch.equal(seen[0], -seen[1]) and torch.equal(x, torch.zeros(5))
    again = []
    perturbed([x], 7, 0.5, lambda: again.append(x.clone()) or 0.0)
    assert torch.equal(seen[0], again[0])


def test_only_what_is_named_is_trained():
    one = OneByte(network(), "a", rate=RATE, names=["2.bias"])
    before = flat(one.model)
    for step in range(5):
        one.apply({"a": one.measure(loss_of("a", step))})
    assert torch.equal(flat(one.model)[:-1], before[:-1]) and not torch.equal(flat(one.model)[-1], before[-1])


@pytest.mark.parametrize(
    "settings",
    [{"rate": 0.0}, {"rate": float("inf")}, {"eps": 0.0}, {"unit": -1.0}, {"names": ["3.weight"]}, {"names": []}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(UsageError):
        OneByte(network(), "a", **({"rate": RATE} | settings))


@pytest.mark.parametrize("sent", [{}, {"a": 128}, {"a": -128}])
def test_what_is_no_byte_is_refused(sent):
    with pytest.raises(UsageError, match="the bytes"):
        OneByte(network(), "a", rate=RATE).apply(sent)


def one_rank(ranks) -> tuple[bytes, list]:
    one = OneByte(network(), str(ranks.rank), rate=RATE)
    exchange, record = gather_bytes(), []
    for step in range(200):
        sent = exchange(one.machine, one.measure(loss_of(one.machine, step)))
        record.append(one.apply(sent))
    return flat(one.model).numpy().tobytes(), record


@pytest.mark.slow
def test_three_ranks_of_gloo_are_alike_to_the_bit_and_like_three_in_one_process():
    found = spawn(3, one_rank)
    there = machines("012")
    record = go(there, 200)
    assert {weights for weights, _ in found} == {flat(there["0"].model).numpy().tobytes()}
    assert all(theirs == record for _, theirs in found)


def test_the_order_in_which_bytes_arrive_changes_no_bit():
    found = []
    for names in (("a", "b", "c"), ("c", "a", "b")):
        torch.manual_seed(0)
        one = OneByte(nn.Linear(40, 5), "a", rate=0.1)
        for step in range(3):
            one.apply({name: 40 * "abc".index(name) - 39 + step for name in names})
        found.append(torch.cat([each.detach().flatten() for each in one.model.parameters()]))
    assert torch.equal(*found)
