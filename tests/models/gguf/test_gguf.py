"""GGUF files, read back by the package that defines them, and by transformers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turnout.cli.main import main
from turnout.errors import StorageError, UnknownNameError, UsageError
from turnout.models import LM, LMConfig, MLAConfig, MoEConfig, checkpoint
from turnout.models.gguf import to_gguf
from turnout.train.data import train_tokenizer

gguf = pytest.importorskip("gguf")

SIZES: dict[str, Any] = {"vocab_size": 300, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 96}
DENSE = LMConfig(**SIZES, init_std=0.2)
EXPERTS = LMConfig(**SIZES, init_std=0.2, moe=MoEConfig(4, 2, 32, router_options={"renormalize": True}))


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> its type, and its numbers in fp32."""
    found = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in found}


def value(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_every_number_is_that_of_the_model(kind: Any, tmp_path: Path) -> None:
    lm = LM(EXPERTS)
    done = to_gguf(lm, tmp_path / "x.gguf", kind=kind, tokenizer=False)
    found = tensors(tmp_path / "x.gguf")
    bank = lm.blocks[1].ff.bank
    wanted = {
        "token_embd.weight": lm.embedding,
        "output.weight": lm.head.weight,
        "blk.1.attn_v.weight": lm.blocks[1].attention.qkv.weight[-32:],
        "blk.1.ffn_up_exps.weight": bank.up_EDH.transpose(1, 2)[:, 32:],
        "blk.1.ffn_gate_exps.weight": bank.up_EDH.transpose(1, 2)[:, :32],
        "blk.1.ffn_down_exps.weight": bank.down_EFD.transpose(1, 2),
    }
    for name, tensor in wanted.items():
        its, numbers = found[name]
        exact = tensor.detach().contiguous().numpy()
        kept = gguf.GGMLQuantizationType[its]
        stored = gguf.quants.dequantize(gguf.quants.quantize(exact, kept), kept)
        assert np.array_equal(numbers, stored), name
        ends = name in ("token_embd.weight", "output.weight")
        assert its == ("Q8_0" if kind == "q4_0" and ends else kind.upper()), name
    assert {its for name, (its, _) in found.items() if "norm" in name or "gate_inp" in name} == {"F32"}
    assert done.architecture == "llama" and sum(done.tensors.values()) == len(found)
    assert done.size_bytes == (tmp_path / "x.gguf").stat().st_size
    assert value(tmp_path / "x.gguf", "llama.expert_used_count") == 2


@pytest.mark.parametrize("config", [DENSE], ids=["dense"])
def test_transformers_reads_the_same_model(config: LMConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lm = LM(config).eval()
    to_gguf(lm, tmp_path / "x.gguf", kind="f32", tokenizer=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    id_BS = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(id_BS).logits, lm(id_BS).logits_BSV, rtol=0, atol=1e-5)


def test_parts_that_add_nothing_are_written_as_zeros(tmp_path: Path) -> None:
    moe = MoEConfig(4, 2, 32, router_options={"renormalize": False})
    lm = LM(LMConfig(**SIZES, qkv_bias=True, moe=moe))  # a Qwen2-MoE, but for its shared expert
    to_gguf(lm, tmp_path / "x.gguf", kind="f32", tokenizer=False)
    found = tensors(tmp_path / "x.gguf")
    assert value(tmp_path / "x.gguf", "general.architecture") == "qwen2moe"
    assert not found["blk.0.ffn_up_shexp.weight"][1].any()
    assert np.array_equal(found["token_embd.weight"][1], lm.embedding.detach().numpy())


def test_rows_that_are_no_blocks_stay_whole_and_that_is_said(tmp_path: Path) -> None:
    lm = LM(LMConfig(**SIZES | {"hidden": 40}))
    done = to_gguf(lm, tmp_path / "x.gguf", kind="q8_0", tokenizer=False)
    assert tensors(tmp_path / "x.gguf")["blk.0.ffn_down.weight"][0] == "F32"
    assert "2 tensors" in done.notes[0] and "blk.0.ffn_down.weight" in done.notes[0]


REFUSED = {
    "window": (LMConfig(**SIZES, window=8), "layers see 8 tokens of 1024, there they see all"),
    "activation": (LMConfig(**SIZES, activation="geglu"), "the activation is geglu, there it is swiglu"),
    "mla": (None, "norm_eps is 1e-05 and that of latents 1e-06"),
    "layers": (
        LMConfig(**SIZES, qk_norm="head", moe=MoEConfig(4, 2, 32, router_options={"renormalize": True}, layers=(1,))),
        "some layers have no experts",
    ),
    "router": (LMConfig(**SIZES, moe=MoEConfig(4, 2, 32, router="Hash")), "moe.router"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_has_no_words_for_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, words = REFUSED[name]
    if config is None:
        mla = MLAConfig(kv_rank=14, rope_dim=6, nope_dim=8, v_dim=12, q_rank=10)
        moe = MoEConfig(4, 2, 32, router="GroupLimited", shared_hidden=32)
        config = LMConfig(**SIZES | {"kv_heads": None}, attention="mla", mla=mla, moe=moe)
    with pytest.raises(UsageError, match=words):
        to_gguf(LM(config), tmp_path / "x.gguf", tokenizer=False)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(DENSE)
    with pytest.raises(UnknownNameError, match="q8_0"):
        to_gguf(lm, tmp_path / "x.gguf", kind="q8", tokenizer=False)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(UsageError, match="no-tokenizer"):
        to_gguf(lm, tmp_path / "x.gguf")
    with torch.no_grad():
        lm.embedding[3, 5] = 1e5
    with pytest.raises(UsageError, match=r"numbers up to 100000.*bf16"):
        to_gguf(lm, tmp_path / "x.gguf", kind="f16", tokenizer=False)
    for kind, number in (("q8_0", 1e7), ("q4_0", 1e7), ("bf16", 3.4e38)):  # whose scale is beyond fp16, or itself
        with torch.no_grad():
            lm.embedding[3, 5] = number
        with pytest.raises(UsageError, match=f"be below .* in {'q8_0' if kind == 'q4_0' else kind} .*got numbers"):
            to_gguf(lm, tmp_path / "x.gguf", kind=kind, tokenizer=False)  # pyrefly: ignore[bad-argument-type]
    with torch.no_grad():
        lm.embedding[3, 5] = float("nan")
    with pytest.raises(UsageError, match=r"token_embd\.weight must be finite"):
        to_gguf(lm, tmp_path / "x.gguf", tokenizer=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'turnout\[gguf\]'"):
        to_gguf(lm, tmp_path / "x.gguf", tokenizer=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.gguf").write_text("mine")
    monkeypatch.undo()
    with pytest.raises(StorageError, match="be new"):
        to_gguf(lm, tmp_path / "x.gguf", tokenizer=False)
    assert (tmp_path / "x.gguf").read_text() == "mine"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.to_hf(LM(DENSE), tmp_path / "llama")
    train_tokenizer(["a cat, a cat " * 9 + "the dog, the dog"], vocab_size=262).save(
        str(tmp_path / "llama" / "tokenizer.json")
    )
    return tmp_path / "llama"


def test_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.gguf"
    assert main(["convert", str(folder), "--gguf", "q8_0", "--out", str(out), "--quiet"]) == 0
    assert "llama" in capsys.readouterr().out
    assert value(out, "tokenizer.ggml.pre") == "gpt-2"
    assert len(value(out, "tokenizer.ggml.tokens")) == 300
    assert value(out, "tokenizer.ggml.token_type")[0] == 3 and value(out, "tokenizer.ggml.token_type")[299] == 5
    assert value(out, "tokenizer.ggml.eos_token_id") == 0
    (folder / "tokenizer.json").unlink()
    other = tmp_path / "y.gguf"
    assert main(["convert", str(folder), "--gguf", "f32", "--out", str(other), "--quiet"]) == 2
    assert "--no-tokenizer" in capsys.readouterr().err
    assert main(["convert", str(folder), "--gguf", "f32", "--no-tokenizer", "--out", str(other), "--quiet"]) == 0
    steps = ["--to", "moe", "--experts", "2", "--top-k", "1"]
    assert main(["convert", str(folder), *steps, "--gguf", "f32", "--out", str(tmp_path / "z")]) == 2
    assert "convert first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body["model"].update(type="WordLevel"), "of the kind 'WordLevel'"),
        (lambda body: body.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda body: body.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda body: body["model"].update(dropout=0.1), "dropout"),
        (lambda body: body["added_tokens"][0].update(lstrip=True), "takes the spaces beside it"),
        (lambda body: body["added_tokens"].append({"id": 777, "content": "far", "special": True}), "778 tokens"),
    ],
)
def test_tokenizers_that_it_would_read_otherwise_are_refused(
    change: Any, words: str, folder: Path, tmp_path: Path
) -> None:
    body = json.loads((folder / "tokenizer.json").read_text())
    change(body)
    (folder / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(UsageError, match=words):
        to_gguf(checkpoint.from_hf(folder), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
