"""Every policy of a cache of experts in the running executor: the same bits, and never fewer loads than Belady's."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_compiled_packed import packed
from test_offloaded import _in_mxfp4, each
from variants import TINY, make

from turnout.decide.device.cache import Learnt, named_policy
from turnout.decide.device.cache.named import NAMES
from turnout.errors import CheckpointError, ShapeError
from turnout.models import LM, MoEConfig, generate
from turnout.models.checkpoint import from_hf, load, load_offloaded, save, to_hf
from turnout.models.checkpoint.peft import PeftAdapter
from turnout.models.decoding import Decoder
from turnout.models.with_lora import with_lora
from turnout.serve.engine import Engine, Request
from turnout.solve import belady
from turnout.types import Accesses, CacheShape

LAYERS, EXPERTS, TOPICS = 4, 16, 4
LIVE = NAMES[:-1]  # the last asks for a router that runs ahead


@dataclasses.dataclass(eq=False)
class Heard:
    """A policy, and all that it was asked and said."""

    policy: object

    def __post_init__(self) -> None:
        self.accesses, self.decisions = [], []

    def init(self, sizes):
        return self.policy.init(sizes)

    def update(self, state, access):
        state, decision = self.policy.update(state, access)
        self.accesses.append(access)
        self.decisions.append(decision)
        return state, decision

    @property
    def loads(self) -> int:
        return sum(len(one.fetch) + len(one.prefetch) for one in self.decisions)

    def least(self, shape: CacheShape) -> int:
        """What Belady's rule would have loaded."""
        pools = [range(shape.layers)] if shape.shared else [[layer] for layer in range(shape.layers)]
        return sum(
            belady([[(one.layer, e) for e in one.experts] for one in self.accesses if one.layer in pool],
                   capacity=shape.slots).count for pool in pools
        )  # fmt: skip


def planted(seed: int = 0) -> LM:
    """Tokens of four topics, which keep to their topic's experts."""
    config = dataclasses.replace(TINY, vocab_size=64, layers=LAYERS, moe=MoEConfig(EXPERTS, 2, 24), init_std=0.2,
                                 max_seq=128)  # fmt: skip
    lm, generator = LM(config, seed=seed).eval(), torch.Generator().manual_seed(seed + 1)
    center_GD = torch.randn(TOPICS, config.width, generator=generator)
    with torch.no_grad():
        own_VD = torch.randn(64, config.width, generator=generator)
        lm.embedding.copy_(0.8 * center_GD[torch.arange(64) % TOPICS] + 0.5 * own_VD)
    return lm


def text(seed: int, tokens: int = 100) -> list[int]:
    """Tokens of one topic."""
    rng = np.random.default_rng(seed)
    return (rng.integers(64 // TOPICS, size=tokens) * TOPICS + rng.integers(TOPICS)).tolist()


@pytest.fixture(scope="module")
def learnt() -> Learnt:
    lm, used, texts = planted(), [], range(100, 112)
    with torch.no_grad():
        for seed in texts:
            routings = lm(torch.tensor([text(seed)])).routings
            used.append(np.stack([routing.dense().numpy() > 0 for routing in routings], 1))
    tokens = np.concatenate([np.array(text(seed)) for seed in texts])
    return Learnt.of(Accesses.of_used(np.concatenate(used), np.repeat(np.arange(12), 100), tokens), seed=0, steps=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("planted") / "model"
    to_hf(planted(), where)
    return where


def read(lm: LM, ids: list[int]) -> torch.Tensor:
    """The scores of a text that is read token by token."""
    decoder = Decoder(lm, 1, len(ids))
    found = [decoder.prefill(torch.tensor([ids[:4]])).clone()]
    return torch.stack([*found, *(decoder.step(torch.tensor([one])).clone() for one in ids[4:])])


@pytest.mark.usefixtures("compiled")
def test_every_policy_runs_live_to_the_bit_and_predictive_ones_wait_for_fewer_than_lru(folder, learnt) -> None:
    full, texts = from_hf(folder), [text(seed) for seed in (1, 2, 3)]
    want, loads, misses = [read(full, ids) for ids in texts], {}, {}
    for shared in (False, True):
        for name in LIVE:
            heard: list[Heard] = []

            def made(shape: CacheShape, name: str = name, heard: list[Heard] = heard) -> Heard:
                heard.append(Heard(named_policy(name, shape, learnt)))
                return heard[-1]

            few = load_offloaded(folder, expert_memory=5 * LAYERS * each(full), policy=made, shared=shared)
            got = [read(few, ids) for ids in texts]
            assert all(map(torch.equal, got, want)), name
            shape, stats = few.experts.shape, few.experts.stats()
            assert heard[0].loads >= heard[0].least(shape), name
            assert stats.misses == sum(len(one.fetch) for one in heard[0].decisions)
            loads[name, shared], misses[name, shared] = heard[0].loads, stats.misses
            # A text is one from its prompt to its end, and each has a number of its own.
            assert len({access.sequence for access in heard[0].accesses}) == 3 and heard[0].accesses[0].sequence
            few.experts.close()
        for name in ("trace_matching", "expert_flow"):
            assert misses[name, shared] < misses["lru", shared], (misses, loads)


@pytest.mark.usefixtures("compiled")
def test_texts_side_by_side_have_no_number_and_one_alone_has_its_own(folder) -> None:
    heard: list[Heard] = []

    def made(shape: CacheShape) -> Heard:
        heard.append(Heard(named_policy("lru", shape)))
        return heard[-1]

    few = load_offloaded(folder, expert_memory=8 * LAYERS * 3 * 32 * 24 * 4, policy=made)
    generate(few, [text(1, 9), text(2, 9)], tokens=3, temperature=0)
    assert {access.sequence for access in heard[0].accesses} == {0}
    heard[0].accesses.clear()
    generate(few, [text(1, 90)], tokens=3, temperature=0)  # read by the model's modules, then by steps
    assert len({access.sequence for access in heard[0].accesses} - {0}) == 1
    assert 0 not in {access.sequence for access in heard[0].accesses}
    few.experts.close()


def test_a_router_that_runs_ahead_tells_what_comes(tmp_path: Path) -> None:
    moe = MoEConfig(8, 2, 24, router="PreGate", router_options={"width": 8, "layers": 1, "heads": 2})
    config = dataclasses.replace(TINY, layers=3, moe=moe, init_std=0.3)
    save(tmp_path, lm := LM(config, seed=1).eval())
    heard, want = [], generate(lm, [[3, 1, 4]], tokens=12, temperature=0).rows
    loads = {}
    for name in ("lru", "pre_gated"):

        def made(shape: CacheShape, name: str = name) -> Heard:
            heard.append(Heard(named_policy(name, shape)))
            return heard[-1]

        few = load_offloaded(tmp_path, expert_memory=9 * each(lm), shared=True, policy=made)
        assert generate(few, [[3, 1, 4]], tokens=12, temperature=0).rows == want
        loads[name] = heard[-1].loads
        assert heard[-1].loads >= heard[-1].least(few.experts.shape)
        told = heard[-1].accesses
        by_step: dict[int, list] = {}
        for access in told:
            by_step.setdefault(access.step, []).append(access)
        assert any(access.coming for access in told)
        for accesses in by_step.values():
            first = accesses[0]
            assert {layer for layer, _ in first.coming} >= {access.layer for access in accesses} - {first.layer}
            assert all(dict(first.coming)[later.layer] == later.experts for later in accesses[1:] if later.layer)
        few.experts.close()
    assert loads["pre_gated"] <= loads["lru"]


def test_what_was_learnt_is_the_same_from_its_file_and_an_altered_one_is_refused(learnt, tmp_path: Path) -> None:
    path = tmp_path / "profile"
    learnt.save(path)
    again, sizes = Learnt.open(path), CacheShape(LAYERS, EXPERTS, 5)
    used_SLE = np.random.default_rng(0).random((30, LAYERS, EXPERTS)) < 0.15
    for name in ("static", "trace_matching", "expert_flow"):
        one, other = (named_policy(name, sizes, what) for what in (learnt, again))
        states = [one.init(sizes), other.init(sizes)]
        for given in Accesses.of_used(used_SLE, np.arange(30) // 9):
            access = dataclasses.replace(given, experts=given.experts[:5])
            (states[0], mine), (states[1], theirs) = one.update(states[0], access), other.update(states[1], access)
            assert mine == theirs
    with pytest.raises(ShapeError, match="record a trace of this model"):
        named_policy("static", CacheShape(LAYERS, EXPERTS + 1, 5), again)
    with pytest.raises(CheckpointError, match="turnout cache TRACE --save"):
        Learnt.open(tmp_path / "nothing")
    body = bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)
    with pytest.raises(CheckpointError, match="sha256"):
        Learnt.open(path)


def _folder(kind: str, where: Path) -> LM:
    if kind == "mxfp4":
        config = dataclasses.replace(make("gpt-oss").config, width=64, hidden=64, heads=4,
                                     moe=dataclasses.replace(make("gpt-oss").config.moe, hidden=64))  # fmt: skip
        return _in_mxfp4(LM(config, seed=1), where)
    lm = LM(dataclasses.replace(TINY, moe=MoEConfig(5, 2, 24), qk_norm="head", init_std=0.2), seed=1).eval()
    if kind == "int4":
        save(where, packed("four bits"))
        return load(where)
    to_hf(lm.bfloat16(), where)
    return from_hf(where)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["int4", "bf16", "mxfp4"])
def test_the_engine_with_an_adapter_says_the_same_under_any_budget(kind: str, tmp_path: Path) -> None:
    """A token's experts of one layer, half of all, all: tokens and their log-probabilities to the bit."""
    full = _folder(kind, tmp_path / "model")
    moe, generator = full.config.moe, torch.Generator().manual_seed(2)
    every = moe.num_experts * full.config.layers
    width, heads = full.config.width, full.config.heads * full.blocks[0].attention.head_width
    factor = torch.randn(2, heads, generator=generator) * 0.3, torch.randn(width, 2, generator=generator) * 0.3, 1.0
    lora = PeftAdapter("a", None, {"model.layers.0.self_attn.o_proj": factor})
    requests = [Request(tuple(range(1, 1 + n)), tokens=6, logprobs=2, adapter=name)
                for n in (3, 17, 30) for name in (None, "a")]  # fmt: skip

    def answers(lm: LM) -> list[list[tuple[int, object]]]:
        adapters = {} if kind != "bf16" else {"a": with_lora(lm, lora)}
        with Engine(lm, slots=4, adapters=adapters) as engine:
            tickets = [engine.submit(one) for one in requests if one.adapter is None or adapters]
            found = [ticket.result(120) for ticket in tickets]
        assert all(end.reason == "length" for _, end in found), found
        return [[(token.id, token.logprob) for token in tokens] for tokens, _ in found]

    want = answers(full)
    for count, policy in ((moe.top_k, "lru"), (every // 2, "least_stale"), (every, "lfru")):
        few = load_offloaded(tmp_path / "model", expert_memory=count * each(full),
                             policy=lambda shape, name=policy: named_policy(name, shape))  # fmt: skip
        assert answers(few) == want, (count, policy)
        few.experts.close()


@pytest.mark.parametrize("count_L", [(3, 8, 5), (8, 3, 5)])
@pytest.mark.parametrize("memory", [9, 4])  # slots of each layer, and one pool
def test_layers_with_other_numbers_of_experts(count_L: tuple[int, ...], memory: int, tmp_path: Path, compiled) -> None:
    moe = MoEConfig(num_experts=8, top_k=2, hidden=16, per_layer=count_L)
    full = LM(dataclasses.replace(TINY, layers=3, moe=moe, init_std=0.3), seed=0).eval()
    save(tmp_path / "pyramid", full)
    few = load_offloaded(tmp_path / "pyramid", expert_memory=memory * each(full), threads=0)
    assert few.experts is not None
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8]]
    want = generate(full, prompts, tokens=16, temperature=0).rows
    assert generate(few, prompts, tokens=16, temperature=0).rows == want
    assert few.experts.stats().experts == 16 and few.experts.stats().misses > memory
    few.experts.close()
