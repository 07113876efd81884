"""Folders as others leave them: files beside each other, names everyone passes over, keys that promise too much."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from turnout.errors import CheckpointError, UsageError
from turnout.models import LM, LMConfig, MLAConfig, MoEConfig, checkpoint
from turnout.models.families import FAMILIES
from turnout.models.families.express import architecture_of

DENSE = LMConfig(vocab_size=67, width=32, layers=2, heads=4, kv_heads=2, hidden=40, max_seq=64, init_std=0.2)
MOE = MoEConfig(4, 2, 12)
MLA = MLAConfig(kv_rank=14, rope_dim=6, nope_dim=8, v_dim=12, q_rank=10)
GROUPS = {"num_groups": 2, "top_groups": 1}
V3 = {"router": "GroupLimited", "router_options": GROUPS, "shared_hidden": 12, "layers": (1,)}


def model(**fields: Any) -> LM:
    return LM(dataclasses.replace(DENSE, **fields), seed=3).eval()


def deepseek() -> LM:
    return model(attention="mla", mla=MLA, kv_heads=None, moe=MoEConfig(4, 2, 12, **V3))


def glm4() -> LM:
    return model(head_dim=8, moe=MoEConfig(4, 2, 12, **V3))


def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


@torch.no_grad()
def logits(what: Path | LM) -> torch.Tensor:
    """Of fixed tokens; of a folder by transformers, which must load it whole."""
    id_BS = torch.randint(67, (2, 20), generator=torch.Generator().manual_seed(0))
    if isinstance(what, LM):
        return what(id_BS).logits_BSV
    theirs, notes = transformers().AutoModelForCausalLM.from_pretrained(what, output_loading_info=True)
    assert not any(notes.values()), notes
    return theirs.eval()(id_BS).logits


def keys_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change(folder: Path, **keys: Any) -> None:
    body = keys_of(folder) | keys
    (folder / "config.json").write_text(json.dumps({name: value for name, value in body.items() if value is not ...}))


def store(folder: Path, change: Any, name: str = "model.safetensors") -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / name, metadata={"format": "pt"})


# ---- reading


def test_the_single_file_comes_before_the_index(tmp_path: Path) -> None:
    old, new = model(), LM(DENSE, seed=9).eval()
    checkpoint.to_hf(old, tmp_path / "a", shard_bytes=20_000)
    checkpoint.to_hf(new, tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    torch.testing.assert_close(logits(checkpoint.from_hf(tmp_path / "a")), logits(tmp_path / "a"))
    # What config.json names comes before either.
    store(tmp_path / "a", lambda tensors: {name: tensor * 0.5 for name, tensor in tensors.items()}, "other.safetensors")
    change(tmp_path / "a", transformers_weights="other.safetensors")
    half = checkpoint.from_hf(tmp_path / "a")
    torch.testing.assert_close(logits(half), logits(tmp_path / "a"))
    checkpoint.to_hf(half, tmp_path / "c")
    torch.testing.assert_close(logits(half), logits(tmp_path / "c"))
    for name in ("../b/model.safetensors", "other.bin", 3):
        change(tmp_path / "a", transformers_weights=name)
        with pytest.raises(CheckpointError, match="transformers_weights must name a file of the folder"):
            checkpoint.from_hf(tmp_path / "a")


def test_a_variant_and_an_adapter_beside_it_are_told(tmp_path: Path) -> None:
    checkpoint.to_hf(model(), tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json beside config\.json"):
        checkpoint.from_hf(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.fp16\.safetensors is a variant"):
        checkpoint.from_hf(tmp_path / "a")


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "masked_bias"])
def test_what_is_worked_out_is_passed_over_and_not_written(name: str, tmp_path: Path) -> None:
    lm = model()
    checkpoint.to_hf(lm, tmp_path / "a")
    more = {f"model.layers.{n}.self_attn.{name}": torch.ones(4) for n in range(2)}
    checkpoint.to_hf(lm, tmp_path / "cut", shard_bytes=20_000)  # and where the index does not know of it
    shard = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    save_file(load_file(shard) | more, shard, metadata={"format": "pt"})
    assert torch.equal(logits(checkpoint.from_hf(tmp_path / "cut")), logits(lm))
    store(tmp_path / "a", lambda tensors: tensors | more)
    read = checkpoint.from_hf(tmp_path / "a")
    assert torch.equal(logits(read), logits(lm))
    checkpoint.to_hf(read, tmp_path / "b")
    assert not any(name in key for key in load_file(tmp_path / "b" / "model.safetensors"))
    store(tmp_path / "a", lambda tensors: tensors | {"model.layers.0.self_attn.colour": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"left over .*colour"):
        checkpoint.from_hf(tmp_path / "a")


def test_a_second_name_of_a_key_wins_as_in_transformers(tmp_path: Path) -> None:
    for family in FAMILIES:
        for alias, key in family.aliases.items():
            theirs = transformers().AutoConfig.for_model(family.model_type, **{key: 4, alias: 3})
            assert getattr(theirs, key) == 3 == family.keys({key: 4, alias: 3})[key], (family.model_type, alias)
            assert family.keys({key: 4})[key] == 4


def test_another_name_for_the_same_architecture(tmp_path: Path) -> None:
    lm = deepseek()
    checkpoint.to_hf(lm, tmp_path / "a")
    change(tmp_path / "a", model_type="kimi_k2", scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    read = checkpoint.from_hf(tmp_path / "a")
    assert torch.equal(logits(read), logits(lm))
    checkpoint.to_hf(read, tmp_path / "b")
    assert keys_of(tmp_path / "b")["model_type"] == "deepseek_v3"
    torch.testing.assert_close(logits(tmp_path / "b"), logits(lm), rtol=0, atol=1e-4)
    change(tmp_path / "a", scoring_func="softmax")
    with pytest.raises(CheckpointError, match="'scoring_func' must be 'sigmoid'"):
        checkpoint.from_hf(tmp_path / "a")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_type": "kimi_k9"}, "set model_type to 'llama' in a copy"),
        ({"architectures": ["MistralForCausalLM"]}, "be LlamaForCausalLM, as which transformers reads"),
        ({"model_type": "opt", "architectures": ["OPTForCausalLM"]}, r"turnout\.reshape\.attach"),
        ({"model_type": "jamba", "architectures": ["JambaForCausalLM"]}, "state-space layers.*turnout.adopt"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.MyForCausalLM"}}, "code of the folder's own"),
    ],
)
def test_names_that_do_not_agree_are_refused_by_name(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint.to_hf(model(), tmp_path / "a")
    change(tmp_path / "a", **keys)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.from_hf(tmp_path / "a")
    assert "turnout/models/families" not in str(caught.value)


def test_a_class_in_other_letters_is_the_same(tmp_path: Path) -> None:
    lm = model()
    checkpoint.to_hf(lm, tmp_path / "a")
    change(tmp_path / "a", architectures=["LLaMAForCausalLM"])
    assert torch.equal(logits(checkpoint.from_hf(tmp_path / "a")), logits(lm))


# ---- writing


@pytest.mark.parametrize("make", [deepseek, glm4])
@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_nothing_is_promised_that_is_not_written(make: Any, key: str, tmp_path: Path) -> None:
    checkpoint.to_hf(make(), tmp_path / "a")
    change(tmp_path / "a", **{"num_nextn_predict_layers": ..., "colour": "red"} | {key: 1})
    more = {"model.layers.2.eh_proj.weight": torch.zeros(32, 64)}
    store(tmp_path / "a", lambda tensors: tensors | more)
    with pytest.warns(UserWarning, match="multi-token"):
        lm = checkpoint.from_hf(tmp_path / "a")
    longer = LM(dataclasses.replace(lm.config, max_seq=128))
    longer.origin = lm.origin
    for name, each in (("same", lm), ("other", longer)):
        checkpoint.to_hf(each, tmp_path / name)
        theirs = transformers().AutoConfig.from_pretrained(tmp_path / name)
        assert theirs.num_nextn_predict_layers == 0 and keys_of(tmp_path / name)["colour"] == "red"
        assert not any("layers.2" in key for key in load_file(tmp_path / name / "model.safetensors"))


def test_counts_are_written_once(tmp_path: Path) -> None:
    """transformers 5 itself saves a Qwen3-MoE with num_local_experts, which wins over num_experts."""
    checkpoint.to_hf(model(qk_norm="head", moe=MOE), tmp_path / "a")
    transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert keys_of(tmp_path / "b")["num_local_experts"] == 4
    fewer = model(qk_norm="head", moe=MoEConfig(3, 2, 12))
    checkpoint.to_hf(fewer, tmp_path / "c", like=tmp_path / "b")
    torch.testing.assert_close(logits(tmp_path / "c"), logits(fewer), rtol=0, atol=1e-4)


def test_lists_by_layer_go_when_the_layers_do(tmp_path: Path) -> None:
    checkpoint.to_hf(model(), tmp_path / "a")
    change(tmp_path / "a", layer_types=["full_attention"] * 2, eos_token_id=[1, 2], _name_or_path="/home/me/old")
    less = model(layers=1)
    checkpoint.to_hf(less, tmp_path / "b", like=tmp_path / "a")
    keys = keys_of(tmp_path / "b")
    assert "layer_types" not in keys and "_name_or_path" not in keys and keys["eos_token_id"] == [1, 2]
    torch.testing.assert_close(logits(tmp_path / "b"), logits(less), rtol=0, atol=1e-4)


def test_code_is_carried_where_a_tokenizer_names_it_and_never_promised_else(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    checkpoint.to_hf(model(), folder)
    change(folder, auto_map={"AutoModelForCausalLM": "modeling_mine.LlamaForCausalLM"})
    names = ("tokenizer.model", "qwen.tiktoken", "tekken.json", "merges.txt", "processor_config.json", "LICENSE.txt")
    for name in names:
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    (folder / "tokenization_mine.py").write_text("raise SystemExit")
    for name in ("pytorch_model.bin", "training_args.bin", "trainer_state.json"):
        (folder / name).write_text("no")
    checkpoint.to_hf(checkpoint.from_hf(folder), tmp_path / "b")
    assert "auto_map" not in keys_of(tmp_path / "b")
    carried = {file.relative_to(tmp_path / "b").as_posix() for file in (tmp_path / "b").rglob("*") if file.is_file()}
    assert carried == {"config.json", "model.safetensors", "additional_chat_templates/rag.jinja", *names}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_mine.T"]}}))
    checkpoint.to_hf(checkpoint.from_hf(folder), tmp_path / "c")
    assert (tmp_path / "c" / "tokenization_mine.py").is_file()


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({"qkv_bias": True, "moe": MOE}, "Qwen2MoeForCausalLM"),
        ({"moe": MoEConfig(4, 1, 12)}, "Qwen2MoeForCausalLM"),
        ({"moe": MoEConfig(4, 1, 12, router="Switch")}, "Qwen2MoeForCausalLM"),
        ({"qkv_bias": True, "moe": MoEConfig(4, 2, 12, layers=(1,))}, "Qwen2MoeForCausalLM"),
        ({"moe": MoEConfig(4, 1, 12), "qk_norm": "head"}, "Qwen3MoeForCausalLM"),
        ({"head_dim": 8, "moe": MoEConfig(4, 2, 12, router="GroupLimited")}, "Glm4MoeForCausalLM"),
        (
            {
                "attention": "mla",
                "mla": MLA,
                "kv_heads": None,
                "moe": MoEConfig(4, 2, 12, router="GroupLimited", router_options=GROUPS),
            },
            "DeepseekV3ForCausalLM",
        ),
    ],
)
def test_parts_that_add_nothing_make_a_model_expressible(
    fields: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    lm = model(**fields)
    assert checkpoint.to_hf(lm, tmp_path / "a") == architecture
    torch.testing.assert_close(logits(tmp_path / "a"), logits(lm), rtol=0, atol=1e-4)
    read = checkpoint.from_hf(tmp_path / "a")
    assert torch.equal(logits(read), logits(lm))
    assert checkpoint.to_hf(read, tmp_path / "b") == architecture
    torch.testing.assert_close(logits(tmp_path / "b"), logits(lm), rtol=0, atol=1e-4)


def test_experts_that_tie_are_refused_where_scores_are_rounded(tmp_path: Path) -> None:
    from turnout.reshape import upcycle

    torn = upcycle(model(), num_experts=8, top_k=4, granularity=2)[0]
    checkpoint.to_hf(torn, tmp_path / "a")
    with pytest.raises(UsageError, match="different experts with equal router rows"):
        checkpoint.to_hf(torn.bfloat16(), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    # All of them chosen, copies of one layer, or a router in fp32: nothing can be torn.
    checkpoint.to_hf(upcycle(model(), num_experts=4, top_k=4, granularity=2)[0].bfloat16(), tmp_path / "c")
    checkpoint.to_hf(upcycle(model(), num_experts=4, top_k=2)[0].bfloat16(), tmp_path / "d")


def test_the_fix_is_one_that_a_user_has() -> None:
    with pytest.raises(UsageError, match="turnout convert --as model") as caught:
        architecture_of(dataclasses.replace(DENSE, sinks=True))
    assert "set sinks" not in str(caught.value)


# ---- keys that change what is computed


@pytest.mark.parametrize(
    ("make", "keys", "words"),
    [
        (model, {"is_causal": False}, "'is_causal' must be True"),
        (lambda: model(moe=MOE), {"is_causal": False}, "'is_causal' must be True"),
        (deepseek, {"head_dim": 8}, "'head_dim' must be 6"),
        (
            lambda: model(qk_norm="head", moe=MOE),
            {"decoder_sparse_step": None},
            "'decoder_sparse_step' must be a number",
        ),
        (lambda: model(embedding_scale=2.0, moe=MOE), {"embedding_multiplier": None}, "'embedding_multiplier' must be"),
        (lambda: model(residual_scale=0.5, moe=MOE), {"logits_scaling": None}, "'logits_scaling' must be a number"),
    ],
)
def test_a_key_that_means_another_model_is_refused(make: Any, keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint.to_hf(make(), tmp_path / "m")
    assert torch.equal(logits(checkpoint.from_hf(tmp_path / "m")), logits(make()))
    change(tmp_path / "m", **keys)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.from_hf(tmp_path / "m")


@pytest.mark.parametrize(
    ("window", "kinds", "fits"),
    [
        (6, ["sliding_attention"] * 2, True),
        (6, ["sliding_attention", "full_attention"], False),
        (6, ["full_attention"] * 2, False),
    ],
)
def test_a_mistral_has_one_kind_of_layer(window: int, kinds: list[str], fits: bool, tmp_path: Path) -> None:
    """With the key, the automatic classes of transformers take a class of another architecture."""
    checkpoint.to_hf(model(window=window), tmp_path / "m", architecture="MistralForCausalLM")
    change(tmp_path / "m", layer_types=kinds, head_dim=8)
    if fits:
        assert torch.allclose(logits(checkpoint.from_hf(tmp_path / "m")), logits(tmp_path / "m"), atol=1e-5)
        return
    with pytest.raises(CheckpointError, match=r"'layer_types'.*Ministral"):
        checkpoint.from_hf(tmp_path / "m")


def test_null_is_the_default_where_transformers_takes_it_so(tmp_path: Path) -> None:
    """The rotary parameters of gpt-oss: stretched unless something else is said."""
    theirs = transformers()
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = theirs.GptOssConfig(**sizes, sliding_window=6, max_position_embeddings=64, initializer_range=0.2)
    theirs.GptOssForCausalLM(config).save_pretrained(tmp_path / "m")
    change(tmp_path / "m", rope_parameters=None)
    assert torch.allclose(logits(checkpoint.from_hf(tmp_path / "m")), logits(tmp_path / "m"), atol=1e-4)
