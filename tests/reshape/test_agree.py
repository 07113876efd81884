"""Models of equal names and shapes that are not one architecture."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from turnout.decide.token import TopK
from turnout.errors import CheckpointError, UsageError
from turnout.layers import Adapter
from turnout.models import LM, LMConfig, MoEConfig
from turnout.paths import LoRA
from turnout.reshape import average, fisher, interpolate, soup, stragglers, task_vectors
from turnout.reshape.many_to_one.same_architecture import differences, refuse_unlike

MOE = MoEConfig(4, 2, 8)
CONFIG = LMConfig(vocab_size=16, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, max_seq=32, moe=MOE)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def lm(**fields: Any) -> LM:
    return LM(dataclasses.replace(CONFIG, **fields), seed=1)


def theirs(kind: str, **keys: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("transformers")
        return library.AutoModelForCausalLM.from_config(library.AutoConfig.for_model(kind, **(SIZES | keys)))


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rope_theta": 1e6}, "rope_theta"),
        ({"rope_scaling": LINEAR}, "rope_scaling"),
        ({"heads": 2, "kv_heads": 1, "head_dim": 16}, "heads"),
        ({"norm_eps": 1e-3}, "norm_eps"),
        ({"window": 3}, "window"),
        ({"residual_scale": 0.5}, "residual_scale"),
        ({"logit_divisor": 2.0}, "logit_divisor"),
        ({"moe": dataclasses.replace(MOE, top_k=3)}, "moe.top_k"),
        ({"moe": dataclasses.replace(MOE, activation="geglu")}, "moe.activation"),
        ({"moe": dataclasses.replace(MOE, router_options={"renormalize": False})}, "renormalize"),
    ],
)
def test_fields_that_equal_shapes_hide_are_refused(fields: dict[str, Any], name: str) -> None:
    a, b = lm(), lm(**fields)
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (a, b)]
    if "heads" not in fields:
        assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match=name if "heads" not in fields else "."):
        average([a, b])


def test_every_way_to_merge_asks() -> None:
    a, b = lm(), lm(rope_theta=1e6)

    def loss(model: nn.Module) -> torch.Tensor:
        return model(torch.arange(8)[None]).logits_BSV.square().mean()

    information = [{name: torch.ones_like(p) for name, p in model.named_parameters()} for model in (a, b)]
    for merge in (
        lambda: average([a, b]),
        lambda: task_vectors(a, [b]),
        lambda: interpolate(a, b),
        lambda: fisher([a, b], information),
        lambda: soup({"a": a, "b": b}),
        lambda: stragglers(a, b, loss),
    ):
        with pytest.raises(UsageError, match=r"rope_theta of model 1 must be 10000\.0"):
            merge()


def test_what_changes_nothing_passes_and_what_ends_a_text_is_told() -> None:
    assert average([lm(), lm(init_std=0.5, moe=dataclasses.replace(MOE, router_options={"std": 0.1}))])[1].notes == ()
    assert average([lm(), lm(max_seq=64)])[1].notes == (
        "max_seq is 64 in model 1 and 32 in the first, whose the result has",
    )


def test_products_that_are_merged_factor_by_factor_are_told() -> None:
    def adapted(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(Adapter(nn.Linear(8, 4), LoRA(8, 4, ranks=(2, 2)), TopK(8, 2, top_k=1)))

    said = "0.paths (1 in all) is a product of matrices, and those are merged one by one: "
    said += "the product of the results is not the merged product"
    assert said in average([adapted(0), adapted(1)])[1].notes


@pytest.mark.parametrize(
    ("kind", "keys", "name"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta"),
        ("llama", {"rms_norm_eps": 1e-3}, "norm_eps"),
        ("mixtral", {"num_experts_per_tok": 3}, "moe.top_k"),
        ("qwen3_moe", {"norm_topk_prob": True, "head_dim": 8, "num_experts": 9}, "renormalize"),
        ("gemma2", {"attn_logit_softcapping": 1.0, "head_dim": 8}, "attention_softcap"),
        ("cohere2", {"logit_scale": 1.0, "num_key_value_heads": 2}, "logit_scale"),  # not ours: all it says
    ],
)
def test_live_models_of_transformers(kind: str, keys: dict[str, Any], name: str) -> None:
    plain = {key: value for key, value in keys.items() if key in ("head_dim", "num_experts")}
    a, b = theirs(kind, **plain), theirs(kind, **keys)
    with pytest.raises(UsageError, match=name):
        average([a, b])
    c = theirs(kind, **plain, use_cache=False, attention_dropout=0.1, eos_token_id=5)
    a.name_or_path, c.name_or_path = "here", "there"  # where a model came from is nothing that it does
    notes = average([a, c])[1].notes
    assert any("eos_token_id is 5 in model 1" in note for note in notes)
    assert not any("name_or_path" in note for note in notes)


def test_another_class_with_the_same_tensors() -> None:
    with pytest.raises(UsageError, match=r"model_type|class"):
        average([theirs("llama"), theirs("mistral", sliding_window=None, rms_norm_eps=1e-6)])


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(2, 2)


def test_modules_without_a_configuration() -> None:
    def net(act: nn.Module, *, eps: float = 1e-5, p: float = 0.1) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), act, nn.LayerNorm(2, eps=eps), nn.Dropout(p) if p else nn.Identity())

    refuse_unlike([net(nn.ReLU()), net(nn.ReLU(), p=0.0)], "here")
    with pytest.raises(UsageError, match="the module '1' of model 1 must be ReLU"):
        refuse_unlike([net(nn.ReLU()), net(nn.GELU())], "here")
    with pytest.raises(UsageError, match="eps of the module '2'"):
        refuse_unlike([net(nn.ReLU()), net(nn.ReLU(), eps=1e-2)], "here")
    with pytest.raises(UsageError, match="num_heads"):
        refuse_unlike([nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 4)], "here")
    assert differences([Scaled(1.0), Scaled(2.0)]) == [
        "scale of the class is 2.0 in model 1 and 1.0 in the first, whose the result has"
    ]


def written(folder: Path, *, vocab: dict[str, int], merges: tuple[str, ...] = (), template: str = "a") -> LM:
    folder.mkdir()
    body = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "added_tokens": [{"id": 9, "content": "<s>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(body))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    model = lm()
    model.origin = folder
    return model


def test_tokenizers_are_compared_by_what_their_ids_mean(tmp_path: Path) -> None:
    a = written(tmp_path / "a", vocab={"x": 0, "y": 1})
    with pytest.raises(UsageError, match=r"tokenizer of model 1 .*'x' has another id"):
        average([a, written(tmp_path / "b", vocab={"x": 1, "y": 0})])
    assert average([a, written(tmp_path / "c", vocab={"x": 0, "y": 1})])[1].notes == ()
    other = written(tmp_path / "d", vocab={"x": 0, "y": 1}, merges=("x y",), template="b")
    assert average([a, other])[1].notes == (
        "the tokenizer, but for its vocabulary, of model 1 is not the first one's, which the result has",
        "the chat template of model 1 is not the first one's, which the result has",
    )
    (tmp_path / "d" / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        average([a, other])
