"""What stands beside a model, its adapters, pools and clients, keeps to the device of the model too: see pretend.py."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from turnout.layers import given
from turnout.models import LM, LMConfig
from turnout.reshape import add_low_rank, fold_adapters, fold_low_rank, low_rank_adapter, save_attached, save_shards
from turnout.train import Client, federate, fedjets, train_routers, train_shards

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "train")]
from pretend import CUDA, Pretend, pretending
from stand_in import lines
from tables import cases

CPU = torch.device("cpu")


def alike(work: Callable[[torch.device], list[torch.Tensor]], *, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """What the work gives here and there: the same numbers, and there on the device."""
    here = work(CPU)
    with pretending():
        there = work(CUDA)
        assert here and all(type(one.detach()) is Pretend for one in there)
        for one, other in zip(there, here, strict=True):
            torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=rtol, atol=atol)


def put(value, device: torch.device):
    if isinstance(value, dict):
        return {name: put(one, device) for name, one in value.items()}
    return value.to(device)


@pytest.mark.parametrize("kind", ["smear", "smear-query", "poly", "mhr", "glider", "fedins", "scalearn"])
@pytest.mark.parametrize("beside", [True, False], ids=["there", "here"])
def test_what_is_said_of_sequences_may_lie_anywhere(kind: str, beside: bool) -> None:
    told = cases("layers/test_told.py")
    models = [told.heard(kind), told.heard(kind)]
    said = dict(told.SAYS[0])

    def work(device: torch.device) -> list[torch.Tensor]:
        model = models.pop().to(device)
        about = put(said, device) if beside else said
        with given(**about):
            y = model(inputs_embeds=told.x().to(device), attention_mask=told.MASK.to(device if beside else CPU))
        y.square().sum().backward()
        return [y, *(p.grad for p in model.parameters() if p.grad is not None)]

    alike(work)


@pytest.mark.parametrize("parts", [1, 4])
def test_poly_is_trained_saved_and_folded_there(parts: int, tmp_path) -> None:
    poly = cases("reshape/test_poly.py")
    made = [poly.inventory(parts), poly.inventory(parts)]

    def work(device: torch.device) -> list[torch.Tensor]:
        model = made.pop().to(device)
        ours = [fold_adapters(model, "one", task=task) for task in (1, "average")]
        save_attached(tmp_path / device.type, model)
        batch = put(poly.batches()[0], device)
        with given(task_B=batch["task_B"]):
            model(batch["input_ids"], labels=batch["labels"]).loss.backward()
        slopes = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert slopes
        train_routers(model, [put(batch, device) for batch in poly.batches()], rate=1e-2)
        return [*slopes, *(tensor for one in ours for name in sorted(one.factor) for tensor in one.factor[name][:2])]

    alike(work)


def test_shards_are_trained_and_saved_there(tmp_path) -> None:
    shards = cases("reshape/test_shards.py")
    bare = [shards.model(), shards.model()]

    def work(device: torch.device) -> list[torch.Tensor]:
        chance = torch.Generator().manual_seed(1)
        attach = shards.attach_shards
        model, _ = attach(bare.pop().to(device), shards.MAPS, budget=2, rank=4, shards=2, generator=chance)
        train_shards(model, [put(batch, device) for batch in shards.batches(2)], rate=2e-2)
        save_shards(tmp_path / device.type, model)
        return [p for p in model.parameters() if p.requires_grad]

    alike(work)


def test_pools_of_scales_and_shifts() -> None:
    pools = cases("reshape/test_scale_and_shift.py")

    def work(device: torch.device) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).to(device)
        sizes = {"query_width": 4, "pool_size": 5, "top_k": 2}
        model, _ = pools.scale_and_shift(net, ["0", "1"], query=nn.Identity(), trained=["3"], **sizes)
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).to(device)
        y = model(x)
        (y.square().sum() + model.match(x)).backward()
        return [y, *(p.grad for p in model.parameters() if p.grad is not None)]

    alike(work)


@pytest.mark.parametrize("jets", [True, False])
def test_federated_training(jets: bool) -> None:
    model, clients = cases("train/test_fedjets.py").world()
    models = [copy.deepcopy(model), model]

    def descend(model: nn.Module, client: Client, *, generator: torch.Generator) -> None:
        loss = nn.functional.cross_entropy(model(client.data[0]), client.data[1])
        with torch.no_grad():
            for p, slope in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                p.sub_(0.1 * slope)

    def work(device: torch.device) -> list[torch.Tensor]:
        model = models.pop().to(device)
        here = [Client(one.name, tuple(part.to(device) for part in one.data), size=one.size) for one in clients]
        if jets:
            fedjets(model, here, rounds=2, per_round=1, anchors={0: 2, 1: 0}, anchor_rounds=1, keep=2, steps=2)
        else:
            federate(model.experts[0], here, descend, rounds=2, per_round=3)
        return list(model.parameters())

    alike(work)


def test_adapters_of_low_rank() -> None:
    lms = [LM(LMConfig(61, width=16, layers=2, heads=2, hidden=24, max_seq=32)) for _ in range(2)]
    id_BS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))

    def work(device: torch.device) -> list[torch.Tensor]:
        lm, _ = add_low_rank(lms.pop().to(device), rank=2, seed=3)
        lm.loss(id_BS.to(device), id_BS.to(device)).nats.backward()
        slopes = [p.grad for name, p in lm.named_parameters() if "added" in name]
        with torch.no_grad():
            for name, p in lm.named_parameters():
                p.add_(0.1 if "added" in name else 0)
        adapter = low_rank_adapter(lm, "one")
        found = [tensor for name in sorted(adapter.factor) for tensor in adapter.factor[name][:2]]
        fold_low_rank(lm)
        return [*slopes, *found, *lm.parameters()]

    alike(work)


def test_the_sums_of_an_unfinished_window_go_on_there(tmp_path) -> None:
    from turnout.train import TrainConfig, train
    from turnout.train.data import Document, prepare

    runs = cases("devices/test_runs.py")
    texts = [Document(str(n), f"text number {n} and so on " + "word " * (n % 7)) for n in range(40)]
    tokens = prepare({"d": texts}, tmp_path / "t", vocab_size=265, held_out=0.3, quiet=True)
    sizes = {"batch": 2, "seq": 32, "lr": 1e-2, "log_every": 4, "checkpoint_every": 3, "eval_every": 6}
    found = []
    for device in ("cpu", "cuda"):
        with pretending():
            for steps, resume in ((6, False), (6, "step-00000003")):
                config = TrainConfig(steps=steps, device=device, **sizes)
                train(LM(runs.MODEL), tokens, config, tmp_path / device, resume=resume, quiet=True)
        found.append([line["loss"] for line in lines(tmp_path / device) if line["kind"] == "train"])
    assert found[1] == pytest.approx(found[0], rel=1e-3) and len(found[0]) == 3
