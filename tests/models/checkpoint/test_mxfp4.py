"""Weights of four bits: transformers' own reading of them is the judge."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turnout.errors import CheckpointError, UnknownNameError, UsageError
from turnout.models import LM, LMConfig, MoEConfig, QuantizedConfig, checkpoint, generate
from turnout.models.checkpoint.mxfp4 import matrix_of, stored, unpack
from turnout.recipes.models import opened
from turnout.reshape import densify, quantize

MOE = MoEConfig(3, 2, 32, activation="swiglu_oai", bias=True, router_options={"bias": True})
CONFIG = LMConfig(
    vocab_size=67, width=64, layers=2, heads=4, kv_heads=2, max_seq=64, init_std=0.1, moe=MOE,
    sinks=True, qkv_bias=True, out_bias=True, window=6, window_layers=(0,),
)  # fmt: skip
QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def packed(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Random blocks and scales, the latter around 2^-4 and with one very small and one large."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(120, 125, shape, generator=g, dtype=torch.uint8)
    scales.view(-1)[0], scales.view(-1)[1] = 20, 130
    return blocks, scales


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in bfloat16 with its experts packed, blocks and scales in different files."""
    path = tmp_path / "packed"
    checkpoint.to_hf(LM(CONFIG).bfloat16(), path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    scales = {}
    for seed, name in enumerate(sorted(tensors)):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inside, outside = tensors.pop(name).shape
            tensors[f"{name}_blocks"], scales[f"{name}_scales"] = packed(seed, experts, outside, inside // 32)
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": scales}
    for file, part in files.items():
        save_file(part, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    keys = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(keys | {"quantization_config": QUANTISED}))
    return path


@pytest.mark.parametrize("shape", [(5, 1), (64, 3), (1, 4)])
def test_unpacks_as_transformers_does(shape: tuple[int, int]) -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    for dtype in (torch.float32, torch.bfloat16):
        blocks, scales = packed(shape[0], *shape) if shape[1] > 1 else packed(9, *shape)
        want = theirs.convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]
        assert torch.equal(unpack(blocks, scales).to(dtype), want)


def theirs_from(path: Path, dtype: torch.dtype) -> Any:
    """Their model; where there is no GPU they unpack too, and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        quantised = transformers.Mxfp4Config(dequantize=True)
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, quantization_config=quantised
        ).eval()


@torch.no_grad()
def test_a_packed_model_is_read_and_written_unpacked(folder: Path, tmp_path: Path) -> None:
    lm = checkpoint.from_hf(folder)
    assert lm.embedding.dtype == lm.blocks[0].ff.bank.up.dtype == torch.bfloat16
    assert checkpoint.peek(folder).dtype == torch.bfloat16
    assert checkpoint.to_hf(lm, tmp_path / "whole") == "GptOssForCausalLM"
    keys = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "quantization_config" not in keys and keys["dtype"] == "bfloat16"
    again = checkpoint.from_hf(tmp_path / "whole").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in lm.state_dict().items())
    wide = checkpoint.from_hf(folder, dtype=torch.float32)
    id_BS = torch.randint(67, (2, 23), generator=torch.Generator().manual_seed(0))
    for path in (folder, tmp_path / "whole"):
        hf = theirs_from(path, torch.float32) if path == folder else None
        if hf is None:
            hf = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        want = hf.eval()(id_BS).logits
        assert want.std() > 0.01
        torch.testing.assert_close(wide(id_BS).logits_BSV, want, rtol=0, atol=1e-4)


def test_every_scale_and_code_is_held_as_the_number_that_it_is() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(2, 32, 4)
    blocks = torch.arange(256, dtype=torch.uint8).repeat(16).view(2, 32, 4, 16)
    held = matrix_of(blocks, scales)
    want = torch.stack([unpack(*pair) for pair in zip(blocks, scales, strict=True)]).transpose(1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(held.dequantised(dtype), want.to(dtype), rtol=0, atol=0, equal_nan=True)
    for part, given in zip(stored(held).values(), (blocks, scales), strict=True):
        assert torch.equal(part, given)


def bytes_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_held_as_they_lie_and_written_to_the_byte(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    whole, held = (checkpoint.from_hf(folder, dtype=dtype, packed=packed) for packed in (False, True))
    bank = held.blocks[1].ff.bank
    assert (bank.up.packed.bits, bank.up.packed.group, bank.up.packed.shape) == (4, 32, (3, 64, 64))
    assert torch.equal(bank.up.packed.dequantised(dtype), whole.blocks[1].ff.bank.up_EDH.transpose(1, 2))
    assert torch.equal(bank.down.packed.dequantised(dtype), whole.blocks[1].ff.bank.down_EFD.transpose(1, 2))
    assert held.blocks[0].attention.qkv.weight.dtype == dtype
    id_BS = torch.randint(67, (2, 53), generator=torch.Generator().manual_seed(0))
    allowed = 1e-5 if dtype == torch.float32 else 0.1
    for few in (id_BS, id_BS[:1, :3]):  # written out, and from the codes
        want, got = (lm(few).logits_BSV.float() for lm in (whole, held))
        torch.testing.assert_close(got, want, rtol=0, atol=allowed * float(want.abs().max()))
    if dtype == torch.float32:
        want = theirs_from(folder, dtype)(id_BS[:1, :3]).logits
        torch.testing.assert_close(held(id_BS[:1, :3]).logits_BSV, want, rtol=0, atol=1e-4)
        return
    assert checkpoint.to_hf(held, tmp_path / "again") == "GptOssForCausalLM"
    assert bytes_of(tmp_path / "again").keys() == bytes_of(folder).keys()
    shards = [name for name in bytes_of(folder) if name.endswith(".safetensors")]
    for name in [*shards, "config.json"]:
        assert bytes_of(tmp_path / "again")[name] == bytes_of(folder)[name], name


@torch.no_grad()
def test_held_experts_go_through_our_own_format_and_out_again(folder: Path, tmp_path: Path) -> None:
    held = checkpoint.from_hf(folder, packed=True)
    checkpoint.save(tmp_path / "own", held)
    back = checkpoint.load(tmp_path / "own")
    assert back.config == held.config and back.config.quantized is not None
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in held.state_dict().items())
    back.origin = None
    checkpoint.to_hf(back, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "mxfp4" and "lm_head" in settings["modules_to_not_convert"]
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    before = {name: tensor for part in files for name, tensor in part.items()}
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    plain, _ = densify(held)
    assert plain.config == checkpoint.from_hf(folder).config
    id_BS = torch.arange(20)[None]
    want = checkpoint.from_hf(folder)(id_BS).logits_BSV
    torch.testing.assert_close(plain(id_BS).logits_BSV, want, rtol=0, atol=0)


def test_the_command_line_decodes_from_the_codes(folder: Path, recwarn) -> None:
    held, whole = (opened(folder, "turnout sample", "cpu", packed=packed).lm for packed in (True, False))
    assert held.config.quantized is not None and whole.config.quantized is None and not recwarn.list
    id_BS = torch.arange(5)[None]
    torch.testing.assert_close(*(lm.generate(id_BS, tokens=8, temperature=0) for lm in (held.float(), whole.float())))


def test_what_mxfp4_cannot_say_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    held = checkpoint.from_hf(folder, packed=True)
    with pytest.raises(UsageError, match=r"quantized.codes is 'mxfp4'.*densify"):
        checkpoint.to_hf(held, tmp_path / "x", architecture="MixtralForCausalLM")
    held.blocks[0].ff.bank.up.scale.mul_(1.5)
    with pytest.raises(UsageError, match=r"the scales must be powers of two.*densify"):
        checkpoint.to_hf(held, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for name, value in (("group", 64), ("bits", 8), ("scale", "float16")):
        with pytest.raises(UsageError, match=f"{name} must be .* with codes='mxfp4'"):
            QuantizedConfig(**{"bits": 4, "group": 32, "codes": "mxfp4"} | {name: value})  # pyrefly: ignore
    with pytest.raises(UnknownNameError, match="mxfp4"):
        quantize(LM(CONFIG), bits=4, group=32, codes="mxfp4")  # pyrefly: ignore


def test_what_is_packed_wrongly_is_refused(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    scales = load_file(file)
    name = sorted(scales)[0]
    save_file(scales | {name: scales[name][:, :, :0]}, file)
    with pytest.raises(CheckpointError, match=name.removesuffix("_scales")):
        checkpoint.from_hf(folder)
    save_file(scales | {name: scales[name].float()}, file)
    with pytest.raises(CheckpointError, match="left over"):
        checkpoint.from_hf(folder, dtype=torch.float32)


def test_a_scale_that_is_no_number_is_refused(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("_scales"))
    tensors[name][-1, -1, -1] = 255
    save_file(tensors, file)
    for packed in (False, True):
        with pytest.raises(CheckpointError, match=f"finite numbers .* one of {name.removesuffix('_scales')} that"):
            checkpoint.from_hf(folder, packed=packed)


@torch.no_grad()
def test_it_generates_what_transformers_does_from_the_weights_written_out(folder: Path) -> None:
    held, hf = checkpoint.from_hf(folder, dtype=torch.float32, packed=True), theirs_from(folder, torch.float32)
    prompts = [torch.randint(67, (size,), generator=torch.Generator().manual_seed(size)) for size in (1, 5, 23, 9)]
    made = generate(held, prompts, tokens=12, temperature=0, eos=None, logprobs=True)
    for row, prompt in enumerate(prompts):
        want = hf.generate(prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)[0]
        assert list(made.rows[row]) == want[len(prompt) :].tolist()
