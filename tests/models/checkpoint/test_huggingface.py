"""Folders of transformers: its own models are the judges, in both directions."""

import copy
import dataclasses
import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout.errors import CheckpointError, StorageError, UnknownNameError, UsageError
from turnout.models import LM, Cache, LMConfig, MLAConfig, MoEConfig, checkpoint
from turnout.models.families import FAMILIES
from turnout.models.families.express import architecture_of

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # So large that an eps in the wrong place shows.
    "rms_norm_eps": 0.03,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 14,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "qk_nope_head_dim": 8,
}
GLM = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
GPT_OSS = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 12, "head_dim": 10}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e3,
}
GEMMA = {"head_dim": 12, "rms_norm_eps": 0.03}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 3e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
GPT2 = {"layer_norm_epsilon": 0.03, "intermediate_size": ..., "num_key_value_heads": ..., "rms_norm_eps": ...}
# Other factors for texts of more than 16 positions; the shorter ones of the 23 below have the first.
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.5],
    "long_factor": [1.0, 2.5, 7.0],
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
}
# name -> model type in transformers, keys.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama tied, llama3 rope": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama yarn, gelu": ("llama", {"rope_parameters": YARN, "hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "mistral windowed": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2 windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3 biased": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma": ("gemma", GEMMA),
    "gemma biased": (
        "gemma",
        GEMMA | {"attention_bias": True, "hidden_act": "gelu", "num_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    "gemma2": (
        "gemma2",
        # Caps so low that they bite.
        GEMMA
        | {
            "query_pre_attn_scalar": 7,
            "sliding_window": 5,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 0.7,
        },
    ),
    "gemma2 uncapped": (
        "gemma2",
        GEMMA
        | {
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "sliding_window": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "relu",
            "attention_bias": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {
            "query_pre_attn_scalar": 9,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "rope_parameters": GEMMA3_ROPE,
            "final_logit_softcapping": 0.9,
        },
    ),
    "gemma3 yarn": (
        "gemma3_text",
        GEMMA | {"sliding_window": 5, "sliding_window_pattern": 2, "rope_parameters": {"full_attention": YARN}},
    ),
    "gemma3 all local": (
        "gemma3_text",
        GEMMA | {"sliding_window": 5, "num_hidden_layers": 2, "tie_word_embeddings": False},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2 other": (
        "gpt2",
        GPT2
        | {
            "n_inner": 20,
            "activation_function": "relu",
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
            "num_attention_heads": 32,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5}),
    "mixtral windowed": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 7}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 18,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "head_dim": 12,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 12}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK | {"n_group": 4, "topk_group": 2}),
    "deepseek_v3 yarn": (
        "deepseek_v3",
        DEEPSEEK
        | {
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": None,
            "rope_interleave": False,
            "attention_bias": True,
            "n_shared_experts": 2,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK | {"topk_method": "greedy"}),
    "deepseek_v2 scaled": ("deepseek_v2", DEEPSEEK | {"routed_scaling_factor": 2.5}),
    "deepseek_v2 groups": (
        "deepseek_v2",
        DEEPSEEK
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS | {"sliding_window": 6}),
    "gpt_oss plain": (
        "gpt_oss",
        GPT_OSS
        | {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 32,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
        },
    ),
    "gpt_oss short yarn": ("gpt_oss", GPT_OSS | {"sliding_window": 2, "rope_parameters": YARN | {"truncate": False}}),
    "glm4_moe": ("glm4_moe", GLM | {"use_qk_norm": True, "attention_bias": True}),
    "glm4_moe whole": ("glm4_moe", GLM | {"partial_rotary_factor": 1.0, "n_shared_experts": 2}),
    "granitemoe": (
        "granitemoe",
        GRANITE | {"num_local_experts": 4},
    ),
    "granite": ("granite", GRANITE),
    "granite biased": (
        "granite",
        GRANITE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3 windowed": (
        "smollm3",
        {
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3 other windows": (
        "smollm3",
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": YARN,
        },
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": 64}),
    "phi3 windowed, partly turned": ("phi3", {"sliding_window": 6, "partial_rotary_factor": 0.75, "head_dim": 8}),
    "phi3 long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "phi3 never long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "olmo2": ("olmo2", {}),
    "olmo2 biased": (
        "olmo2",
        {"attention_bias": True, "head_dim": 10, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
}
every_case = pytest.mark.parametrize("name", CASES)
MOE = MoEConfig(6, 2, 12)
MLA = MLAConfig(kv_rank=14, rope_dim=6, nope_dim=8, v_dim=12, q_rank=10)
OURS = LMConfig(
    vocab_size=67, width=32, layers=3, heads=4, kv_heads=2, hidden=40, max_seq=64, init_std=0.1, norm_eps=0.03
)
GEMMA_OURS = {
    "norm": "rms_plus_one",
    "activation": "geglu_tanh",
    "embedding_scale": 32**0.5,
    "embedding_rounded": True,
    "tie_embeddings": True,
}
# What ours is, and the architecture that it must be given.
EXPRESSIBLE: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("LlamaForCausalLM", {}),
    "biased": ("LlamaForCausalLM", {"qkv_bias": True, "out_bias": True, "ff_bias": True, "tie_embeddings": True}),
    "reglu": ("LlamaForCausalLM", {"activation": "reglu"}),
    "odd heads": ("MistralForCausalLM", {"heads": 5, "kv_heads": 1, "head_dim": 6}),
    "window": ("MistralForCausalLM", {"window": 6}),
    "window above": ("Qwen2ForCausalLM", {"window": 6, "window_layers": (2,), "qkv_bias": True}),
    "qkv bias": ("Qwen2ForCausalLM", {"qkv_bias": True, "head_dim": 12}),
    "head norm": ("Qwen3ForCausalLM", {"qk_norm": "head"}),
    "gemma": ("GemmaForCausalLM", GEMMA_OURS),
    "gemma2": (
        "Gemma2ForCausalLM",
        GEMMA_OURS
        | {
            "norm_place": "both",
            "window": 6,
            "window_layers": (1,),
            "attention_scale": 50**-0.5,
            "attention_softcap": 0.5,
            "logit_softcap": 0.8,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        GEMMA_OURS
        | {
            "norm_place": "both",
            "qk_norm": "head",
            "window": 6,
            "window_layers": (0, 2),
            "rope_theta": 2e5,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            "local_rope_theta": 300.0,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "kv_heads": None,
            "rope_layers": (),
            "learned_positions": True,
            "norm": "layer",
            "qkv_bias": True,
            "out_bias": True,
            "ff_bias": True,
            "activation": "gelu_tanh",
            "tie_embeddings": True,
        },
    ),
    "scaled, dense": (
        "GraniteForCausalLM",
        {"heads": 5, "kv_heads": 1, "head_dim": 6, "logit_divisor": 3.0, "ff_bias": True},
    ),
    "a layer without rope": ("SmolLM3ForCausalLM", {"rope_layers": (0, 2), "window": 6, "window_layers": (0, 1)}),
    "no rope at all": ("SmolLM3ForCausalLM", {"rope_layers": (), "tie_embeddings": True, "ff_bias": True}),
    "partly turned, dense": ("Phi3ForCausalLM", {"rope_share": 0.5, "window": 6, "head_dim": 12}),
    "long rope": (
        "Phi3ForCausalLM",
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.5, 2.0],
                "long_factor": [1.0, 2.5, 7.0, 8.0],
                "original_max_position_embeddings": 16,
                "attention_factor": 1.3,
            }
        },
    ),
    "norms after": ("Olmo2ForCausalLM", {"norm_place": "after", "qk_norm": "full", "head_dim": 12, "qkv_bias": True,
                                         "out_bias": True}),
    "mixtral": ("MixtralForCausalLM", {"moe": MOE}),
    "gshard": ("MixtralForCausalLM", {"moe": dataclasses.replace(MOE, router="GShard")}),
    "one expert": ("MixtralForCausalLM", {"moe": MoEConfig(1, 1, 12)}),
    "scaled": ("GraniteMoeForCausalLM", {"moe": MOE, "residual_scale": 0.5, "attention_scale": 0.25}),
    "head norm, sparse": ("Qwen3MoeForCausalLM", {"qk_norm": "head", "moe": dataclasses.replace(MOE, layers=(0, 2))}),
    "switch": (
        "Qwen3MoeForCausalLM",
        {"qk_norm": "head", "moe": MoEConfig(6, 1, 12, router="Switch", router_options={"jitter": 0.1})},
    ),
    "full norm": (
        "OlmoeForCausalLM",
        {"qk_norm": "full", "kv_heads": 4, "moe": dataclasses.replace(MOE, router_options={"renormalize": False})},
    ),
    "shared": (
        "Qwen2MoeForCausalLM",
        {"moe": dataclasses.replace(MOE, shared_hidden=10, shared_gate=True), "qkv_bias": True},
    ),
    "latent, loss-free": (
        "DeepseekV3ForCausalLM",
        {
            "attention": "mla",
            "kv_heads": None,
            "mla": MLA,
            "moe": dataclasses.replace(MOE, router="LossFree", shared_hidden=24, layers=(1, 2)),
        },
    ),
    "loss-free": ("Glm4MoeForCausalLM", {"moe": dataclasses.replace(MOE, router="LossFree", shared_hidden=12)}),
    "partly turned": (
        "Glm4MoeForCausalLM",
        {
            "rope_share": 0.5,
            "head_dim": 12,
            "qk_norm": "head",
            "moe": MoEConfig(6, 2, 12, router="GroupLimited", shared_hidden=24, layers=(2,)),
        },
    ),
    "latent, groups": (
        "DeepseekV3ForCausalLM",
        {
            "attention": "mla",
            "kv_heads": None,
            "mla": dataclasses.replace(MLA, q_rank=None, interleaved=False),
            "moe": MoEConfig(
                8, 2, 12, router="GroupLimited", shared_hidden=12,
                router_options={"num_groups": 4, "top_groups": 2, "scale": 2.5, "renormalize": False},
            ),
        },
    ),
    "sinks": (
        "GptOssForCausalLM",
        {
            "sinks": True,
            "head_dim": 12,
            "window": 6,
            "window_layers": (1,),
            "moe": dataclasses.replace(MOE, activation="swiglu_oai", bias=True, router_options={"bias": True}),
        },
    ),
    "latent, softmax in groups": (
        "DeepseekV2ForCausalLM",
        {
            "attention": "mla",
            "kv_heads": None,
            "mla": MLA,
            "moe": MoEConfig(
                8, 2, 12, router="GroupLimited", shared_hidden=12, layers=(1, 2),
                router_options={
                    "num_groups": 4, "top_groups": 2, "scale": 2.5, "renormalize": False,
                    "scores": "softmax", "group_score": "max", "bias": False,
                },
            ),
        },
    ),
    "latent, softmax": (
        "DeepseekV2ForCausalLM",
        {
            "attention": "mla",
            "kv_heads": None,
            "mla": MLA,
            "moe": dataclasses.replace(MOE, shared_hidden=12, router_options={"renormalize": False}),
        },
    ),
}  # fmt: skip
every_expressible = pytest.mark.parametrize("name", EXPRESSIBLE)


@functools.cache
def transformers() -> Any:
    """The library, silent: it is slow to import and talks a lot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def theirs(name: str) -> Any:
    """A random model of transformers, none of its parameters at a neutral value."""
    kind, keys = CASES[name]
    # A copy: configurations of transformers write into the dicts that they are given.
    given = {key: copy.deepcopy(value) for key, value in (SIZES | keys).items() if value is not ...}
    config = transformers().AutoConfig.for_model(kind, **given)
    torch.manual_seed(len(name))
    model = transformers().AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))]:
            tensor.add_(torch.randn_like(tensor) * 0.1)
        for name, tensor in model.named_parameters():
            if name.endswith(("gate_up_proj_bias", "sinks")):  # so large that clamps hold, and sinks take their share
                tensor.mul_(60)
    return model


def ours(name: str) -> LM:
    lm = LM(dataclasses.replace(OURS, **EXPRESSIBLE[name][1]), seed=2).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in lm.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return lm


def batch(vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 23), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same(hf: Any, lm: LM, atol: float = 1e-4, seed: int = 0) -> None:
    """Equal logits at every position, whole and token by token through both caches."""
    id_BS = batch(lm.config.vocab_size, seed)
    want = hf(id_BS).logits
    assert want.std() > 0.01
    torch.testing.assert_close(lm(id_BS).logits_BSV, want, rtol=0, atol=atol)
    if lm.rope.long_P is not None:  # other frequencies beyond: what is cached no longer holds there
        id_BS = id_BS[:, :16]
        want = hf(id_BS).logits
        torch.testing.assert_close(lm(id_BS).logits_BSV, want, rtol=0, atol=atol)
    cache, past = Cache(), None
    for piece in id_BS.split((9, 1, 1, 4, id_BS.shape[1] - 15), dim=1):
        out = hf(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        got = lm(piece, cache=cache).logits_BSV
        torch.testing.assert_close(got, out.logits, rtol=0, atol=atol)
        end = cache.length
        torch.testing.assert_close(got, want[:, end - piece.shape[1] : end], rtol=0, atol=atol)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def held(folder: Path) -> dict[str, bytes]:
    """The files, without the promise of layers that transformers writes into every config.json and never saves."""
    found = files(folder)
    keys = json.loads(found["config.json"])
    if keys.get("num_nextn_predict_layers"):
        text = json.dumps(keys | {"num_nextn_predict_layers": 0}, indent=2, sort_keys=True) + "\n"
        found["config.json"] = text.encode()
    return found


@every_case
def test_in_and_out_again(name: str, tmp_path: Path) -> None:
    hf = theirs(name)
    hf.save_pretrained(tmp_path / "a", max_shard_size="30KB" if "moe" in name else "1GB")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    lm = checkpoint.from_hf(tmp_path / "a")
    assert_same(hf, lm)
    architecture = checkpoint.to_hf(lm, tmp_path / "b")
    assert architecture == hf.config.architectures[0]
    assert held(tmp_path / "a") == files(tmp_path / "b")
    # Through our own format and out again: still the same, bit for bit.
    checkpoint.save(tmp_path / "own", lm)
    checkpoint.to_hf(checkpoint.load(tmp_path / "own"), tmp_path / "c", shard_bytes=30_000 if "moe" in name else 10**9)
    again = checkpoint.from_hf(tmp_path / "c").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in lm.state_dict().items())
    assert files(tmp_path / "c")["config.json"] == held(tmp_path / "a")["config.json"]
    assert (tmp_path / "c" / "tokenizer.json").exists()


def test_every_architecture_has_its_case() -> None:
    assert {kind for kind, _ in CASES.values()} == {family.model_type for family in FAMILIES}
    assert {name for name, _ in EXPRESSIBLE.values()} == {family.architecture for family in FAMILIES}


@every_expressible
def test_out_and_in_again(name: str, tmp_path: Path) -> None:
    lm = ours(name)
    assert checkpoint.to_hf(lm, tmp_path / "a", shard_bytes=40_000) == EXPRESSIBLE[name][0]
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        hf, notes = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not noted and not any(notes.values()), notes
    assert type(hf).__name__ == EXPRESSIBLE[name][0]
    assert_same(hf.eval(), lm)
    read = checkpoint.from_hf(tmp_path / "a").state_dict()
    state = lm.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in read.items()) and set(read) == set(state)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "granitemoe"])
def test_experts_in_one_tensor(name: str, tmp_path: Path) -> None:
    hf = theirs(name)
    hf.save_pretrained(tmp_path / "a", save_original_format=False)
    lm = checkpoint.from_hf(tmp_path / "a")
    assert_same(hf, lm)
    checkpoint.to_hf(lm, tmp_path / "b")
    assert held(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    "name",
    ["llama", "deepseek_v3", "mixtral", "granite", "smollm3", "phi3", "olmo2", "gemma2", "gemma3", "gpt2"],
)
def test_bf16(name: str, tmp_path: Path) -> None:
    hf = theirs(name).to(torch.bfloat16)
    hf.save_pretrained(tmp_path / "a")
    lm = checkpoint.from_hf(tmp_path / "a")
    assert lm.embedding.dtype == torch.bfloat16
    assert all(getattr(router, "bias_E", torch.zeros(1)).dtype == torch.float32 for router in lm.routers)
    wide = checkpoint.from_hf(tmp_path / "a", dtype=torch.float32)
    assert_same(theirs_from(tmp_path / "a"), wide)
    if name != "deepseek_v3":  # there our correction bias stays in fp32, the cast model's did not
        checkpoint.to_hf(lm, tmp_path / "b")
        assert files(tmp_path / "a") == files(tmp_path / "b")
    checkpoint.to_hf(wide, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == "float32"


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_a_gemma_rounds_where_its_own_code_does(name: str, tmp_path: Path) -> None:
    hf = theirs(name).to(torch.bfloat16)
    hf.save_pretrained(tmp_path)
    lm, id_BS = checkpoint.from_hf(tmp_path), torch.arange(60).view(3, 20)
    embedded = hf.model.embed_tokens(id_BS)
    assert torch.equal(lm._embedded(id_BS, 0, None), embedded)
    assert not torch.equal(lm.embedding[id_BS] * lm.config.embedding_scale, embedded)  # the unrounded root
    assert torch.equal(lm.norm(embedded), hf.model.norm(embedded))


def theirs_from(folder: Path) -> Any:
    return transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_keys_of_old_configurations(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, torch_dtype, and left out what was the default."""
    hf = theirs("llama tied, llama3 rope")
    hf.save_pretrained(tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())
    scaling = keys.pop("rope_parameters")
    keys["rope_theta"] = scaling.pop("rope_theta")
    keys |= {"rope_scaling": scaling | {"type": scaling["rope_type"]}, "torch_dtype": keys.pop("dtype")}
    for name in ("attention_bias", "mlp_bias", "head_dim", "hidden_act", "initializer_range"):
        keys.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert_same(hf, checkpoint.from_hf(tmp_path))


def test_a_changed_model_keeps_what_still_holds(tmp_path: Path) -> None:
    theirs("qwen3").save_pretrained(tmp_path / "a")
    keys = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(keys | {"pad_token_id": 5, "colour": "red"}))
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "a" / "modeling.py").write_text("raise SystemExit")
    lm = checkpoint.from_hf(tmp_path / "a")
    longer = LM(dataclasses.replace(lm.config, max_seq=128))
    checkpoint.to_hf(longer, tmp_path / "b", like=tmp_path / "a")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (written["max_position_embeddings"], written["pad_token_id"], written["colour"]) == (128, 5, "red")
    sparse = LM(dataclasses.replace(lm.config, moe=MOE))
    assert checkpoint.to_hf(sparse, tmp_path / "c", like=tmp_path / "a") == "Qwen3MoeForCausalLM"
    written = json.loads((tmp_path / "c" / "config.json").read_text())
    assert written["pad_token_id"] == 5 and "colour" not in written
    for folder in "bc":
        assert (tmp_path / folder / "tokenizer_config.json").exists() and not (
            tmp_path / folder / "modeling.py"
        ).exists()


def test_our_tokenizer_goes_along(tmp_path: Path) -> None:
    from turnout.train.data import train_tokenizer

    text = "the cat sat on the mat; the dog did not, and the cat <|endoftext|> told the dog so"
    tokenizer = train_tokenizer([text] * 2, vocab_size=270)
    lm = LM(dataclasses.replace(OURS, vocab_size=270))
    checkpoint.save(tmp_path / "own", lm)
    tokenizer.save(str(tmp_path / "own" / "tokenizer.json"))
    checkpoint.to_hf(checkpoint.load(tmp_path / "own"), tmp_path / "hf")
    read = transformers().AutoTokenizer.from_pretrained(tmp_path / "hf")
    plain = "the dog sat;  on\nthe mat"
    assert read(plain)["input_ids"] == tokenizer.encode(plain).ids and read.decode(read(plain)["input_ids"]) == plain
    assert (read.eos_token, read.eos_token_id, read.model_max_length) == ("<|endoftext|>", 0, 64)
    model = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.eos_token_id == 0 and model.config.bos_token_id is None
    out = model.generate(**read("the", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert (
        out[0].tolist()
        == lm.eval().generate(torch.tensor([read("the")["input_ids"]]), tokens=3, temperature=0)[0].tolist()
    )


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"qk_norm": "head", "qkv_bias": True}, ["Qwen2ForCausalLM", "qk_norm is 'head'"]),
        ({"activation": "gelu"}, ["activation is 'gelu'", "train with activation='swiglu'", "--as model"]),
        ({"moe": dataclasses.replace(MOE, router="Hash")}, ["moe.router is 'Hash'", "'TopK'"]),
        ({"moe": dataclasses.replace(MOE, router_options={"capacity_factor": 1.0})}, ["capacity_factor is 1.0"]),
        ({"moe": MoEConfig(6, 1, 12), "residual_scale": 0.5}, ["residual_scale is 0.5", "--as model"]),
        ({"moe": MOE, "out_bias": True}, ["out_bias is True"]),
        (
            {"moe": dataclasses.replace(MOE, shared_hidden=10, shared_gate=True), "qk_norm": "head"},
            ["Qwen2MoeForCausalLM", "qk_norm is 'head'", "nothing to set"],
        ),
        (
            {"attention": "mla", "kv_heads": None, "mla": MLA, "moe": MOE},
            ["renormalize", "Deepseek"],
        ),
    ],
)
def test_what_keeps_a_model_from_an_architecture_is_said(fields: dict, reasons: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        checkpoint.to_hf(LM(dataclasses.replace(OURS, **fields)), tmp_path / "a")
    assert [reason for reason in reasons if reason not in str(caught.value)] == [], str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_can_be_asked_for(tmp_path: Path) -> None:
    lm = ours("default")
    assert checkpoint.to_hf(lm, tmp_path / "a", architecture="MistralForCausalLM") == "MistralForCausalLM"
    assert_same(transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval(), lm)
    with pytest.raises(UsageError, match="qk_norm is 'none', there it would be 'head'"):
        checkpoint.to_hf(lm, tmp_path / "b", architecture="Qwen3ForCausalLM")
    with pytest.raises(UnknownNameError, match="'MixtralForCausalLM'"):
        checkpoint.to_hf(lm, tmp_path / "b", architecture="MixtralForCausal")


# ---- bad input


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded folder of a small model, written by us."""
    checkpoint.to_hf(ours("mixtral"), tmp_path / "hf", shard_bytes=40_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    return tmp_path / "hf"


def change(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | keys).items() if v is not ...}))


def test_missing_and_damaged_shards_are_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    body = shard.read_bytes()
    for damaged in (body[:-8], body[:20], b"", body[:8] + b"x" * 40 + body[48:]):
        shard.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{shard.name}.*truncated or damaged"):
            checkpoint.from_hf(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"1 of .* missing in .*{shard.name}"):
        checkpoint.from_hf(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled and never read"):
        checkpoint.from_hf(folder)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "a part that sees images"),
        ({"model_type": "mixtrl", "architectures": ["MixtrlForCausalLM"]}, "Did you mean 'MixtralForCausalLM'"),
        ({"architectures": ["MixtralForSequenceClassification"]}, "unknown architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"hidden_size": 48}, r"shape \(67, 32\)"),
        ({"num_hidden_layers": 2}, r"left over \(model\.layers\.2"),
        ({"num_hidden_layers": 4}, r"missing \(model\.layers\.3"),
        ({"num_local_experts": 4}, "left over"),
        ({"num_attention_heads": 5}, "heads"),
        ({"num_attention_heads": "four"}, r"config\.json"),
        ({"num_experts_per_tok": 1}, "renormalised"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "what MixtralForCausalLM is not: rope_share"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folder: Path, keys: dict, match: str) -> None:
    change(folder, **({"rope_theta": ..., "rope_scaling": ...} | keys))
    with pytest.raises(CheckpointError, match=match):
        checkpoint.from_hf(folder)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"topk_method": "group_limited_greedy"}, "'n_group'"),
        ({"topk_method": "noaux_tc"}, "'group_limited_greedy'"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}, "num_groups"),
    ],
)
def test_routers_of_deepseek_v2_that_do_not_fit_are_refused(keys: dict, match: str, tmp_path: Path) -> None:
    checkpoint.to_hf(ours("latent, softmax"), tmp_path / "a")
    change(tmp_path / "a", **keys)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.from_hf(tmp_path / "a")


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha"),
        ({"layer_types": ["full_attention"] * 2}, "each of the 3 layers"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "'sliding_attention'"),
        ({"sliding_window": None}, "sliding_window"),
        ({"num_experts_per_tok": 1}, "renormalised"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
    ],
)
def test_configurations_of_gpt_oss_that_do_not_fit_are_refused(keys: dict, match: str, tmp_path: Path) -> None:
    checkpoint.to_hf(ours("sinks"), tmp_path / "a")
    change(tmp_path / "a", **keys)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.from_hf(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "keys", "match"),
    [
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
        (
            "phi3",
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}},
            "transformers takes 'longrope' alone in a Phi-3",
        ),
        ("phi3", {"partial_rotary_factor": 0.4, "rope_parameters": ...}, "rope_share"),
        (
            "phi3",
            {"rope_parameters": LONG | {"rope_type": "yarn"}, "original_max_position_embeddings": 1},
            "at least 2",
        ),
        ("smollm3", {"no_rope_layers": [1, 1]}, "each of the 5 layers"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1, 1]}, "RoPE"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5, "sliding_window": 4}, "name 'full_attention' for each"),
        ("smollm3", {"layer_types": ["full_attention"] * 4}, "each of the 5 layers"),
        ("smollm3", {"partial_rotary_factor": 0.5}, "rope_share"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "rope_share"),
        ("granite", {"residual_multiplier": None}, "residual_multiplier"),
        ("granite", {"logits_scaling": 0.0}, "logit_divisor"),
        ("granite", {"rope_parameters": LONG}, "'longrope'"),
    ],
)
def test_configurations_of_dense_families_that_do_not_fit_are_refused(
    name: str, keys: dict, match: str, tmp_path: Path
) -> None:
    theirs(name).save_pretrained(tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.from_hf(tmp_path)


@pytest.mark.parametrize("name", ["granite", "smollm3", "phi3", "olmo2"])
def test_what_a_configuration_leaves_out_is_what_transformers_takes(name: str, tmp_path: Path) -> None:
    """All that need not be there is left out, and what is read is what transformers' own configuration says."""
    theirs(name).save_pretrained(tmp_path / "a")
    needed = {"model_type", "architectures", "dtype", "vocab_size", "hidden_size", "intermediate_size", "pad_token_id"}
    needed |= {"num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    keys = json.loads((tmp_path / "a" / "config.json").read_text())
    change(tmp_path / "a", **dict.fromkeys(keys.keys() - needed, ...))
    lm = checkpoint.from_hf(tmp_path / "a")
    assert_same(theirs_from(tmp_path / "a"), lm)
    config = transformers().AutoConfig.from_pretrained(tmp_path / "a")
    assert (lm.config.max_seq, lm.config.norm_eps) == (config.max_position_embeddings, config.rms_norm_eps)
    assert (lm.config.tie_embeddings, lm.config.rope_theta) == (
        config.tie_word_embeddings,
        config.rope_parameters["rope_theta"],
    )


def test_mixed_dtypes_are_refused_or_converted(tmp_path: Path) -> None:
    lm = ours("default")
    lm.norm.to(torch.bfloat16)
    checkpoint.to_hf(lm, tmp_path / "a")
    keys = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(keys | {"dtype": None, "torch_dtype": None}))
    with pytest.raises(CheckpointError, match=r"bfloat16 \(model\.norm\.weight\)"):
        checkpoint.from_hf(tmp_path / "a")
    assert checkpoint.from_hf(tmp_path / "a", dtype=torch.float32).norm.weight.dtype == torch.float32


def test_a_tied_head_that_is_stored_all_the_same(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lm = ours("biased")
    checkpoint.to_hf(lm, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": lm.embedding.detach()}, file, metadata={"format": "pt"})
    read = checkpoint.from_hf(tmp_path / "a")
    assert read.head is None and torch.equal(read.embedding, lm.embedding)
    checkpoint.to_hf(read, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    save_file(tensors | {"lm_head.weight": lm.embedding.detach() + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must be the embedding"):
        checkpoint.from_hf(tmp_path / "a")


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    checkpoint.to_hf(ours("default"), tmp_path / "a")
    before = files(tmp_path / "a")
    with pytest.raises(StorageError, match="be new or empty"):
        checkpoint.to_hf(ours("default"), tmp_path / "a")
    assert files(tmp_path / "a") == before


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("turnout.models.checkpoint.huggingface.save_file", full)
    with pytest.raises(StorageError, match="free some space"):
        checkpoint.to_hf(ours("default"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_layers_for_later_tokens_are_left_out_loudly(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lm = ours("latent, groups")
    checkpoint.to_hf(lm, tmp_path / "a")
    change(tmp_path / "a", num_nextn_predict_layers=1)
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="multi-token"):
        read = checkpoint.from_hf(tmp_path / "a")
    assert torch.equal(read.embedding, lm.embedding)


_PEAK = """
import resource, sys
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
moe = MoEConfig(num_experts=8, top_k=2, hidden=1024)
config = LMConfig(vocab_size=64, width=512, layers=6, heads=4, moe=moe)
if sys.argv[1] == "write":
    lm = LM(config)
    act = lambda: checkpoint.to_hf(lm, sys.argv[2], shard_bytes=8_000_000)
    size = 0
else:
    LM(LMConfig(vocab_size=64, width=64, layers=1, heads=4, moe=MoEConfig(8, 2, 8)))
    act = lambda: checkpoint.from_hf(sys.argv[2])
    size = 6 * 8 * 3 * 1024 * 512 * 4 / 2**20
before = peak_mb()
act()
print(peak_mb() - before - size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("act", ["write", "read"])
def test_memory_peaks_at_one_shard_above_the_model(act: str, tmp_path: Path) -> None:
    """A model of 300 MB in shards of 8 MB: anything that held it twice would show."""
    if act == "read":
        run_alone("write", tmp_path / "a")
    assert run_alone(act, tmp_path / "a") < 40


def run_alone(act: str, folder: Path) -> float:
    done = subprocess.run([sys.executable, "-c", _PEAK, act, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_model_of_one_expert_is_written_whatever_other_architectures_say() -> None:
    """OLMoE, which is asked as well, takes no heads that do not divide the width; that was read as a top-k of 2."""
    config = LMConfig(vocab_size=16, width=20, layers=1, heads=7, head_dim=4, moe=MoEConfig(1, 1, 12))
    assert architecture_of(config)[0].architecture == "MixtralForCausalLM"
    with pytest.raises(UsageError, match=r"heads must divide width=20"):
        architecture_of(config, only="OlmoeForCausalLM")
