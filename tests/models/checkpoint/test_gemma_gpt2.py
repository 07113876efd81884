"""Folders of Gemmas and of GPT-2 as they were published, and keys of theirs that ask for something else."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_huggingface import assert_same, theirs, transformers

from turnout.errors import CheckpointError
from turnout.models import checkpoint

GEMMA = {"vocab_size": 67, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 8}
GEMMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 5, "max_position_embeddings": 64}


def change(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    body = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({name: value for name, value in body.items() if value is not ...}))


def stock(folder: Path) -> Any:
    model, notes = transformers().AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values()), notes
    return model.eval()


def test_a_gpt2_without_the_prefix_and_with_its_masks(tmp_path: Path) -> None:
    """As openai-community/gpt2 is: saved without the output layer, with the causal masks that it once stored."""
    hf = theirs("gpt2")
    hf.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    masks = {f"h.{n}.attn.bias": torch.ones(64, 64).tril()[None, None] for n in range(3)}
    masks |= {f"h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(3)}
    save_file(bare | masks, file, metadata={"format": "pt"})
    change(tmp_path / "a", n_ctx=64, summary_type="cls_index", task_specific_params={}, tie_word_embeddings=...)
    lm = checkpoint.from_hf(tmp_path / "a")
    assert_same(hf, lm)
    checkpoint.to_hf(lm, tmp_path / "b")
    assert set(load_file(tmp_path / "b" / "model.safetensors")) == set(bare)
    assert_same(stock(tmp_path / "b"), lm)


def test_a_gpt2_may_be_cut_into_shards_by_layers(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path / "a")
    lm = checkpoint.from_hf(tmp_path / "a")
    lm.origin = None
    checkpoint.to_hf(lm, tmp_path / "b", shard_bytes=20_000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    for layer in range(2):  # in the order of the layers
        last = max(file for name, file in index.items() if f".h.{layer}." in name)
        assert last <= min(file for name, file in index.items() if f".h.{layer + 1}." in name)
    assert_same(stock(tmp_path / "b"), lm)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}])
def test_a_gemma3_with_the_keys_of_transformers_4(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers().Gemma3TextConfig(**GEMMA, initializer_range=0.3)
    transformers().Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    change(
        tmp_path,
        layer_types=...,
        rope_parameters=...,
        _sliding_window_pattern=...,
        sliding_window_pattern=3,
        rope_theta=5e3,
        rope_local_base_freq=200.0,
        rope_scaling=scaling,
    )
    hf, lm = stock(tmp_path), checkpoint.from_hf(tmp_path)
    assert [lm.config.window_of(n) for n in range(4)] == [5, 5, None, 5]
    assert lm.config.rope_of(2) == (5e3, scaling) and lm.config.rope_of(0) == (200.0, None)
    assert_same(hf, lm)


def test_what_a_folder_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    for kind in ("gemma", "gemma2", "gemma3"):
        theirs(kind).save_pretrained(tmp_path / kind)
        gone = ("hidden_activation", "hidden_act", "tie_word_embeddings", "final_logit_softcapping", "sliding_window")
        gone += ("attn_logit_softcapping", "query_pre_attn_scalar", "layer_types", "rope_parameters", "attention_bias")
        change(tmp_path / kind, **dict.fromkeys(gone, ...))
        assert_same(stock(tmp_path / kind), checkpoint.from_hf(tmp_path / kind))


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' must be False"),
        ("gemma", {"hidden_activation": "relu"}, "'hidden_activation' must be left out"),
        ("gemma", {"hidden_act": "quick_gelu"}, "hidden_act must be one of"),
        ("gemma", {"final_logit_softcapping": "thirty"}, "'final_logit_softcapping' is 'thirty'"),
        ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' must be False"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' must be at least 1"),
        ("gemma2", {"query_pre_attn_scalar": None}, "'query_pre_attn_scalar' must be given"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attention_softcap must be positive"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "logit_softcap must be positive"),
        ("gemma2", {"sliding_window": None}, "'sliding_window' must be given"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "each of the 3 layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "'sliding_attention' or 'full_attention'"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation must be one of"),
        (
            "gemma2",
            {"partial_rotary_factor": 0.5, "rope_parameters": None},
            "what Gemma2ForCausalLM is not: rope_share",
        ),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' must be None"),
        ("gemma3", {"original_max_position_embeddings": 16}, "'original_max_position_embeddings' must be None"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "'longrope'"),
        ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "'rope_parameters' must give"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "windowed layers unstretched",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "turn whole heads",
        ),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "'dynamic'"),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"rope_theta": "x"}}},
            "rope_parameters: 'rope_theta' is 'x'",
        ),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, "'full_attention' is 3"),
        ("gemma3", {"sliding_window_pattern": 0}, "'sliding_window_pattern' must be at least 1"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' must be False"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' must be False"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function must be one of"),
        ("gpt2", {"n_head": 5}, "heads must divide width=32"),
        ("gpt2", {"n_layer": 10**9}, "1000000000 layers"),
        ("gpt2", {"n_positions": 10**9}, "1,000,000,000 positions"),
        ("gpt2", {"num_hidden_layers": 2}, r"left over \(transformer\.h\.2"),
        ("gpt2", {"n_inner": 16}, "shape"),
        ("gpt2", {"is_causal": False}, "'is_causal' must be True"),
    ],
)
def test_keys_that_mean_another_model_are_refused(name: str, keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    theirs(name).save_pretrained(tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.from_hf(tmp_path)


def test_a_gemma_that_sees_is_refused_and_its_text_part_read(tmp_path: Path) -> None:
    """The way out that docs/guides/convert.md names."""
    library = transformers()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = library.Gemma3TextConfig(**GEMMA, initializer_range=0.3)
    config = library.Gemma3Config(
        text_config=text, vision_config=library.SiglipVisionConfig(**vision), mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    whole = library.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"a part that sees images.*docs/guides/convert\.md"):
        checkpoint.from_hf(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = library.Gemma3ForCausalLM(whole.config.text_config)
    part.model, part.lm_head = whole.model.language_model, whole.lm_head
    part.save_pretrained(tmp_path / "text")
    assert_same(whole, checkpoint.from_hf(tmp_path / "text"))


def test_where_transformers_looks_for_the_cut_of_yarn(tmp_path: Path) -> None:
    """Beside the kinds of layers, where a Gemma 3 has nothing: its borders are always whole numbers."""
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32}
    ropes = {"full_attention": yarn | {"truncate": False}, "sliding_attention": {"rope_type": "default"}}
    torch.manual_seed(0)
    config = transformers().Gemma3TextConfig(**GEMMA | {"head_dim": 64}, initializer_range=0.3, rope_parameters=ropes)
    hf = transformers().Gemma3ForCausalLM(
        config.__class__(**config.to_dict() | {"layer_types": ["full_attention"] * 4})
    )
    hf.eval().save_pretrained(tmp_path / "a")
    lm = checkpoint.from_hf(tmp_path / "a")
    assert_same(hf, lm)
    checkpoint.to_hf(lm, tmp_path / "b")
    assert_same(stock(tmp_path / "b"), lm)


def test_no_word_on_the_cut_of_yarn_is_a_no(tmp_path: Path) -> None:
    """``null`` is not what transformers does where the key is missing."""
    torch.manual_seed(0)
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32}
    sizes = {name: value for name, value in GEMMA.items() if name != "sliding_window"} | {"head_dim": 64}
    config = transformers().LlamaConfig(**sizes, initializer_range=0.3, rope_parameters=yarn | {"truncate": None})
    hf = transformers().LlamaForCausalLM(config).eval()
    hf.save_pretrained(tmp_path)
    if "truncate" not in json.loads((tmp_path / "config.json").read_text())["rope_parameters"]:
        change(tmp_path, rope_parameters=yarn | {"truncate": None})
    assert_same(hf, checkpoint.from_hf(tmp_path))
