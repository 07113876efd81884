"""Folders of PEFT, read as PEFT reads them or refused by name; PEFT is the judge."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from turnout.errors import CheckpointError, UsageError
from turnout.models.checkpoint import PeftAdapter, read_adapter, write_adapter
from turnout.models.checkpoint.lora_config import _FREE, _OFF, _READ, LoraSettings
from turnout.reshape import attach

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
WEIGHTS = "adapter_model.safetensors"
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = {
    "llama": WIDE,
    "qwen2": WIDE,
    "gemma": WIDE | {"head_dim": 8},
    "qwen3_moe": WIDE | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": WIDE | {"num_local_experts": 4},
    "gpt_neox": SIZES | {"intermediate_size": 48, "max_position_embeddings": 64},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def model(kind: str = "llama", dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(KINDS[kind] | {"pad_token_id": None} | more))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def folder(tmp_path, kind="llama", name="one", base=None, **settings):
    """A folder that PEFT wrote, of an adapter with random factors."""
    if settings or base is not None or kind != "llama":
        return written(tmp_path / name, base or model(kind), settings)
    if not PLAIN:
        PLAIN.append(written(Path(tempfile.mkdtemp()) / "one", model(), {}))
    return Path(shutil.copytree(PLAIN[0], tmp_path / name))


PLAIN: list[Path] = []  # most tests change a file of the same folder: PEFT writes it once


def written(path, base, settings):
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings))
    )
    chance = torch.Generator().manual_seed(1)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=chance)
    wrapped.save_pretrained(path)
    return path


def change(path, **settings):
    config = json.loads((path / "adapter_config.json").read_text()) | settings
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def ids() -> torch.Tensor:
    return torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


ACCEPTED = [
    ("llama", {}),
    ("llama", {"r": 3, "lora_alpha": 5, "use_rslora": True}),
    ("llama", {"lora_alpha": -3.5, "lora_dropout": 0.5}),
    ("llama", {"init_lora_weights": "gaussian", "fan_in_fan_out": False}),
    ("llama", {"init_lora_weights": False}),
    ("llama", {"init_lora_weights": "orthogonal"}),
    ("llama", {"init_lora_weights": "mica"}),
    ("llama", {"target_modules": r"model\.layers\.1\..*(q|down)_proj"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r".*layers\.0.*"}),
    ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"layers_to_transform": 0}),
    (
        "llama",
        {"rank_pattern": {"q_proj": 5, r"layers\.1\..*v_proj": 2}, "alpha_pattern": {"1.self_attn.[qv]_proj": 3}},
    ),
    ("llama", {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 7, "v_proj": 2}}),
    ("llama", {"alpha_pattern": {"model.layers.0.self_attn.q_proj$": 1, "(?:.*)q_proj": 2}, "use_rslora": True}),
    ("llama", {"bias": "none", "task_type": "CAUSAL_LM", "inference_mode": True, "revision": "main"}),
    ("qwen2", {"target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj"]}),
    ("gemma", {"target_modules": ["q_proj", "up_proj", "down_proj"], "use_rslora": True}),
    ("qwen3_moe", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}),
    ("mixtral", {"target_modules": ["o_proj"]}),
    ("gpt_neox", {"target_modules": ["query_key_value", "dense"], "fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("kind", "settings"), ACCEPTED)
@torch.no_grad()
def test_what_is_accepted_is_what_peft_makes_of_it(tmp_path, kind, settings):
    path = folder(tmp_path, kind, **settings)
    wanted = peft.PeftModel.from_pretrained(model(kind), path).eval()(ids()).logits
    ours, _ = attach(model(kind), [path], router="even")
    got, bare = ours(ids()).logits, model(kind)(ids()).logits
    assert float((got - wanted).abs().max()) <= 1e-5
    assert float((got - bare).abs().max()) > 1e-3, "the adapter does something"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_factors_of_other_types_too(tmp_path, dtype):
    path = folder(tmp_path)
    tensors = load_file(path / WEIGHTS)
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, path / WEIGHTS, metadata={"format": "pt"})
    wanted = peft.PeftModel.from_pretrained(model(), path).eval()(ids()).logits
    ours, _ = attach(model(), [path], router="even")
    assert float((ours(ids()).logits - wanted).abs().max()) <= 1e-5


REFUSED = [
    ("init_lora_weights", {"init_lora_weights": "pissa"}),
    ("init_lora_weights", {"init_lora_weights": "pissa_niter_2"}),
    ("init_lora_weights", {"init_lora_weights": "olora"}),
    ("use_dora", {"use_dora": True}),
    ("lora_bias", {"lora_bias": True}),
    ("bias", {"bias": "all"}),
    ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
    ("layer_replication", {"layer_replication": [[0, 2], [1, 2]]}),
    ("alora_invocation_tokens", {"alora_invocation_tokens": [5, 6]}),
    ("LoRA of an embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
]


@pytest.mark.parametrize(("name", "settings"), REFUSED)
def test_what_is_more_than_factors_is_refused_by_name(tmp_path, name, settings):
    path = folder(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=name):
        read_adapter(path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_factors_of_fused_experts_are_refused_by_name(tmp_path, kind):
    path = folder(tmp_path, kind, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    with pytest.raises(CheckpointError, match="target_parameters"):
        read_adapter(path)
    with pytest.raises(CheckpointError, match="base_layer"):
        read_adapter(change(path, target_parameters=None))


def test_maps_that_store_in_by_out_are_refused_by_name(tmp_path):
    path = folder(tmp_path, "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    with pytest.raises(UsageError, match="c_attn, a Conv1D"):
        attach(model("gpt2"), [path], router="even")


# Values that a file may hold and PEFT's own constructor may not: name -> what to write.
WRITTEN = [
    *[("init_lora_weights", start) for start in ("PISSA", "corda", "loftq", "lora_ga", "EVA", 1, 0, [], "True", "x")],
    *[(name, True) for name in ("use_qalora", "use_bdlora", "ensure_weight_tying", "enable_lora")],
    *[(name, {"a": 1}) for name in ("arrow_config", "velora_config", "kasa_config", "megatron_config")],
    *[("r", rank) for rank in (0, -1, "4", 4.0, True, None, 5)],
    *[("lora_alpha", alpha) for alpha in ("8", None, True, 10**400)],
    *[("rank_pattern", {"q_proj": rank}) for rank in (0, "4", 4.5, 7)],
    *[
        ("rank_pattern", pattern)
        for pattern in ([], ["q_proj"], 3, {"(": 4}, {"(a)\\1": 4}, {"(?=q)": 4})
        if pattern != []
    ],
    *[("alpha_pattern", {"q_proj": alpha}) for alpha in ("x", None, [1])],
    *[("alpha_pattern", {pattern: 1}) for pattern in ("[", "a{9999}{9999}", "(?i)q")],
    *[("target_modules", names) for names in (None, ["q_proj"], "(.*", ".*k_proj", [1], {"q_proj": 1}, 3)],
    *[("exclude_modules", names) for names in (["v_proj"], ".*v_proj", "*")],
    *[("layers_to_transform", layers) for layers in ([0], 0, "0", [True])],
    ("use_rslora", "yes"),
    ("peft_type", "XLORA"),
    ("base_model_name_or_path", 3),
    ("a_field_of_the_future", 7),
]


@pytest.mark.parametrize(("name", "value"), WRITTEN, ids=lambda value: str(value)[:20])
def test_values_that_are_not_known_are_refused_by_name(tmp_path, name, value):
    path = folder(tmp_path)
    with pytest.raises(
        CheckpointError, match="rank" if (name, value) in (("r", 5), ("rank_pattern", {"q_proj": 7})) else name
    ):
        read_adapter(change(path, **{name: value}))


def test_fields_of_older_and_newer_versions_that_are_off_are_taken(tmp_path):
    path = folder(tmp_path)
    factor = read_adapter(path).factor
    off = dict.fromkeys(_OFF) | {
        "a_field_of_the_future": None,
        "another": False,
        "one_more": [],
        "merge_weights": False,
    }
    assert read_adapter(change(path, **off)).factor.keys() == factor.keys()
    least = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(least))
    assert read_adapter(path).factor.keys() == factor.keys()


def test_every_field_of_this_version_of_peft_is_decided():
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert known <= _FREE | _READ | set(_OFF)
    assert len(_FREE | _READ | set(_OFF)) == len(_FREE) + len(_READ) + len(_OFF)


def named(path, key: str, tensor=None):
    """The same folder with one more tensor, or one under another name."""
    tensors = load_file(path / WEIGHTS)
    tensors[key] = torch.ones(4, 32) if tensor is None else tensor
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path


PRE = "base_model.model.model."


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"{PRE}embed_tokens.lora_embedding_A", "LoRA of an embedding"),
        (f"{PRE}layers.0.self_attn.q_proj.lora_A.default.weight", "adapter's name is left in the key"),
        (f"{PRE}layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        (f"{PRE}layers.0.self_attn.q_proj.lora_B.bias", "a bias of the adapter"),
        (f"{PRE}layers.0.self_attn.q_proj.base_layer.bias", "weights of the base model"),
        (f"{PRE}layers.0.self_attn.q_proj.base_layer.lora_A.weight", "weights of the base model"),
        (f"{PRE}layers.0.self_attn.q_proj.bias", "trained bias"),
        ("base_model.model.score.modules_to_save.default.weight", "whole module"),
        (f"{PRE}layers.0.self_attn.q_proj.lora_diag", "another kind"),
        ("model.layers.0.self_attn.k_proj.lora_A.weight", "without 'base_model.model.'"),
        ("base_model.model.odd", "not a factor of LoRA"),
        (f"{PRE}layers.0.self_attn.k_proj.lora_A.weight", r"k_proj in adapter_model.*None"),
    ],
)
def test_tensors_beside_the_factors_are_refused_by_name(tmp_path, key, said):
    path = named(folder(tmp_path), key)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_adapter(path)
    assert key.removesuffix(".lora_A.weight").removeprefix("base_model.model.") in str(caught.value)


def test_resized_embeddings_are_refused_on_a_base_without_them(tmp_path):
    base = tmp_path / "base"
    model().save_pretrained(base)
    bigger = transformers.AutoModelForCausalLM.from_pretrained(base)
    bigger.resize_token_embeddings(72)
    path = folder(tmp_path, base=bigger)
    with pytest.raises(CheckpointError, match=r"lm_head \(72, 32\), model\.embed_tokens \(72, 32\)"):
        attach(model(), [path], router="even")
    other = transformers.AutoModelForCausalLM.from_pretrained(base)
    other.resize_token_embeddings(72)
    other.lm_head.weight.data[70:] += 1
    with pytest.raises(CheckpointError, match="belongs to the base"):
        attach(other, [path], router="even")
    with torch.no_grad():
        wanted = bigger(ids()).logits  # PEFT put its layers into it
        other.load_state_dict(
            {key.replace(".base_layer", ""): value for key, value in bigger.state_dict().items()}, strict=False
        )
        assert float((attach(other, [path], router="even")[0](ids()).logits - wanted).abs().max()) <= 1e-5


@pytest.mark.parametrize("key", ["base_model.model.score.weight", f"{PRE}layers.0.self_attn.q_proj.base_layer.weight"])
def test_weights_that_are_not_those_of_the_base_are_refused(tmp_path, key):
    with pytest.raises(CheckpointError, match=r"score|q_proj"):
        attach(model(), [named(folder(tmp_path), key)], router="even")


FIRST = f"{PRE}layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.full((4, 32), float("nan")), "128 of 128 numbers"),
        (torch.ones(4, 32).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(float("inf"))), "1 of 128"),
        (torch.ones(4, 32, dtype=torch.int64), r"torch\.int64"),
        (torch.ones(4, 32, dtype=torch.bool), r"torch\.bool"),
        (torch.ones(3, 32), "shapes"),
        (torch.ones(4, 32, 1), "shapes"),
        (torch.ones(128), "shapes"),
        (torch.ones(0, 32), "shapes"),
        (torch.ones(4, 0), "shapes"),
    ],
    ids=str,
)
def test_factors_that_are_no_finite_matrices_are_refused_by_name(tmp_path, tensor, said):
    path = named(folder(tmp_path), FIRST, tensor)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_adapter(path)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)


def test_factors_without_those_modules_in_the_settings_are_refused(tmp_path):
    path = folder(tmp_path, target_modules=["q_proj", "v_proj", "k_proj"])
    with pytest.raises(CheckpointError, match=r"target_modules.*k_proj"):
        read_adapter(change(path, target_modules=["q_proj", "v_proj"]))


@torch.no_grad()
def test_factors_that_a_folder_lacks_are_told_and_refused_where_they_would_be_random(tmp_path):
    path = folder(tmp_path)
    tensors = {key: tensor for key, tensor in load_file(path / WEIGHTS).items() if "layers.1" not in key}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    ours, report = attach(model(), [path], router="even")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        wanted = peft.PeftModel.from_pretrained(model(), path).eval()
    assert float((ours(ids()).logits - wanted(ids()).logits).abs().max()) <= 1e-5
    assert report.notes == ("one has no factors for 2 maps that its settings name: model.layers.1.self_attn.q_proj",)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj.*of 2 without"):
        attach(model(), [change(path, init_lora_weights=False)], router="even")


def test_patterns_that_would_hang_are_read_at_once(tmp_path):
    path = change(folder(tmp_path), rank_pattern={"(.*a)*" * 8 + "b": 9}, alpha_pattern={"([a-z_.0-9]+)+!": 9})
    assert read_adapter(path).factor["model.layers.0.self_attn.q_proj"][2] == 2


def test_an_adapter_of_another_name_lies_one_deeper_and_the_error_says_where(tmp_path):
    wrapped = peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="math")
    wrapped.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"name .*out/math"):
        read_adapter(tmp_path / "out")
    assert read_adapter(tmp_path / "out" / "math").name == "math"


def test_a_pipe_or_a_link_that_leaves_the_folder_is_refused(tmp_path):
    path = folder(tmp_path)
    (path / WEIGHTS).rename(tmp_path / "elsewhere")
    (path / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_adapter(path)
    (path / WEIGHTS).unlink()
    os.mkfifo(path / WEIGHTS)
    with pytest.raises(CheckpointError, match="pipe"):
        read_adapter(path)


@torch.no_grad()
def test_what_is_written_keeps_the_ranks_of_names_that_end_alike(tmp_path):
    chance = torch.Generator().manual_seed(0)
    sizes = {"lin": (5, 3.0), "a.lin": (2, 1.0), "b.a.lin": (5, 3.0)}
    factor = {
        name: (torch.randn(rank, 4, generator=chance), torch.randn(4, rank, generator=chance), scale)
        for name, (rank, scale) in sizes.items()
    }
    for first in sizes:
        ordered = {name: factor[name] for name in (first, *(set(sizes) - {first}))}
        write_adapter(tmp_path / first, PeftAdapter(first, None, ordered))
        again = read_adapter(tmp_path / first).factor
        assert {name: (a.shape[0], scale) for name, (a, _, scale) in again.items()} == sizes


def test_any_damage_to_the_settings_is_refused_or_changes_nothing(tmp_path):
    """Fields replaced by values of every other type: the same factors and scales, or a worded refusal."""
    path = folder(tmp_path, rank_pattern={"q_proj": 5}, layers_to_transform=[0, 1])
    config = json.loads((path / "adapter_config.json").read_text())
    ranks = {name: a.shape[0] for name, (a, _, _) in read_adapter(path).factor.items()}

    def bad(what, got, allowed, fix):
        raise CheckpointError(what)

    values = [None, True, 0, 1, -1, 2.5, "", "x", [], [1], ["q_proj"], {}, {"q_proj": 5}, [[]], {"a": {}}, 10**30]
    taken = 0
    for name in config:
        for value in values:
            with contextlib.suppress(CheckpointError):
                settings = LoraSettings(config | {name: value}, bad)
                scales = [settings.scale(module, rank) for module, rank in ranks.items() if settings.targeted(module)]
                assert (
                    scales == [8 / 5, 2.0] * 2
                    or name in ("lora_alpha", "alpha_pattern", "use_rslora")
                    or (
                        len(scales) < 4
                        and name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
                    )
                ), (name, value)
                taken += 1
    assert taken > 100
