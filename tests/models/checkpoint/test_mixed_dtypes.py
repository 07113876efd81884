"""Tensors that a folder stores in a dtype of their own: written back so, and computed with as transformers does."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turnout.errors import CheckpointError
from turnout.models import LM, checkpoint
from turnout.models.families.express import architecture_of
from turnout.models.families.tensors import slots
from turnout.recipes.convert import convert
from turnout.recipes.plan import make_plan
from turnout.recipes.steps import Drop, Upcycle

SIZES = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
MOE |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": QWEN,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": MOE | MLA | {"num_key_value_heads": 4},
    "glm4_moe": MOE | {"head_dim": 8},
}
BIAS = ".e_score_correction_bias"


def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def apart(name: str) -> bool:
    """What checkpoints keep in fp32 beside bfloat16."""
    return "norm" in name or name.endswith(("gate.weight", BIAS))


def make(
    path: Path,
    kind: str,
    which: Callable[[str], bool] = apart,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.float32),
) -> Path:
    """A folder of transformers in the first dtype, with tensors in the second; none is a number of the first only."""
    found = library()
    torch.manual_seed(11)
    config = found.AutoConfig.for_model(kind, **(SIZES | KINDS[kind]))
    found.AutoModelForCausalLM.from_config(config).to(dtypes[0]).save_pretrained(path, max_shard_size="20KB")
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
            tensors[name] = (tensor.float() + 0.01 * noise).to(dtypes[1]) if which(name) else tensor.to(dtypes[0])
        save_file(tensors, file, metadata={"format": "pt"})
    keys = json.loads((path / "config.json").read_text()) | {"dtype": str(dtypes[0]).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n")
    index = path / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    body["metadata"]["total_size"] = sum(tensor.nbytes for tensor in stored(path).values())
    index.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")
    return path


def stored(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_written_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path / "mixed", kind)
    lm = checkpoint.from_hf(path)
    assert lm.embedding.dtype == torch.bfloat16
    checkpoint.to_hf(lm, tmp_path / "out")
    assert files(tmp_path / "out") == files(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_holds_what_transformers_holds(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path / "mixed", kind)
    lm, model = checkpoint.from_hf(path), library().AutoModelForCausalLM.from_pretrained(path).eval()
    want = model.state_dict()
    found = slots(lm, architecture_of(lm.config)[0].layouts[1])
    assert set(found) & set(want) >= {name for name in want if "experts" not in name} - {"lm_head.weight"}
    for name, slot in found.items():
        if name in want:
            assert want[name].dtype == slot.stored().dtype and torch.equal(want[name], slot.stored()), name
    id_BS = torch.arange(24).view(2, 12)
    with torch.no_grad():  # the same numbers in fp32: what differs is the model, not its rounding
        torch.testing.assert_close(lm.float()(id_BS).logits_BSV, model.float()(id_BS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_a_correction_bias_in_bfloat16_stays_so(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path / "mixed", kind, lambda name: name.endswith(BIAS), (torch.bfloat16, torch.bfloat16))
    lm = checkpoint.from_hf(path)
    checkpoint.to_hf(lm, tmp_path / "out")
    assert files(tmp_path / "out") == files(path)
    bias = next(slot.view for name, slot in slots(lm, architecture_of(lm.config)[0].layouts[0]).items() if BIAS in name)
    assert bias.dtype == torch.float32 and bool(bias.any())
    bias += 2.0**-20  # no number of bfloat16 any more
    checkpoint.to_hf(lm, tmp_path / "finer")
    found = next(tensor for name, tensor in stored(tmp_path / "finer").items() if BIAS in name)
    assert found.dtype == torch.float32 and torch.equal(found, bias)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_other_pairs_of_dtypes(dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    path = make(tmp_path / "mixed", "mixtral", apart, dtypes)
    lm = checkpoint.from_hf(path)
    assert lm.embedding.dtype == dtypes[0]
    checkpoint.to_hf(lm, tmp_path / "out")
    assert files(tmp_path / "out") == files(path)


def test_a_tensor_that_changed_keeps_its_dtype_and_has_the_models_numbers(tmp_path: Path) -> None:
    path = make(tmp_path / "mixed", "llama")
    lm = checkpoint.from_hf(path)
    with torch.no_grad():
        lm.norm.weight.mul_(2)
    checkpoint.to_hf(lm, tmp_path / "out")
    before, after = stored(path), stored(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: t.dtype for name, t in after.items()}
    assert torch.equal(after["model.norm.weight"], lm.norm.weight.float())
    assert torch.equal(after["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())


def test_asked_for_one_dtype_all_are_in_it(tmp_path: Path) -> None:
    path = make(tmp_path / "mixed", "llama")
    for dtype in (torch.float32, torch.float16):
        checkpoint.to_hf(checkpoint.from_hf(path, dtype=dtype), tmp_path / str(dtype))
        assert {tensor.dtype for tensor in stored(tmp_path / str(dtype)).values()} == {dtype}


def test_a_conversion_keeps_them_and_its_plan_says_so(tmp_path: Path) -> None:
    path = make(tmp_path / "mixed", "mixtral")
    plan = make_plan(path, [Drop(count=1, by="random")])
    assert plan.notes[0].startswith("stored in float32, which") and "computes in bfloat16" in plan.notes[0]
    before = stored(path)
    assert plan.wider_bytes == sum(tensor.nbytes // 2 for name, tensor in before.items() if apart(name))
    done = convert(path, [Drop(count=1, by="random")], tmp_path / "out")
    after = stored(tmp_path / "out")
    assert {name for name, tensor in after.items() if tensor.dtype == torch.float32} == set(filter(apart, after))
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert torch.equal(after[norm], before[norm])
    assert done.record["stock"]["dtypes"]["bfloat16"]
    dense = make(tmp_path / "dense", "llama")
    convert(dense, [Upcycle(4, 2)], tmp_path / "sparse")
    assert torch.equal(stored(tmp_path / "sparse")[norm], stored(dense)[norm])  # of another architecture


def test_our_own_format_says_what_becomes_of_them(tmp_path: Path) -> None:
    path = make(tmp_path / "mixed", "llama")
    convert(path, [], tmp_path / "own", as_format="model")
    lm = checkpoint.load(tmp_path / "own")
    assert {tensor.dtype for tensor in lm.state_dict().values()} == {torch.bfloat16}


def test_where_nobody_says_which_dtype_they_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "mixed", "llama")
    for named in (None, "float16"):
        keys = json.loads((path / "config.json").read_text()) | {"dtype": named, "torch_dtype": named}
        (path / "config.json").write_text(json.dumps(keys))
        with pytest.raises(CheckpointError, match=r"bfloat16 \(.*\), float32 \(.*config\.json.*--dtype float32"):
            checkpoint.from_hf(path)
    assert isinstance(checkpoint.from_hf(path, dtype=torch.float32), LM)
