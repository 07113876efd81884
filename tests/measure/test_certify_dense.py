"""Dense models of transformers against ours: equal, and where a planted fault lies."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from turnout.measure import certify
from turnout.models import LM, checkpoint

SIZES = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GEMMA = {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5}
KEYS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA | {"attn_logit_softcapping": 1.0},
    "gemma3_text": GEMMA | {"sliding_window_pattern": 2},
    "gpt2": {"n_positions": 32},
}
FAULTS: dict[str, dict[tuple[str, str], Callable[[LM], object]]] = {
    "gemma2": {
        ("model.layers.1", "norm"): lambda lm: lm.blocks[1].attention_out_norm.weight.add_(0.5),
        ("model.layers.0", "norm"): lambda lm: lm.blocks[0].ff_out_norm.weight[3].add_(2),
        ("model.layers.1", "attention"): lambda lm: setattr(lm.blocks[1].attention, "softcap", 0.2),
    },
    "gemma3_text": {
        ("model.layers.0", "attention"): lambda lm: lm.local_rope.frequency_P.mul_(0.5),
        ("model.layers.1", "attention"): lambda lm: lm.rope.frequency_P.mul_(5),
        ("model.layers.1", "norm"): lambda lm: lm.blocks[1].ff_norm.weight.add_(0.5),
    },
    "gpt2": {
        ("transformer.h.1", "norm"): lambda lm: lm.blocks[1].ff_norm.bias[2].add_(1),
        ("transformer.h.0", "attention"): lambda lm: lm.blocks[0].attention.out.bias[2].add_(1),
        ("transformer.h.1", "feed-forward"): lambda lm: lm.blocks[1].ff.up_bias[5].add_(3),
    },
}


@pytest.mark.parametrize("kind", KEYS)
def test_equal_to_transformers_and_faults_are_located(kind: str, tmp_path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **KEYS[kind], initializer_range=0.4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    good, id_BS = checkpoint.from_hf(tmp_path), torch.arange(40).view(2, 20)
    certificate = certify(model, good, id_BS)
    assert certificate.equal
    root = "transformer.h" if kind == "gpt2" else "model.layers"
    assert {f"{root}.{n}" for n in range(2)} <= set(certificate.layers)
    for (layer, part), plant in FAULTS[kind].items():
        bad = copy.deepcopy(good)
        with torch.no_grad():
            plant(bad)
        parted = certify(model, bad, id_BS).parted
        assert parted is not None and (parted.layer, parted.part) == (layer, part)
