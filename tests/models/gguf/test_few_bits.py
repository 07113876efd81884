"""Models in few bits as GGUF: the codes that they have, read back by the package that defines the file."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import llama_cpp
from turnout.cli.main import main
from turnout.errors import UsageError
from turnout.models import LM, LMConfig, MLAConfig, MoEConfig, QuantizedConfig, checkpoint
from turnout.models.checkpoint.mxfp4 import matrix_of
from turnout.models.gguf import to_gguf
from turnout.reshape import densify, quantize

gguf = pytest.importorskip("gguf")

SIZES: dict[str, Any] = {"vocab_size": 96, "width": 64, "layers": 2, "heads": 2, "max_seq": 64, "init_std": 0.1}
LATENT = MLAConfig(q_rank=32, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
CONFIGS = {
    "dense": LMConfig(**SIZES, hidden=128, kv_heads=1, qkv_bias=True, out_bias=True, ff_bias=True),
    "tied": LMConfig(**SIZES, hidden=64, kv_heads=1, tie_embeddings=True, rope_scaling=LLAMA3),
    "experts": LMConfig(**SIZES, kv_heads=1, moe=MoEConfig(4, 2, 32, router_options={"renormalize": True})),
    # Written with a shared expert of nothing but zeros.
    "silent": LMConfig(**SIZES, qkv_bias=True, moe=MoEConfig(4, 2, 32, router_options={"renormalize": False})),
    "latent": LMConfig(**SIZES, hidden=64, attention="mla", mla=LATENT, norm_eps=1e-6, moe=MoEConfig(
        4, 2, 32, shared_hidden=64, layers=(1,), router="GroupLimited",
        router_options={"num_groups": 2, "top_groups": 1, "scores": "sigmoid", "bias": True, "renormalize": True})),
}  # fmt: skip
OSS = LMConfig(
    **SIZES, kv_heads=1, sinks=True, qkv_bias=True, out_bias=True, window=6, window_layers=(0,),
    moe=MoEConfig(3, 2, 32, activation="swiglu_oai", bias=True, router_options={"bias": True}),
)  # fmt: skip


def oss() -> LM:
    """A model with random experts in MXFP4, and random biases."""
    few = QuantizedConfig(bits=4, group=32, codes="mxfp4", scale="bfloat16", parts=("experts",))
    lm, g = LM(dataclasses.replace(OSS, quantized=few), seed=2), torch.Generator().manual_seed(3)
    for block in lm.blocks:
        for held in (block.ff.bank.up, block.ff.bank.down):
            shape = (*held.packed.shape[:2], held.packed.shape[2] // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=g, dtype=torch.uint8)
            held.fill(matrix_of(blocks, torch.randint(119, 124, shape, generator=g, dtype=torch.uint8)))
    return noisy(lm)


def noisy(lm: LM) -> LM:
    """The model, whose biases, norms and sinks are no longer what they start as."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
            if tensor.is_floating_point() and ("bias" in name or "norm" in name or "sinks" in name):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=g))
    return lm.eval()


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> its type, and its numbers in fp32."""
    found = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in found}


def models() -> dict[str, tuple[LM, str]]:
    """Name -> a model in few bits, and the type to write it as."""
    made: dict[str, tuple[LM, str]] = {"oss": (oss(), "mxfp4"), "oss in eight": (oss(), "q8_0")}
    for name, config in CONFIGS.items():
        whole = noisy(LM(config, seed=1))
        for bits, group, kind in (
            (8, 32, "q8_0"),
            (8, None, "q8_0"),
            (4, 32, "q4_0"),
            (4, 64, "q8_0"),
            (4, None, "q8_0"),
        ):
            if group == 64 and name != "dense":
                continue
            few, _ = quantize(whole, bits=bits, group=group, parts=("experts", "shared", "dense", "attention"))
            made[f"{name} {bits} {group or 'rows'}"] = few, kind
    whole = noisy(LM(CONFIGS["dense"], seed=1))
    made["head"] = quantize(whole, bits=4, group=32, parts=("head", "dense", "attention"))[0], "q4_0"
    return made


MODELS = models()


@pytest.mark.parametrize("name", MODELS)
def test_every_number_is_the_one_that_the_codes_mean(name: str, tmp_path: Path) -> None:
    lm, kind = MODELS[name]
    done = to_gguf(lm, tmp_path / "few.gguf", kind=kind, tokenizer=False)  # pyrefly: ignore
    to_gguf(densify(lm)[0], tmp_path / "whole.gguf", kind="f32", tokenizer=False)
    found, want = tensors(tmp_path / "few.gguf"), tensors(tmp_path / "whole.gguf")
    assert found.keys() == want.keys() and "rounds" not in str(done)
    coded = {part for part in found if found[part][0] == kind.upper()}
    rounded = {"token_embd.weight", "output.weight"} - ({"output.weight"} if name == "head" else set())
    for part, (_, numbers) in found.items():
        if kind == "mxfp4" or (part not in rounded and (part.startswith("blk.") and whole_is_exact(lm, part))):
            assert np.array_equal(numbers, want[part][1]), part
    assert coded and done.tensors[kind.upper()] == len(coded)


def whole_is_exact(lm: LM, part: str) -> bool:
    """Whether the model has this tensor in few bits, or the file in fp32."""
    parts = lm.config.quantized.parts
    kind = (
        "attention" if "attn" in part else "experts" if "_exps" in part else "shared" if "_shexp" in part else "dense"
    )
    return kind in parts or "norm" in part or "bias" in part or "gate_inp" in part


@pytest.mark.parametrize(
    ("bits", "group", "codes", "kind", "said"),
    [
        (8, 32, "int", "q4_0", r"second time.*pass q8_0, or write the weights out first"),
        (4, 16, "int", "q4_0", r"4 \(int\) in groups of 16.*second time.*--densify"),
        (4, 32, "nf4", "q8_0", r"4 \(nf4\) in groups of 32.*second time"),
        (4, 32, "int", "mxfp4", "pass q8_0 or q4_0, or"),
        (4, 32, "int", "bf16", "bf16 for weights in few bits.*--densify"),
    ],
)
def test_what_would_be_rounded_twice_is_refused(bits, group, codes, kind, said, tmp_path: Path) -> None:
    lm, _ = quantize(LM(CONFIGS["dense"]), bits=bits, group=group, codes=codes)
    with pytest.raises(UsageError, match=said):
        to_gguf(lm, tmp_path / "x.gguf", kind=kind, tokenizer=False)
    with pytest.raises(UsageError, match=r"mxfp4 for whole weights"):
        to_gguf(LM(CONFIGS["dense"]), tmp_path / "x.gguf", kind="mxfp4", tokenizer=False)
    assert not list(tmp_path.iterdir())


def test_scales_that_are_no_fp16_are_rounded_and_told(tmp_path: Path) -> None:
    lm, _ = quantize(LM(CONFIGS["dense"]), bits=8, group=32, scale="float32")
    done = to_gguf(lm, tmp_path / "x.gguf", kind="q8_0", tokenizer=False)
    assert "tensors have scales that fp16 rounds, by 0.0005 of them at most" in str(done)
    lm.blocks[1].ff.up.scale.fill_(1e5)
    with pytest.raises(UsageError, match=r"blk.1.ffn_gate.weight must have scales below 65504"):
        to_gguf(lm, tmp_path / "y.gguf", kind="q8_0", tokenizer=False)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_on_the_command_line_nothing_is_rounded_twice_unasked(tmp_path: Path, capsys) -> None:
    few, _ = quantize(LM(CONFIGS["experts"]), bits=4, group=32)
    checkpoint.to_hf(few, tmp_path / "hf")
    checkpoint.save(tmp_path / "own", few)

    def gguf_of(name: str, *options: str) -> int:
        out = tmp_path / "x.gguf"
        out.unlink(missing_ok=True)
        return main(["convert", str(tmp_path / name), *options, "--no-tokenizer", "--out", str(out), "--quiet"])

    for name in ("hf", "own"):
        assert gguf_of(name, "--gguf", "q4_0") == 0
        numbers = tensors(tmp_path / "x.gguf")["blk.1.ffn_down_exps.weight"][1]
        assert np.array_equal(numbers, few.blocks[1].ff.bank.down.packed.dequantised().numpy())
        assert gguf_of(name, "--gguf", "q8_0", "--densify") == 0
        again = tensors(tmp_path / "x.gguf")["blk.1.ffn_down_exps.weight"][1]
        assert 0 < np.abs(again - numbers).max() < 0.01
    capsys.readouterr()
    assert gguf_of("hf", "--gguf", "mxfp4") == 2
    assert "second time" in capsys.readouterr().err and not (tmp_path / "x.gguf").exists()


@pytest.mark.slow
@pytest.mark.skipif(llama_cpp.why_not() is not None, reason=str(llama_cpp.why_not()))
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    """It rounds what it multiplies with to eight bits; so they differ by that, and a token may take another expert."""
    lm, kind = MODELS[name]
    to_gguf(lm, tmp_path / "few.gguf", kind=kind, tokenizer=False)  # pyrefly: ignore
    id_BS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = lm(id_BS).logits_BSV.numpy()
    got = np.stack(llama_cpp.logits(tmp_path / "few.gguf", id_BS.tolist()))
    off_BS = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.median(off_BS) < 0.03 and np.mean(off_BS > 0.1) < 0.1, off_BS
