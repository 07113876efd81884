"""Glider on a live model: gates from the folders, embeddings from the caller, requests by ``given``."""

import pytest
import torch
from torch import nn

from turnout.errors import ShapeError, UsageError
from turnout.layers import given
from turnout.models.checkpoint import PeftAdapter, write_adapter, write_gates
from turnout.reshape import attach, attach_folder, detach, save_adapters, save_attached

WIDTH, OUT = 8, 6
EMBEDDINGS = {"a0": torch.tensor([1.0, 0.0, 0.1]), "a1": torch.tensor([0.0, 1.0, 0.3])}


@pytest.fixture
def folders(tmp_path):
    chance = torch.Generator().manual_seed(0)
    found = [tmp_path / name for name in EMBEDDINGS]
    for path in found:
        factor = {"0": (torch.randn(2, WIDTH, generator=chance), torch.randn(OUT, 2, generator=chance), 0.5)}
        write_adapter(path, PeftAdapter(path.name, "tiny", factor))
        write_gates(path, {"0": torch.randn(WIDTH, generator=chance)})
    return found


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, OUT))


def x() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_request_that_is_an_adapters_own_gets_that_adapter(folders):
    ours, report = attach(model(), folders, router="glider", router_options={"embeddings": EMBEDDINGS})
    with given(query_BQ=torch.stack([5 * EMBEDDINGS["a1"], EMBEDDINGS["a0"]])):
        found = ours(x())
    assert report["params_router"] == 2 * (WIDTH + 3)
    for row, folder in ((0, folders[1]), (1, folders[0])):
        alone, _ = attach(model(), [folder], router="even")
        assert torch.allclose(found[row], alone(x())[row], atol=1e-5)


@torch.no_grad()
def test_a_saved_choice_comes_back_to_the_bit(folders, tmp_path):
    options = {"embeddings": EMBEDDINGS, "threshold": 0.5}
    ours, _ = attach(model(), folders, router="glider", router_options=options)
    save_adapters(tmp_path / "out", folders, router="glider", router_options=options)
    again, _ = attach_folder(model(), tmp_path / "out")
    with given(query_BQ=torch.randn(2, 3, generator=torch.Generator().manual_seed(2))):
        assert torch.equal(again(x()), ours(x()))
        save_attached(tmp_path / "other", ours)
        assert torch.equal(attach_folder(model(), tmp_path / "other")[0](x()), ours(x()))
    with pytest.raises(UsageError, match="router_options"):
        save_adapters(tmp_path / "third", folders, router="glider", router_options={"embeddings": object()})


def test_what_is_missing_is_named(folders):
    net = model()
    with pytest.raises(UsageError, match=r"a0, a1.*SentenceEncoder"):
        attach(net, folders, router="glider")
    with pytest.raises(UsageError, match="none for a1"):
        attach(net, folders, router="glider", router_options={"embeddings": {"a0": EMBEDDINGS["a0"]}})
    with pytest.raises(ShapeError, match="same encoder"):
        attach(net, folders, router="glider", router_options={"embeddings": EMBEDDINGS | {"a1": [1.0, 2.0]}})
    attach(net, folders, router="glider", router_options={"embeddings": EMBEDDINGS})
    with pytest.raises(UsageError, match="query_BQ"):
        net(x())
    detach(net)
    (folders[1] / "phatgoose.safetensors").unlink()
    with pytest.raises(UsageError, match="train_gates"):
        attach(net, folders, router="glider", router_options={"embeddings": EMBEDDINGS})
