"""Shards on a live transformers model: nothing changes at first; trained, to disk and back, and loaded by PEFT."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from turnout.errors import CheckpointError, ShapeError, StorageError, UnknownNameError, UsageError
from turnout.layers import Sharded
from turnout.models.checkpoint import write_adapter
from turnout.reshape import attach, attach_shards, detach, fold_adapters, fresh_adapters, load_shards, save_shards
from turnout.train import train_shards

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
MAPS = ("q_proj", "k_proj", "down_proj")


def model(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=64)
    return transformers.LlamaForCausalLM(config).eval()


def sharded(**options) -> nn.Module:
    options = {"budget": 2, "rank": 4, "shards": 2} | options
    return attach_shards(model(), MAPS, **options, generator=torch.Generator().manual_seed(1))[0]


def batches(count: int = 4) -> list:
    ids = torch.randint(64, (count, 2, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one, "labels": one} for one in ids]


def logits(made: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return made(batches()[0]["input_ids"]).logits


def trained(**options) -> nn.Module:
    made = sharded(**options)
    train_shards(made, batches(2) * 4, rate=2e-2)
    return made


@pytest.mark.parametrize("together", ["name", "shape"])
def test_it_computes_what_it_did_and_counts_truly(together):
    made, report = attach_shards(model(), MAPS, rank=4, shards=2, together=together)
    assert torch.equal(logits(made), logits(model()))
    assert sorted(map(len, report["groups"].values())) == [4, 4, 4]
    assert set(report["groups"]) == (set(MAPS) if together == "name" else {"all_32x32", "all_32x16", "all_48x32"})
    asking = [parameter for parameter in made.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in asking) == report["params_trained"] == 2 * 4 * (64 + 48 + 80)
    assert report["params_as_lora"] == 4 * 4 * (64 + 48 + 80)
    assert len(asking) == 6, "the pools, once each"


def test_they_alone_are_trained_and_detach_gives_the_very_model_back():
    made = model()
    made.lm_head.weight.requires_grad_(False)
    before, modules = {name: value.clone() for name, value in made.state_dict().items()}, dict(made.named_modules())
    wanted = logits(made)
    attach_shards(made, MAPS, rank=4, shards=2)
    losses = train_shards(made, batches(2) * 4, rate=2e-2)
    assert losses[-1] < losses[0] and not torch.allclose(logits(made), wanted, atol=1e-3)
    copied = copy.deepcopy(made)
    assert torch.allclose(logits(copied), logits(made), atol=1e-6)
    layer = copied.model.layers[0].self_attn.q_proj
    assert layer.paths is copied.turnout_shards["q_proj"] is not made.turnout_shards["q_proj"]
    detach(made)
    assert torch.equal(logits(made), wanted)
    assert dict(made.named_modules()) == modules
    assert {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])} == set()
    assert [name for name, parameter in made.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]
    attach_shards(made, MAPS, rank=4, shards=2)  # and again


def test_saved_and_loaded_and_one_ordinary_adapter_that_peft_loads(tmp_path):
    ours = trained()
    report = save_shards(tmp_path / "out", ours)
    assert report["params"] == 2 * 4 * (64 + 48 + 80) and len(report["modules"]) == 12
    again, _ = load_shards(model(), tmp_path / "out")
    assert torch.equal(logits(again), logits(ours))
    losses = train_shards(again, batches(1))  # and it goes on
    assert len(losses) == 1
    adapter = fold_adapters(ours, "mos")
    assert {a.shape[0] for a, _, _ in adapter.factor.values()} == {4}
    write_adapter(tmp_path / "peft", adapter)
    judge = peft.PeftModel.from_pretrained(model(), tmp_path / "peft").eval()
    assert torch.allclose(logits(judge), logits(ours), atol=1e-5)
    assert torch.allclose(logits(judge.merge_and_unload()), logits(ours), atol=1e-5)
    assert ours.generate(batches()[0]["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 11)


def test_half_precision_follows_the_model(tmp_path):
    made, _ = attach_shards(model().bfloat16(), MAPS, rank=4, shards=2)
    assert {one.down.dtype for one in made.turnout_shards.values()} == {torch.bfloat16}
    train_shards(made, batches(1), rate=1e-2)
    save_shards(tmp_path, made)
    again, _ = load_shards(model().bfloat16(), tmp_path)
    assert torch.equal(logits(again), logits(made))


def test_a_file_that_is_not_whole_or_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    save_shards(tmp_path, trained())
    file = tmp_path / "shards.safetensors"
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}
    body = json.loads(metadata["shards"])
    del metadata["sha256"]  # whoever forges it can make that too; what earlier versions wrote has none
    far = tensors["q_proj.index_up"].clone()
    far[0, 0, 0] = 16
    options = body["groups"]["q_proj"]["options"]
    wrong = {
        "turnout.shards/1": (tensors, metadata | {"format": "else"}),
        "it lacks 'modules'": (tensors, metadata | {"shards": json.dumps(body | {"groups": {"q_proj": {}}})}),
        "q_proj.index_up": (tensors | {"q_proj.index_up": far}, metadata),
        "k_proj.down": ({key: value for key, value in tensors.items() if key != "k_proj.down"}, metadata),
        "settings of q_proj": (tensors, metadata | {"shards": json.dumps(_with(body, options=options | {"rank": 99}))}),
        "modules of q_proj": (tensors, metadata | {"shards": json.dumps(_with(body, modules=["lm_head.else"]))}),
    }
    for match, (held, told) in wrong.items():
        plain = model()
        save_file(held, file, metadata=told)
        with pytest.raises(CheckpointError, match=match):
            load_shards(plain, tmp_path)
        assert torch.equal(logits(plain), logits(model()))
        assert not any(isinstance(module, Sharded) for module in plain.modules())
        assert all(parameter.requires_grad for parameter in plain.parameters())
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="modules of"):
        load_shards(model(layers=3), tmp_path)
    elsewhere = metadata | {"shards": json.dumps(body | {"base": "org/other"})}
    save_file(tensors, file, metadata=elsewhere)
    named = model()
    named.config._name_or_path = "org/this"
    with pytest.raises(ShapeError, match="other"):
        load_shards(named, tmp_path)
    load_shards(named, tmp_path, any_base=True)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="whole safetensors"):
        load_shards(model(), tmp_path)


def _with(body: dict, **changed) -> dict:
    return body | {"groups": body["groups"] | {"q_proj": body["groups"]["q_proj"] | changed}}


def test_what_cannot_be_done_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="q_proj"):
        attach_shards(model(), ["q_prj"])
    with pytest.raises(ShapeError, match="divisor"):
        attach_shards(model(), MAPS, shards=5)
    with pytest.raises(UsageError, match="rank"):
        attach_shards(model(), MAPS, rank=40, shards=2)
    with pytest.raises(UsageError, match="together"):
        attach_shards(model(), MAPS, together="all")
    with pytest.raises(UsageError, match="adapters already"):
        attach_shards(sharded(), MAPS)
    with pytest.raises(UsageError, match="adapters already"):
        attach(sharded(), fresh_adapters(model(), ["o_proj"], count=1, rank=2))
    for refused in (lambda: save_shards(tmp_path, model()), lambda: train_shards(model(), [])):
        with pytest.raises(UsageError, match="no shards"):
            refused()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        save_shards(tmp_path / "file", sharded())
