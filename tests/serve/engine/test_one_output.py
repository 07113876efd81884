"""Exactly one output of a victim over 40 batches of random others: every architecture, numbers of every kind.

Others come before and after it, some with the victim's own beginning; whether its prompt was read before, by whom, and
whether it had to give its memory up for a while, is left to chance. Its tokens and the bits of their log-probabilities
are one and the same each time, and those of ``generate``.
"""

import dataclasses
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import turnout
from turnout.models import LM, checkpoint
from turnout.models.checkpoint.offloaded import load_offloaded
from turnout.models.checkpoint.peft import PeftAdapter
from turnout.models.decoding import paged
from turnout.models.decoding.pages import Pages
from turnout.models.with_lora import with_lora
from turnout.reshape import quantize
from turnout.serve.engine import Engine, EngineStats, Request, paged_lane

BATCHES, TOKENS, VOCAB, WAIT_S = 40, 6, 67, 300
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "kv_lora_rank": 14, "q_lora_rank": 10, "qk_rope_head_dim": 6, "v_head_dim": 12,
    "qk_nope_head_dim": 8,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 8, "sliding_window": 5},
    "mixtral": {"num_local_experts": 5},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "head_dim": 8},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 12},
    "deepseek_v2": DEEPSEEK | {"topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK | {"n_group": 4, "topk_group": 2},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 12, "head_dim": 10,
                "sliding_window": 6},
    "glm4_moe": {"moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 2,
                 "first_k_dense_replace": 1},
    "granitemoe": {"num_local_experts": 5, "num_experts_per_tok": 2},
}  # fmt: skip
NUMBERS = ("fp32", "bf16", "int8", "int4")
# Each architecture in one of the short kinds: all in each would take ten minutes, and the kinds share their code.
SHORT = [(name, NUMBERS[1 + number % 3]) for number, name in enumerate(ARCHITECTURES)]
FEW = [("mixtral", "fp32"), ("qwen3_moe", "int8")]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of eighty tokens has several parts, and an end that is read by steps."""
    monkeypatch.setattr(paged, "CHUNK", 64)
    monkeypatch.setattr(paged, "_FEW", 20)
    monkeypatch.setattr(paged, "_FEW_SHORT", 20)


def made(name: str, numbers: str = "fp32") -> LM:
    """A tiny random model of an architecture of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("transformers")
        config = library.AutoConfig.for_model(name, **(SIZES | ARCHITECTURES[name]))
        torch.manual_seed(len(name))
        lm = checkpoint.from_live(library.AutoModelForCausalLM.from_config(config).eval())
    if numbers == "bf16":
        lm = lm.to(torch.bfloat16)
    elif numbers != "fp32":
        parts = ("experts", "shared", "attention") if lm.config.moe is not None else ("dense", "attention")
        ids_BS = torch.randint(VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
        lm = quantize(lm, bits=int(numbers[3:]), group=None, parts=parts, batches=[ids_BS])[0]
    return lm.eval()


def one_output(
    lm: LM, *, batches: int = BATCHES, names: tuple[str | None, ...] = (None,), **engine: Any
) -> EngineStats:
    """Asserts it; what the engine did."""
    chance = random.Random(len(names))
    draw = chance.choices
    victim = Request(tuple(draw(range(3, VOCAB), k=80)), TOKENS, logprobs=2, tenant="victim")
    seen = set()
    with Engine(lm, slots=5, **engine) as served:
        for _ in range(batches):
            others = []
            for _ in range(chance.randint(0, 5)):
                begins = victim.prompt[: chance.choice([0, 64, 70])]
                prompt = (*begins, *draw(range(3, VOCAB), k=chance.randint(1, 70)))
                who, how = chance.choice(["victim", "other"]), chance.randint(1, 12)
                others.append(Request(prompt, how, tenant=who, adapter=chance.choice(names)))
            others.insert(chance.randint(0, len(others)), victim)
            asked = dataclasses.replace(victim, tenant=chance.choice(["victim", f"new {chance.random()}"]))
            tickets = [served.submit(asked if one is victim else one) for one in others]
            tokens, end = tickets[others.index(victim)].result(WAIT_S)
            assert end.reason == "length", end
            seen.add(tuple((token.id, token.logprob, token.top) for token in tokens))
        assert served.drain(WAIT_S)
        stats = served.stats()
    assert len(seen) == 1
    found = turnout.generate(lm, [list(victim.prompt)], tokens=TOKENS, temperature=0, eos=None, logprobs=True)
    (only,) = seen
    assert [one[0] for one in only] == found.rows[0] and [one[1] for one in only] == found.logprob_BN[0].tolist()
    return stats


def little(lm: LM) -> int:
    """Memory for two texts and a half."""
    need_G = paged_lane._most(Pages.windows_of(lm), 192)
    return sum(5 * need * size // 2 for need, size in zip(need_G, Pages.page_bytes(lm), strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("name", "numbers"), [*((name, "fp32") for name in ARCHITECTURES), *SHORT])
def test_of_every_architecture(name: str, numbers: str) -> None:
    lm = made(name, numbers)
    stats = one_output(lm, cache_bytes=little(lm))
    assert stats.tokens_cached > 0, "no prompt was found that had been read before"
    assert stats.preempted > 0 or name == "mistral", "nobody gave memory up"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("name", "numbers"), FEW)
def test_of_a_few(name: str, numbers: str) -> None:
    lm = made(name, numbers)
    one_output(lm, batches=8, cache_bytes=little(lm))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "numbers"), SHORT)
def test_without_kernels(name: str, numbers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_COMPILED", "0")
    one_output(made(name, numbers))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("numbers", ["fp32", "bf16"])
def test_beside_adapters(numbers: str) -> None:
    """Some of the others are of an adapter over the same weights."""
    lm, chance = made("mixtral", numbers), torch.Generator().manual_seed(4)
    factors = tuple(torch.randn(size, generator=chance) for size in ((3, 32), (32, 3)))
    adapter = PeftAdapter("a", None, {"model.layers.0.self_attn.q_proj": (*factors, 0.5)})
    one_output(lm, names=(None, "a", "a"), adapters={"a": with_lora(lm, adapter)})


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_of_experts_in_files(name: str, tmp_path: Path) -> None:
    """Which experts others brought into the slots, and pushed out, changes no bit."""
    lm = made(name)
    checkpoint.save(tmp_path, lm)
    few = load_offloaded(tmp_path, expert_memory="40kB")
    try:
        counts = one_output(few, cache_bytes=little(lm)).counts
    finally:
        few.experts.close()
    assert counts["expert_misses"] > 0 and counts["expert_hits"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_on_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lm = made("qwen3_moe", "bf16")
        one_output(lm, cache_bytes=little(lm), batches=12)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled")
def test_it_sees_a_neighbour_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would say if a step's scores depended on how many rows it has."""
    right = paged.PagedSteps.step

    def spoilt(self: Any, texts: Any, id_RN: Any) -> torch.Tensor:
        return right(self, texts, id_RN).add_(1e-3 * len(texts) * torch.arange(VOCAB) / VOCAB)

    monkeypatch.setattr(paged.PagedSteps, "step", spoilt)
    with pytest.raises(AssertionError):
        one_output(made("mixtral"), batches=8)
