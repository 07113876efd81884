"""llama.cpp itself judges what is written for it: its logits and its tokens against transformers' and tokenizers'."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks import llama_cpp
from turnout.models import LM, LMConfig, checkpoint
from turnout.models.gguf import to_gguf, tokens
from turnout.models.gguf.architectures import ARCHITECTURES

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))

import test_huggingface as stock

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(llama_cpp.why_not() is not None, reason=str(llama_cpp.why_not()))

GEMMA = {"head_dim": 12, "rms_norm_eps": 0.03, "query_pre_attn_scalar": 12, "sliding_window": 6}
MOE = {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK = stock.DEEPSEEK | {"rms_norm_eps": 1e-6, "n_group": 1, "topk_group": 1}
LATENT_YARN = stock.YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
GLM = stock.GLM | {"head_dim": 12, "n_group": 1, "topk_group": 1}
# Name -> model type in transformers, keys; beside those of test_huggingface that llama.cpp has words for.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama yarn": ("llama", {"rope_parameters": stock.YARN}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": stock.YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7, "rope_parameters": stock.GEMMA3_ROPE}),
    "qwen2_moe": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 20, "norm_topk_prob": False}),
    "qwen3_moe": ("qwen3_moe", MOE | {"norm_topk_prob": True, "head_dim": 12}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4, "num_experts": 6, "num_experts_per_tok": 2}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK | {"n_shared_experts": 2}),
    "deepseek_v3 grouped": ("deepseek_v3", DEEPSEEK | {"n_group": 4, "topk_group": 2}),
    "deepseek_v3 halves": ("deepseek_v3", DEEPSEEK | {"rope_interleave": False}),
    "deepseek_v3 yarn": ("deepseek_v3", DEEPSEEK | {"rope_parameters": LATENT_YARN}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK | {"topk_method": "greedy", "routed_scaling_factor": 3.0}),
    "deepseek_v2 lite": (
        "deepseek_v2", DEEPSEEK | {"topk_method": "greedy", "q_lora_rank": None, "num_hidden_layers": 27}
    ),
    "glm4_moe": ("glm4_moe", GLM | {"use_qk_norm": True}),
    "glm4_moe biased": ("glm4_moe", GLM | {"attention_bias": True, "n_group": 2}),
}  # fmt: skip
AS_THERE = (
    "llama", "llama biased", "llama tied, llama3 rope", "llama linear rope", "mistral", "qwen2", "qwen3", "gemma",
    "gpt2", "mixtral", "gpt_oss", "granite", "granite biased", "granitemoe", "smollm3", "phi3", "phi3 long", "olmo2",
)  # fmt: skip
# Those whose GELU llama.cpp looks up in a table of fp16.
LOOKED_UP = ("gemma", "gemma2", "gemma3_text", "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *AS_THERE])
def test_its_logits_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in CASES:
        monkeypatch.setitem(stock.CASES, name, CASES[name])
    hf = stock.theirs(name)
    hf.save_pretrained(tmp_path / "hf")
    lm = checkpoint.from_hf(tmp_path / "hf")
    to_gguf(lm, tmp_path / "model.gguf", kind="f32", tokenizer=False)
    id_BS = stock.batch(lm.config.vocab_size, 0)
    with torch.no_grad():
        want = hf(id_BS).logits.numpy()
    got = np.stack(llama_cpp.logits(tmp_path / "model.gguf", id_BS.tolist()))
    assert want.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 if stock.CASES[name][0] in LOOKED_UP else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt_oss", "llama", "olmo2", "olmoe", "qwen2_moe"])
def test_a_tied_output_layer_is_written_where_llama_cpp_asks_for_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = (CASES | {name: stock.CASES[name] for name in AS_THERE})[kind][1]
    monkeypatch.setitem(stock.CASES, "tied", (kind, keys | {"tie_word_embeddings": True}))
    hf = stock.theirs("tied")
    to_gguf(checkpoint.from_live(hf), tmp_path / "model.gguf", kind="f32", tokenizer=False)
    id_BS = stock.batch(hf.config.vocab_size, 0)
    with torch.no_grad():
        want = hf(id_BS).logits.numpy()
    got = np.stack(llama_cpp.logits(tmp_path / "model.gguf", id_BS.tolist()))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_every_architecture_is_compared() -> None:
    kinds = {(CASES | {name: stock.CASES[name] for name in AS_THERE})[name][0] for name in [*CASES, *AS_THERE]}
    assert kinds == set(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_its_logits_in_few_bits_are_those_of_the_rounded_model(kind: Any, tmp_path: Path) -> None:
    """It rounds what it multiplies with too, to as many bits; so they differ by that."""
    gguf = pytest.importorskip("gguf")
    lm = LM(LMConfig(vocab_size=64, width=64, layers=2, heads=2, hidden=96, init_std=0.1)).eval()
    to_gguf(lm, tmp_path / "model.gguf", kind=kind, tokenizer=False)
    id_BS = stock.batch(64, 1)
    got = np.stack(llama_cpp.logits(tmp_path / "model.gguf", id_BS.tolist()))
    with torch.no_grad():
        before = lm(id_BS).logits_BSV.numpy()
        for name, tensor in lm.named_parameters():
            if tensor.ndim == 2:
                ends = kind == "q4_0" and name in ("embedding", "head.weight")
                kept = gguf.GGMLQuantizationType["Q8_0" if ends else kind.upper()]
                rounded = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kept), kept)
                tensor.copy_(torch.from_numpy(rounded))
        want = lm(id_BS).logits_BSV.numpy()
    off, moved = ((got - one).std() / want.std() for one in (want, before))
    assert off < {"f16": 1e-3, "bf16": 8e-3, "q8_0": 2e-2, "q4_0": 2e-2}[kind], (off, moved)
    assert moved > 1e-5, (off, moved)


TEXTS = [path.read_text() for path in sorted(Path(__file__).parents[3].glob("*.md"))[:2]] + [
    "déjà vu 例えば 日本語 テスト 123456 7890 \r\n\r\n  x  ééé ÄÖÜ don't I'LL we've 'S 🙂🙂 \t\tz  //// ???!!! McDonald"
] * 3
PROBES = [
    "Hello  there,\n\tit's 42 <s> – déjà vu 例え 🙂 \r\n  x\u00a0y ", "", " ", "   a", "a   ", "e\u0301 ǅ x",
    "\n\n x\r\n\r\n y",
    "don't I'LL we've 'S 1234567 a1b2", "def f(x):\n    return x**2  # ok??!!  //\n", "日本語テスト123 ABCdef XYZ",
    "<|endoftext|>hello<|endoftext|>", "٣٤٥ ½ Ⅻ x²",
]  # fmt: skip


def _byte_level(name: str, cuts: tuple[str, ...], whole_words: bool) -> Tokenizer:
    steps = {
        "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "digits": lambda: pre_tokenizers.Digits(individual_digits=True),
        "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    }
    made = [steps[cut]() if cut in steps else pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _spaced(name: str) -> Tokenizer:
    """Of SentencePiece's kind, with the merges in the order in which it is converted."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, limit_alphabet=80)
    learner.train_from_iterator((line for text in TEXTS for line in text.splitlines()), trainer)
    vocabulary, merges = json.loads(learner.to_str())["model"]["vocab"], []
    for piece in sorted(vocabulary, key=lambda piece: vocabulary[piece])[len(special) :]:
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if name == "prepended" else replace
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("name", [*tokens.CUTS.values(), "prepended", "replaced"])
def test_its_tokens_are_those_of_the_tokenizer(name: str, tmp_path: Path) -> None:
    cuts = next((key for key, value in tokens.CUTS.items() if value == name), None)
    tokenizer = _spaced(name) if cuts is None else _byte_level(name, *cuts)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lm = LM(LMConfig(vocab_size=tokenizer.get_vocab_size() + 5, width=32, layers=1, heads=2))
    to_gguf(lm, tmp_path / "model.gguf", like=tmp_path)
    got = llama_cpp.tokenized(tmp_path / "model.gguf", PROBES)
    assert got == [tokenizer.encode(text).ids for text in PROBES]
