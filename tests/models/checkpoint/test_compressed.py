"""compressed-tensors: what is packed is read back to the bit; its own library, where it is installed, is the judge."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turnout.cli.main import main
from turnout.errors import CheckpointError, UsageError
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.models.checkpoint import compressed
from turnout.models.gguf import to_gguf
from turnout.recipes.models import opened
from turnout.reshape import quantize
from turnout.types import Packed

SIZES: dict[str, Any] = {"vocab_size": 67, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_seq": 64}
DENSE = LMConfig(**SIZES, hidden=40, init_std=0.2)
EXPERTS = LMConfig(**SIZES, init_std=0.2, moe=MoEConfig(4, 2, 24))


def rounded(weight: Tensor, bits: int, group: int | None, scale: torch.dtype = torch.float32) -> Packed:
    """To nearest, by the largest of each group."""
    group = weight.shape[-1] if group is None else group
    grouped = weight.float().contiguous().unflatten(-1, (-1, group))
    most = 2 ** (bits - 1) - 1
    scale_OG = (grouped.abs().amax(-1).clamp(min=1e-8) / most).to(scale)
    value = (grouped / scale_OG.float().unsqueeze(-1)).round().clamp(-most - 1, most).flatten(-2)
    return Packed.of(value.to(torch.int8), scale_OG, group=group, bits=bits)


def make(folder: Path, config: LMConfig, bits: int, group: int | None, scale: torch.dtype = torch.float32) -> LM:
    """A folder whose linear maps are packed; the model that it stands for."""
    checkpoint.to_hf(LM(config, seed=1), folder)
    tensors, whole, packed = load_file(folder / "model.safetensors"), [], {}
    for name, tensor in list(tensors.items()):
        if tensor.ndim != 2 or "embed" in name or "lm_head" in name or name.endswith("gate.weight"):
            whole += [name.removesuffix(".weight")] if tensor.ndim == 2 else []
            continue
        packed[name] = rounded(tensor, bits, group, scale)
        stem = tensors.pop(name) is not None and name.removesuffix(".weight")
        tensors |= {f"{stem}{end}": part for end, part in compressed.pack(packed[name]).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    keys = json.loads((folder / "config.json").read_text())
    keys["quantization_config"] = compressed.settings(packed, whole)
    (folder / "config.json").write_text(json.dumps(keys))
    return checkpoint.from_hf(folder)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 8), (2, 40), (5, 6), (1, 66)])
def test_packed_and_unpacked_again(bits: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(bits)
    value = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator)
    one = Packed.of(value, torch.rand(shape[0], 2, generator=generator), group=shape[1] // 2, bits=bits)
    back = compressed.unpack(*compressed.pack(one).values())
    assert torch.equal(back.values(), one.values()) and torch.equal(back.scale, one.scale)
    assert (back.bits, back.group, back.shape) == (one.bits, one.group, one.shape)


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (8, None), (8, 8)])
@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_a_folder_is_read_as_the_numbers_it_stands_for(
    config: LMConfig, bits: int, group: int | None, tmp_path: Path
) -> None:
    lm, whole = make(tmp_path / "x", config, bits, group), LM(config, seed=1)
    weight = whole.blocks[1].attention.out.weight.detach()
    assert torch.equal(lm.blocks[1].attention.out.weight, rounded(weight, bits, group).dequantised())
    if config.moe:
        down = whole.blocks[1].ff.bank.down_EFD[2].t()
        assert torch.equal(lm.blocks[1].ff.bank.down_EFD[2].t(), rounded(down, bits, group).dequantised())
    assert torch.equal(lm.embedding, whole.embedding)
    notes = checkpoint.peek(tmp_path / "x").notes
    assert len(notes) == 1 and "compressed-tensors" in notes[0]


def change(folder: Path, do: Any) -> None:
    tensors, keys = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    do(tensors, keys["quantization_config"], keys["quantization_config"]["config_groups"]["group_0"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(keys))


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED = {
    "scales": (lambda t, c, g: t.pop(f"{Q}_scale"), f"{Q} without {Q}_scale"),
    "shape": (lambda t, c, g: t.pop(f"{Q}_shape"), f"{Q} without {Q}_shape"),
    "words": (lambda t, c, g: t.update({f"{Q}_packed": t[f"{Q}_packed"][:, 1:].contiguous()}), "I32 words"),
    "another shape": (lambda t, c, g: t.update({f"{Q}_shape": torch.tensor([32, 24])}), "I32 words"),
    "no shape": (lambda t, c, g: t.update({f"{Q}_shape": torch.tensor([32, 0])}), "of shape"),
    "group": (lambda t, c, g: t.update({f"{Q}_scale": torch.ones(32, 3)}), "scales"),
    "zero points": (lambda t, c, g: t.update({f"{Q}_zero_point": torch.ones(32, 3)}), "left over"),
    "order": (lambda t, c, g: t.update({f"{Q}_g_idx": torch.arange(32)}), "left over|dtypes"),
    "one-sided": (lambda t, c, g: g["weights"].update(symmetric=False), "with 4 bits, int, False"),
    "floats": (lambda t, c, g: g["weights"].update(type="float"), "with 4 bits, float"),
    "three bits": (lambda t, c, g: g["weights"].update(num_bits=3), "with 3 bits"),
    "inputs": (lambda t, c, g: g.update(input_activations={"num_bits": 8}), "rounded too"),
    "format": (lambda t, c, g: g.update(format="marlin-24"), "marlin-24"),
    "by blocks": (lambda t, c, g: g["weights"].update(strategy="block"), "block"),
    "actorder": (lambda t, c, g: g["weights"].update(actorder="group"), "another order"),
    "keys": (lambda t, c, g: c.update(kv_cache_scheme={"num_bits": 8, "dynamic": True}), "kv_cache_scheme"),
    "rotated": (lambda t, c, g: c.update(transform_config={"config_groups": {"R3": {"type": "hadamard"}}}), "rotated"),
    "sparse": (lambda t, c, g: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    "no groups": (lambda t, c, g: c.pop("config_groups"), "config_groups"),
    "no group size": (lambda t, c, g: g["weights"].update(group_size=None), "group_size None"),
    "another group": (lambda t, c, g: g["weights"].update(group_size=16), "groups of 8, where config.json says 4 bits"),
    "other bits": (lambda t, c, g: g["weights"].update(num_bits=8), "of 4 bits in groups of 8, .* 8 bits in groups"),
    "rows": (lambda t, c, g: g["weights"].update(strategy="channel"), "in groups of 8, .* 4 bits in rows"),
    "not finite": (lambda t, c, g: t[f"{Q}_scale"][3, 1].fill_(float("nan")), f"finite numbers .* one of {Q}"),
    "infinite": (lambda t, c, g: t[f"{Q}_scale"][3, 1].fill_(float("inf")), f"finite numbers .* one of {Q}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make(tmp_path / "x", DENSE, 4, 8)
    do, words = REFUSED[name]
    change(tmp_path / "x", do)
    for packed in (False, True):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.from_hf(tmp_path / "x", packed=packed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 8), (8, None)])
@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_transformers_loads_the_same_model(
    config: LMConfig, bits: int, group: int | None, dequantize: bool, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="the library compressed-tensors is not installed")
    transformers = pytest.importorskip("transformers")
    lm = make(tmp_path / "x", config, bits, group)
    asked = transformers.CompressedTensorsConfig(dequantize=True) if dequantize else None
    more = {"quantization_config": asked} if asked is not None else {}
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32, **more)
    id_BS = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(hf(id_BS).logits, lm(id_BS).logits_BSV, rtol=0, atol=1e-4)


PARTS = ("attention", "dense", "experts", "shared", "head")


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("LlamaForCausalLM", {"hidden": 40}),
        ("Qwen2ForCausalLM", {"hidden": 40, "qkv_bias": True, "tie_embeddings": True}),
        ("Phi3ForCausalLM", {"hidden": 40}),
        ("MixtralForCausalLM", {"moe": MoEConfig(4, 2, 24)}),
        ("Qwen3MoeForCausalLM", {"qk_norm": "head", "hidden": 40, "moe": MoEConfig(4, 2, 24, layers=(1,))}),
        ("Qwen2MoeForCausalLM", {"qkv_bias": True, "moe": MoEConfig(4, 2, 24, shared_hidden=16, shared_gate=True,
            router_options={"renormalize": False})}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.parametrize(("bits", "group", "parts"), [(4, 8, PARTS), (8, None, ("attention", "experts", "dense"))])
def test_a_model_in_few_bits_is_written_and_read_to_the_bit(
    family: str, fields: dict[str, Any], bits: int, group: int | None, parts: tuple[str, ...], tmp_path: Path
) -> None:
    whole = LM(LMConfig(**SIZES, **fields, init_std=0.2), seed=3).eval()
    parts = tuple(part for part in whole.config.map_inputs() if part in parts)
    lm, _ = quantize(whole, bits=bits, group=group, parts=parts)
    assert checkpoint.to_hf(lm, tmp_path / "x", architecture=family) == family
    back = checkpoint.from_hf(tmp_path / "x", packed=True)
    wide = {"scale": "float32"} if "experts" in parts else {}  # as transformers needs them
    assert back.config.quantized == dataclasses.replace(lm.config.quantized, **wide)
    for name, tensor in lm.state_dict().items():
        assert torch.equal(back.state_dict()[name].float(), tensor.float()), name
    id_BS = torch.arange(40).view(2, 20)
    with torch.no_grad():
        want = lm(id_BS).logits_BSV
        torch.testing.assert_close(back(id_BS).logits_BSV, want, rtol=0, atol=0)
        plain = checkpoint.from_hf(tmp_path / "x")
        assert plain.config.quantized is None
        torch.testing.assert_close(plain(id_BS).logits_BSV, want, rtol=0, atol=1e-4)
    keys = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert ("lm_head" in keys["ignore"]) == ("head" not in parts)
    checkpoint.to_hf(back, tmp_path / "y")
    assert (tmp_path / "y" / "config.json").read_text() == (tmp_path / "x" / "config.json").read_text()
    ours, again = (load_file(tmp_path / one / "model.safetensors") for one in "xy")
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    if compressed_tensors_is_here():
        transformers = pytest.importorskip("transformers")
        hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(hf(id_BS).logits, want, rtol=0, atol=1e-4)


def compressed_tensors_is_here() -> bool:
    return importlib.util.find_spec("compressed_tensors") is not None


def test_what_nobody_reads_in_few_bits_is_refused_by_name(tmp_path: Path) -> None:
    lm = LM(LMConfig(**SIZES, hidden=40))
    with pytest.raises(UsageError, match=r"quantized.codes is 'nf4'.*--codes int"):
        checkpoint.to_hf(quantize(lm, bits=4, group=8, codes="nf4")[0], tmp_path / "x")
    fused = LMConfig(**SIZES, embedding_scale=3.0, attention_scale=0.2, moe=MoEConfig(4, 2, 24))
    with pytest.raises(UsageError, match="all experts of a layer in one tensor"):
        checkpoint.to_hf(quantize(LM(fused), bits=4, group=8)[0], tmp_path / "x")
    held = quantize(LM(fused), bits=4, group=8, parts=("attention",))[0]
    assert checkpoint.to_hf(held, tmp_path / "x") == "GraniteMoeForCausalLM"
    with pytest.raises(UsageError, match="in few bits"):
        to_gguf(held, tmp_path / "x.gguf", tokenizer=False)


def test_what_a_model_cannot_hold_is_read_whole_alone(tmp_path: Path) -> None:
    make(tmp_path / "x", DENSE, 4, 8)
    name = "model.layers.1.self_attn.q_proj"
    change(tmp_path / "x", lambda t, c, g: t.update({f"{name}.weight": torch.zeros(32, 32)}) or
        [t.pop(f"{name}.weight{end}") for end in ("_packed", "_scale", "_shape")])  # fmt: skip
    with pytest.raises(CheckpointError, match=f"{name}.weight whole, and others of its kind packed.*packed=False"):
        checkpoint.from_hf(tmp_path / "x", packed=True)
    with pytest.warns(UserWarning, match=f"held whole: .*{name}.weight whole, and others of its kind packed"):
        lm = opened(tmp_path / "x", "turnout sample", "cpu", packed=True).lm
    assert lm.config.quantized is None and not lm.blocks[1].attention.qkv.weight[:32].any()
    checkpoint.to_hf(LM(DENSE), tmp_path / "y")
    with pytest.raises(CheckpointError, match="none that are packed"):
        checkpoint.from_hf(tmp_path / "y", packed=True)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.to_hf(LM(EXPERTS), tmp_path / "m")
    out = tmp_path / "four"
    assert main(["convert", str(tmp_path / "m"), "--bits", "4", "--group", "8", "--out", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "MixtralForCausalLM" in said and ("compressed-tensors" in said or compressed_tensors_is_here())
    lm = checkpoint.from_hf(out, packed=True)
    assert lm.config.quantized is not None and lm.config.quantized.bits == 4
