"""Weights of eight bits: transformers' own reading of them is the judge, and the definition where it has none."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from turnout.errors import CheckpointError
from turnout.models import LM, checkpoint
from turnout.models.checkpoint.fp8 import blocks, unpack
from turnout.models.families.tensors import slots
from turnout.recipes.plan import make_plan

SIZES = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK = MLA | {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
    "deepseek_v3": DEEPSEEK,
}
BLOCK = (16, 16)
# What published checkpoints leave in bfloat16, beside what is no matrix.
PLAIN = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "block_sparse_moe.gate.weight")


def scales_of(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """One for each block, such that its largest number is the largest of float8_e4m3fn; by the definition, in loops."""
    rows, columns = (-(-size // one) for size, one in zip(weight.shape, block, strict=True))
    found = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            found[i, j] = part.float().abs().amax() / 448
    return found


def spread(scales: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """The scale of each number, by the definition."""
    return torch.stack([
        torch.stack([scales[i // block[0], j // block[1]] for j in range(shape[1])]) for i in range(shape[0])
    ])  # fmt: skip


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    scales = scales_of(weight, block)
    return (weight.float() / spread(scales, weight.shape, block)).to(torch.float8_e4m3fn), scales


def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def settings(**changed: object) -> dict[str, object]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)} | (
        changed
    )


def make(path: Path, kind: str, *, block: tuple[int, int] | None = BLOCK, **quantization: object) -> Path:
    """A folder in bfloat16, its matrices in eight bits; their scales in another file than they are."""
    found = library()
    torch.manual_seed(3)
    config = found.AutoConfig.for_model(kind, **(SIZES | KINDS[kind]))
    found.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    tensors, scales = load_file(path / "model.safetensors"), {}
    for name, weight in tensors.items():
        if weight.ndim == 2 and not name.endswith(PLAIN):
            tensors[name], scales[f"{name}_scale_inv"] = quantise(weight, block or tuple(weight.shape))
            if block is None:
                scales[f"{name}_scale_inv"] = scales[f"{name}_scale_inv"].reshape(())
    write(path, tensors, scales)
    keys = json.loads((path / "config.json").read_text())
    size = None if block is None else list(block)
    keys |= {"quantization_config": settings(weight_block_size=size, **quantization)}
    (path / "config.json").write_text(json.dumps(keys))
    return path


def write(path: Path, tensors: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
    (path / "model.safetensors").unlink(missing_ok=True)
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": scales}
    for file, part in files.items():
        save_file(part, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def stored(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def theirs(path: Path, dtype: torch.dtype) -> Any:
    """transformers' own model, dequantised. Asked for fp32 it leaves what is not quantised as it is stored."""
    found = library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = found.FineGrainedFP8Config(dequantize=True)
        model = found.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config).eval()
        return model.float() if dtype == torch.float32 else model


def ours(lm: LM) -> dict[str, Tensor]:
    """The parameters by their names in transformers' memory, experts together."""
    from turnout.models.families.express import architecture_of

    family, _ = architecture_of(lm.config)
    return {name: slot.stored() for name, slot in slots(lm, family.layouts[1]).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_read_to_the_bit_as_transformers_reads_it(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", kind)
    model, lm = theirs(path, dtype), checkpoint.from_hf(path, dtype=dtype)
    want, compared = dict(model.state_dict()), 0
    for name, tensor in ours(lm).items():
        if name in want:
            torch.testing.assert_close(tensor, want[name], rtol=0, atol=0)
            compared += 1
    assert compared > 10
    if dtype == torch.float32:
        id_BS = torch.arange(24).view(2, 12)
        with torch.no_grad():
            torch.testing.assert_close(lm(id_BS).logits_BSV, model(id_BS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_plain_and_loads_in_transformers(kind: str, tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", kind)
    lm = checkpoint.from_hf(path)
    assert lm.embedding.dtype == torch.bfloat16
    checkpoint.to_hf(lm, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    kinds = {tensor.dtype for name, tensor in stored(tmp_path / "out").items() if "correction" not in name}
    assert kinds == {torch.bfloat16} and not any("scale" in name for name in stored(tmp_path / "out"))
    model, notes = library().AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes.values()), notes
    want = theirs(path, torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", ["float32", "bfloat16", "bytes", "float8_e8m0fnu"])
def test_unpacks_as_transformers_does(seed: int, scale: str) -> None:
    judge = pytest.importorskip("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 127, (48, 64), generator=g, dtype=torch.uint8)  # 127 is not a number
    weight = (bits | torch.randint(0, 2, (48, 64), generator=g, dtype=torch.uint8) << 7).view(torch.float8_e4m3fn)
    size = torch.randint(100, 150, (3, 2), generator=g, dtype=torch.uint8)
    if scale == "float8_e8m0fnu":
        size = size.view(torch.float8_e8m0fnu)
    elif scale != "bytes":
        size = torch.rand(3, 2, generator=g).to(getattr(torch, scale))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        want = judge._dequantize_one(weight, size, dtype)
        assert torch.equal(unpack(weight, size, (16, 32)).to(dtype), want), f"seed {seed}"


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 16), (16, 17), (40, 33), (5, 3), (24, 32)])
def test_blocks_at_the_edges_are_cut_off(shape: tuple[int, int]) -> None:
    """As DeepSeek's own code does; transformers refuses these, or (24 rows) divides them otherwise."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    bits, scales = quantise(weight, BLOCK)
    assert blocks(shape, scales.shape, BLOCK) == BLOCK
    found = unpack(bits, scales, BLOCK)
    assert torch.equal(found, bits.float() * spread(scales, weight.shape, BLOCK))
    assert float((found - weight).abs().max() / weight.abs().max()) < 0.04


def test_a_folder_with_blocks_cut_off(tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", "deepseek_v3", block=(20, 24))
    found, want = ours(checkpoint.from_hf(path)), stored(path)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert want[f"{name}_scale_inv"].shape == (2, 2) and want[name].shape == (32, 32)
    exact = want[name].float() * spread(want[f"{name}_scale_inv"], want[name].shape, (20, 24))
    assert torch.equal(found[name], exact.bfloat16())


def test_one_scale_a_tensor_and_scales_of_inputs(tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", "qwen3", block=None, activation_scheme="static")
    tensors = load_file(path / "model-00002-of-00002.safetensors")
    inputs = {name.replace("weight_scale_inv", "activation_scale"): torch.tensor(0.5) for name in tensors}
    write(path, load_file(path / "model-00001-of-00002.safetensors"), tensors | inputs)
    lm, want = checkpoint.from_hf(path), theirs(path, torch.bfloat16).state_dict()
    for name, tensor in ours(lm).items():
        assert torch.equal(tensor, want[name]), name
    notes = make_plan(path, [], as_format="model").notes
    assert "14 weights are stored as fp8; read as bfloat16" in notes[0]
    assert "14 scales of inputs are left out" in notes[1]


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", "qwen3_moe")
    want, tensors = ours(checkpoint.from_hf(path)), stored(path)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        for fused, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            for end in ("", "_scale_inv"):
                rows = [
                    torch.cat([tensors.pop(f"{prefix}{expert}.{part}.weight{end}") for part in parts])
                    for expert in range(4)
                ]
                tensors[f"{prefix}{fused}{end}"] = torch.stack(rows)
    write(path, {name: t for name, t in tensors.items() if "scale" not in name}, {
        name: t for name, t in tensors.items() if "scale" in name
    })  # fmt: skip
    found = ours(checkpoint.from_hf(path))
    assert set(found) == set(want) and all(torch.equal(found[name], want[name]) for name in want)


def test_layers_that_predict_further_tokens_are_passed_over(tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", "deepseek_v3")
    want, tensors = ours(checkpoint.from_hf(path)), stored(path)
    name = "model.layers.1.self_attn.o_proj.weight"
    ahead = {one.replace("layers.1", "layers.2"): tensors[one] for one in (name, f"{name}_scale_inv")}
    write(path, tensors, ahead)
    body = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(body | {"num_nextn_predict_layers": 1}))
    with pytest.warns(UserWarning, match="multi-token prediction"):
        found = ours(checkpoint.from_hf(path))
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_the_plan_counts_the_memory_of_what_is_read(tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", "mixtral")
    plan = make_plan(path, [], as_format="model")
    assert plan.rows[0].memory_bytes == 2 * checkpoint.from_hf(path).cost(seq=8).params
    assert "weights are stored as fp8 in blocks of 16 x 16; read as bfloat16, which is what is written" in str(plan)


def changed(path: Path, **keys: object) -> None:
    body = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(body | {"quantization_config": keys}))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quant_method": "gptq"}, r"'gptq'\. Nearest fix: name the model that it was made from.*GPTQModel"),
        ({"quant_method": "awq"}, "'awq'.*AutoAWQ"),
        ({"quant_method": "bitsandbytes"}, r"'bitsandbytes'.*model\.dequantize\(\)"),
        ({"quant_method": "mxfp4"}, "be quantised, or as fp8 or compressed-tensors in .*'mxfp4'"),
        ({"quant_method": "new"}, "'new'.*dequantise it"),
        (settings(expert_dtype="fp4"), "'expert_dtype' is 'fp4'"),
        (settings(fmt="e5m2"), "'fmt' is 'e5m2'"),
        (settings(weight_block_size=[16]), r"\[16\], which must be two sizes"),
        (settings(weight_block_size=[16, 0]), "which must be two sizes"),
        (settings(weight_block_size="16"), "'weight_block_size' is '16'"),
        (settings(weight_block_size=[32, 16]), r"with scales .* for blocks of 32 x 16"),
        (settings(weight_block_size=None), "for one scale"),
    ],
)
def test_what_is_not_read_is_refused_by_name(keys: dict[str, object], said: str, tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", "llama")
    changed(path, **keys)
    for read in (checkpoint.from_hf, checkpoint.peek):
        with pytest.raises(CheckpointError, match=said):
            read(path)


def test_a_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", "llama")
    tensors, scales = (load_file(file) for file in sorted(path.glob("*.safetensors")))
    name = "model.layers.0.mlp.up_proj.weight"
    scales[name.replace("weight", "weight_scale")] = scales.pop(f"{name}_scale_inv")
    write(path, tensors, scales)
    with pytest.raises(CheckpointError, match=rf"{name} without {name}_scale_inv, but with .*weight_scale"):
        checkpoint.from_hf(path)
    write(path, {"other": torch.ones(1)} | tensors, {key: t for key, t in scales.items() if "up_proj" not in key})
    with pytest.raises(CheckpointError, match="without"):
        checkpoint.from_hf(path)


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", "llama")
    tensors, scales = (load_file(file) for file in sorted(path.glob("*.safetensors")))
    name = "model.layers.0.mlp.up_proj.weight"
    scales[f"{name}_scale_inv"][0, 0] = float("nan")
    write(path, tensors, scales)
    with pytest.raises(CheckpointError, match=f"finite numbers .* one of {name}"):
        checkpoint.from_hf(path)


def test_eight_bits_that_config_json_does_not_tell_of_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "fp8", "llama")
    changed(path)
    with pytest.raises(CheckpointError):
        checkpoint.from_hf(path)


def test_one_weight_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "fp8", "mixtral")
    with safe_open(path / "model-00001-of-00002.safetensors", "pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]
    largest, seen = max(shape[0] * shape[-1] for shape in sizes), []
    import turnout.models.checkpoint.packed as place

    plain = place.fp8.unpack
    monkeypatch.setattr(place.fp8, "unpack", lambda *given: seen.append(given[0].numel()) or plain(*given))
    checkpoint.from_hf(path)
    assert len(seen) == 2 * (4 + 4 * 3) and max(seen) <= largest
