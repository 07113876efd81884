"""Learned routers: trained on a live transformers model, saved, loaded whole or not at all; ScaLearn as one adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from turnout.errors import CheckpointError, UsageError
from turnout.layers import given
from turnout.models.checkpoint import PeftAdapter, write_adapter
from turnout.reshape import (
    attach,
    attach_folder,
    fold_adapters,
    load_routers,
    save_adapters,
    save_attached,
    save_routers,
)
from turnout.storage import save_tensors
from turnout.train import train_routers

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
MAPS = ("self_attn.q_proj", "mlp.down_proj")


def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64)).eval()


def adapters(tmp_path) -> list:
    """Two folders of PEFT, of different ranks and scales, q_proj of the second layer in the first alone."""
    paths = []
    for n, rank in enumerate((2, 3)):
        generator = torch.Generator().manual_seed(n)
        factor = {}
        for layer in range(2):
            for name in MAPS:
                width = 48 if name == MAPS[1] else 32
                a, b = torch.randn(rank, width, generator=generator), torch.randn(32, rank, generator=generator)
                factor[f"model.layers.{layer}.{name}"] = (0.2 * a, 0.2 * b, 1.0 + n)
        if n:
            del factor[f"model.layers.1.{MAPS[0]}"]
        paths.append(tmp_path / f"a{n}")
        write_adapter(paths[-1], PeftAdapter(f"a{n}", None, factor))
    return paths


def batches(count: int = 4) -> list:
    ids = torch.randint(64, (count, 2, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one, "labels": one} for one in ids]


def trained(tmp_path, name: str, **options) -> nn.Module:
    made, _ = attach(model(), adapters(tmp_path), router=name, router_options=options)
    torch.manual_seed(1)
    train_routers(made, batches(), rate=0.05)
    return made


@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"share": True}, {"uniform": True, "share": True}])
def test_scalearn_learns_saves_and_is_one_ordinary_adapter_that_peft_loads(tmp_path, options):
    ours, ids = trained(tmp_path, "scalearn", **options), batches()[0]["input_ids"]
    with torch.no_grad():
        wanted = ours(ids).logits
        write_adapter(tmp_path / "one", fold_adapters(ours, "one"))
        judge = peft.PeftModel.from_pretrained(model(), tmp_path / "one").eval()
        assert torch.allclose(judge(ids).logits, wanted, atol=1e-5)
    width = 1 if options.get("uniform") else 32
    sites = 4 if not options.get("share") else 3  # q_proj has two adapters in one layer and one in the other
    adapters_at = [2, 2, 1, 2] if sites == 4 else [2, 1, 2]
    routers = {id(p): p for name, p in ours.named_parameters() if name.endswith("omega")}
    assert sum(p.numel() for p in routers.values()) == width * sum(adapters_at)
    save_routers(tmp_path / "out", ours)
    again, _ = attach(model(), adapters(tmp_path), router="scalearn", router_options=options)
    with torch.no_grad():
        assert not torch.equal(again(ids).logits, wanted)
        load_routers(again, tmp_path / "out")
        assert torch.equal(again(ids).logits, wanted)


def test_a_saved_choice_of_adapters_carries_what_its_routers_learned(tmp_path):
    ours, ids = trained(tmp_path, "smear", dropout=0.0), batches()[0]["input_ids"]
    save_adapters(tmp_path / "out", adapters(tmp_path), router="smear", router_options={"dropout": 0.0})
    save_routers(tmp_path / "out", ours)
    again, _ = attach_folder(model(), tmp_path / "out")
    with torch.no_grad(), given(mask_BS=torch.ones(2, 9)):
        assert torch.equal(again(ids).logits, ours(ids).logits)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    ours = trained(tmp_path, "smear")
    save_routers(tmp_path / "out", ours)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    other, _ = attach(model(), adapters(tmp_path), router="scalearn")
    with pytest.raises(CheckpointError, match="SMEAR"):
        load_routers(other, tmp_path / "out")
    wide, _ = attach(model(), adapters(tmp_path), router="smear", router_options={"query_width": 5})
    with pytest.raises(CheckpointError, match=r"shape \(48,\)"):
        load_routers(wide, tmp_path / "out")
    one, _ = attach(model(), adapters(tmp_path)[:1], router="smear")
    with pytest.raises(CheckpointError, match="down_proj"):
        load_routers(one, tmp_path / "out")
    file = tmp_path / "out" / "routers.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="whole safetensors"):
        load_routers(ours, tmp_path / "out")
    with pytest.raises(CheckpointError, match="whole safetensors"):
        load_routers(ours, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    with pytest.raises(UsageError, match="a SMEAR at"):
        fold_adapters(ours, "one")
    with pytest.raises(UsageError, match="attach"):
        save_routers(tmp_path, model())


def test_a_mean_of_factors_asks_for_adapters_of_the_same_maps():
    factor = (torch.ones(1, 4), torch.ones(4, 1), 1.0)
    found = [PeftAdapter("a", None, {"0": factor, "1": factor}), PeftAdapter("b", None, {"0": factor})]
    ours, _ = attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), found, router="poly")
    with pytest.raises(UsageError, match="a at 1"):
        fold_adapters(ours, "mean", task="average")
    assert fold_adapters(ours, "first", task=0).factor.keys() == {"0", "1"}


def test_adapters_keep_their_order_by_which_routers_know_them(tmp_path):
    chance = torch.Generator().manual_seed(0)

    def factor() -> tuple:
        return torch.randn(2, 4, generator=chance), torch.randn(4, 2, generator=chance), 1.0

    # The first of the list changes the last map only: in the order of the maps it comes second.
    found = [PeftAdapter("z", None, {"1": factor()}), PeftAdapter("a", None, {"0": factor(), "1": factor()})]

    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()

    ours, _ = attach(plain(), found, router="smear")
    with torch.no_grad():
        ours[1].router.bias.copy_(torch.tensor([2.0, -2.0]))
    save_attached(tmp_path / "out", ours)
    again, report = attach_folder(plain(), tmp_path / "out")
    x_BSD = torch.randn(2, 3, 4, generator=chance)
    assert report["adapters"] == ["z", "a"] and torch.equal(again(x_BSD), ours(x_BSD))
    other, _ = attach(plain(), found[::-1], router="smear")
    with pytest.raises(CheckpointError, match=r"got \['SMEAR', 2, \['z', 'a'\]\]"):
        load_routers(other, tmp_path / "out")
    file = tmp_path / "out" / "routers.safetensors"
    kinds = json.dumps({"0": ["SMEAR", 1], "1": ["SMEAR", 2]})  # of before there were names
    save_tensors(file, load_file(file), {"format": "turnout.routers/1", "routers": kinds})
    assert load_routers(again, tmp_path / "out")[1]["modules"] == ["0", "1"]


def test_routers_that_are_not_finite_are_refused_by_name(tmp_path):
    factor = {"0": (torch.ones(1, 4), torch.ones(4, 1), 1.0)}
    found = [PeftAdapter("a", None, factor), PeftAdapter("b", None, factor)]
    ours, _ = attach(nn.Sequential(nn.Linear(4, 4)), found, router="smear")
    before = ours[0].router.weight.detach().clone()
    ours[0].router.weight.data[1, 2] = float("nan")
    save_routers(tmp_path, ours)
    ours[0].router.weight.data.copy_(before)
    with pytest.raises(CheckpointError, match=r"0\.weight must be finite"):
        load_routers(ours, tmp_path)
    assert torch.equal(ours[0].router.weight, before)
