"""Every key that transformers knows of an architecture is meant, or refused: none is passed over in silence.

Each is given another plausible value in a folder that both read. Where both do, they compute the same, whole and with
their caches; where only transformers does, our refusal names the key, or the tensors that do not fit.
"""

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_huggingface import CASES, SIZES, assert_same, batch, theirs, transformers

from turnout.errors import CheckpointError
from turnout.models import checkpoint
from turnout.models.families import FAMILIES
from turnout.recipes.tied import tied

FULL, WINDOW = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    LLAMA3 | {"original_max_position_embeddings": 16},
    YARN,
    YARN | {"original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7},
    YARN | {"original_max_position_embeddings": 16, "attention_factor": 1.3, "beta_fast": 20.0, "truncate": False},
]
ROPES = [{"rope_theta": 100.0}, {"rope_theta": 100.0, "partial_rotary_factor": 0.5, "rope_type": "default"}]
ROPES += [LLAMA3 | {"rope_theta": 100.0}, YARN | {"rope_theta": 100.0, "original_max_position_embeddings": 16}]
ROPES += [{FULL: YARN | {"rope_theta": 100.0}, WINDOW: {"rope_type": "default", "rope_theta": 30.0}}]
# Other values of each key that some architecture has.
OTHERS: dict[str, list[Any]] = {
    "activation_function": ["gelu", "tanh"],
    "add_cross_attention": [True],
    "attention_bias": [True, False],
    "attention_multiplier": [0.7],
    "attn_logit_softcapping": [0.5, None],
    "clip_qkv": [0.2],
    "decoder_sparse_step": [2],
    "embedding_multiplier": [1.7],
    "final_logit_softcapping": [0.5, None],
    "first_k_dense_replace": [0, 2],
    "head_dim": [4, 10, None],
    "hidden_act": ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", "tanh"],
    "hidden_activation": ["gelu", "relu", "silu"],
    "hidden_size": [48],
    "intermediate_size": [20],
    "kv_lora_rank": [8],
    "layer_norm_epsilon": [0.3],
    "layer_types": [[FULL] * 3, [WINDOW] * 3, [WINDOW, FULL, WINDOW], [FULL, WINDOW, FULL], None],
    "logits_scaling": [3.0],
    "max_position_embeddings": [32, 128],
    "max_window_layers": [0, 2],
    "mlp_bias": [True],
    "mlp_only_layers": [[1]],
    "moe_intermediate_size": [8],
    "n_embd": [16],
    "n_group": [2],
    "n_head": [2],
    "n_inner": [20],
    "n_layer": [2],
    "n_positions": [32],
    "n_routed_experts": [4],
    "n_shared_experts": [2],
    "no_rope_layer_interval": [2],
    "no_rope_layers": [[0, 1, 1, 0, 1], None],
    "norm_topk_prob": [True, False],
    "num_attention_heads": [2, 8],
    "num_experts": [3],
    "num_experts_per_tok": [1, 3],
    "num_hidden_layers": [2],
    "num_key_value_heads": [1, 4],
    "num_local_experts": [3],
    "num_mtp_layers": [0, 2],
    "original_max_position_embeddings": [8, 32],
    "partial_rotary_factor": [0.5, 0.75],
    "pretraining_tp": [2],
    "q_lora_rank": [None, 8],
    "qk_nope_head_dim": [4],
    "qk_rope_head_dim": [4],
    "qkv_bias": [False],
    "query_pre_attn_scalar": [3, 144],
    "reorder_and_upcast_attn": [True],
    "residual_multiplier": [0.22],
    "rms_norm_eps": [0.3],
    "rope_interleave": [False],
    "rope_local_base_freq": [50.0],
    "rope_parameters": [*ROPES, None],
    "rope_scaling": SCALINGS,
    "rope_theta": [500.0],
    "routed_scaling_factor": [3.0],
    "scale_attn_by_inverse_layer_idx": [True],
    "scale_attn_weights": [False],
    "shared_expert_intermediate_size": [8],
    "sliding_window": [5, None],
    "sliding_window_pattern": [2],
    "swiglu_alpha": [1.0],
    "swiglu_limit": [3.0],
    "tie_word_embeddings": [True, False],
    "topk_group": [1],
    "topk_method": ["greedy", "group_limited_greedy"],
    "use_bidirectional_attention": [True, None],
    "use_qk_norm": [True],
    "use_sliding_window": [True],
    "v_head_dim": [8],
    "vocab_size": [71],
}
# Keys of other architectures, left over in a config.json or put there by hand.
FOREIGN = (
    "attention_chunk_size head_dim is_causal layer_types original_max_position_embeddings partial_rotary_factor "
    "rope_scaling rope_theta sliding_window use_sliding_window"
).split()
OTHERS |= {"attention_chunk_size": [5], "is_causal": [False, None]}
# What changes no logits: training, generation, other heads, how much is returned, and what is said of the folder.
NO_MATTER = (
    "architectures attention_dropout attn_pdrop bos_token_id chunk_size_feed_forward dtype embd_pdrop eos_token_id "
    "id2label initializer_range is_encoder_decoder label2id output_hidden_states output_router_logits pad_token_id "
    "problem_type resid_pdrop return_dict router_aux_loss_coef router_jitter_noise summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj transformers_version use_cache"
).split()
# What a refusal says of weights that are not of such a model, or of our field for the key.
WEIGHTS = ("must have the shape", "must hold the tensors", "of these weights")
OURS = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "partial_rotary_factor": "rope_share"}
OURS |= {
    "rope_parameters": "rope_share",
    "n_head": "heads",
    "num_hidden_layers": "layers",
    "n_group": "num_groups",
    "n_routed_experts": "num_groups",
    "topk_group": "num_groups",
    "head_dim": "rotated",
}


@functools.cache
def known(kind: str) -> list[str]:
    """The keys that transformers has for an architecture."""
    return [field.name for field in dataclasses.fields(type(transformers().AutoConfig.for_model(kind)))]


def changes(kind: str) -> Iterator[tuple[str, Any]]:
    """Every key; of several values every other one, in turn among the architectures that know the key: each is tried.

    A key that only one knows has all of its values there.
    """
    kinds = [family.model_type for family in FAMILIES]
    for key in dict.fromkeys([*known(kind), *FOREIGN]):
        values = OTHERS.get(key, [])
        those = [one for one in kinds if key in known(one)] if key not in FOREIGN else kinds
        some = len(values) > 1 and len(those) > 1
        yield from ((key, value) for at, value in enumerate(values) if not some or (at + those.index(kind)) % 2 == 0)


@torch.no_grad()
def run(hf: Any) -> None:
    past = None
    for piece in torch.arange(23)[None].split((9, 1, 13), 1):
        past = hf(piece, past_key_values=past, use_cache=True).past_key_values


def stock(folder: Path) -> Any:
    """As transformers reads it; None where it does not, or not whole, or cannot run it."""
    try:
        hf, notes = transformers().AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        run(hf)
    except Exception:
        return None
    return None if any(notes.values()) else hf.eval()


def built(kind: str, keys: dict[str, Any], folder: Path) -> Any:
    """A model that has the changed key from the beginning; None where transformers makes none."""
    given = {key: copy.deepcopy(value) for key, value in keys.items() if value is not ...}
    try:
        torch.manual_seed(1)
        hf = transformers().AutoModelForCausalLM.from_config(transformers().AutoConfig.for_model(kind, **given)).eval()
        run(hf)
    except Exception:
        return None
    with torch.no_grad():
        for tensor in hf.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    hf.save_pretrained(folder)
    return hf


def agree(hf: Any, folder: Path) -> str:
    """Why ours is not read, "" where it is and computes the same."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lm = checkpoint.from_hf(folder)
    except CheckpointError as error:
        return str(error)
    # A batch in which rounding decides no token's experts, or two exact programs part there.
    clear = next(seed for seed in range(20) if not tied(lm, batch(lm.config.vocab_size, seed)).any())
    assert_same(hf, lm, seed=clear)
    assert sum(tensor.numel() for tensor in lm.parameters()) == hf.num_parameters()
    return ""


def test_every_key_is_thought_of() -> None:
    new = {key for family in FAMILIES for key in known(family.model_type)} - OTHERS.keys() - set(NO_MATTER)
    assert not new, f"transformers knows keys that nobody has looked at: {', '.join(sorted(new))}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [family.model_type for family in FAMILIES])
def test_a_key_is_meant_or_refused(kind: str, tmp_path: Path) -> None:
    name = next(name for name, (its, _) in CASES.items() if its == kind)
    theirs(name).save_pretrained(tmp_path / "a")
    file, wrong, same = tmp_path / "a" / "config.json", [], 0
    before = json.loads(file.read_text())
    for number, (key, value) in enumerate(changes(kind)):
        file.write_text(json.dumps(before | {key: value}))
        hf, said = stock(tmp_path / "a"), ""
        try:
            if hf is not None:
                said = agree(hf, tmp_path / "a")
            elif (hf := built(kind, SIZES | CASES[name][1] | {key: value}, tmp_path / str(number))) is not None:
                said = agree(hf, tmp_path / str(number))
            same += hf is not None and not said
        except Exception as error:
            wrong.append(f"{key}={value!r}: {str(error)[:200]}")
            continue
        if said and not any(word in said for word in (key, "rope_type", OURS.get(key, key), *WEIGHTS)):
            wrong.append(f"{key}={value!r} is refused without its name: {said[:200]}")
    assert not wrong, "\n".join(wrong)
    assert same > 10


CONFLICTS = [
    ("llama", {"rope_parameters": YARN | {"rope_theta": 500.0, "original_max_position_embeddings": 16}}),
    ("granite", {"rope_parameters": None, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}),
]


@pytest.mark.parametrize(("name", "keys"), CONFLICTS)
def test_two_lengths_before_the_stretching_are_refused(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """transformers 5 takes the one beside the scaling, transformers 4 the one in it."""
    theirs(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    body = json.loads(file.read_text()) | keys
    file.write_text(json.dumps(body | {"original_max_position_embeddings": 64}))
    with pytest.raises(CheckpointError, match="'original_max_position_embeddings' must be what the scaling says, 16"):
        checkpoint.from_hf(tmp_path)
    file.write_text(json.dumps(body | {"original_max_position_embeddings": 16}))
    hf = stock(tmp_path)
    assert hf is not None and not agree(hf, tmp_path)


@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt2", "deepseek_v3"])
def test_windows_that_an_architecture_has_not_are_refused(name: str, tmp_path: Path) -> None:
    """Its layers see everything, but caches of transformers would forget."""
    theirs(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    body = json.loads(file.read_text())
    for keys in ({"sliding_window": 5}, {"attention_chunk_size": 5}, {"layer_types": [WINDOW] * 3}):
        file.write_text(json.dumps(body | keys))
        with pytest.raises(CheckpointError, match=f"the key '{next(iter(keys))}' must be"):
            checkpoint.from_hf(tmp_path)
    for keys in ({"sliding_window": 64, "layer_types": None}, {"layer_types": [FULL] * 3}):  # as good as none
        file.write_text(json.dumps(body | keys))
        hf = stock(tmp_path)
        assert hf is not None and not agree(hf, tmp_path)
