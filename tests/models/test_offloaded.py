"""Models whose experts are in files: the bits of those that hold all of them, and nothing silent where they cannot."""

import copy
import dataclasses
import functools
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_compiled_packed import packed
from variants import TINY, ids, make

from turnout import reshape
from turnout.decide.device.cache import LFU
from turnout.errors import CheckpointError, UsageError
from turnout.models import LM, MoEConfig, generate
from turnout.models.checkpoint import from_hf, load, load_offloaded, save, to_hf
from turnout.models.decoding import Decoder, decoding_path
from turnout.types import Access, CacheShape, Decision

ROUTED = ("moe", "moe in one layer", "loss-free", "gpt-oss", "biased experts", "groups", "gpt-2 with experts")
PACKED = ("eight bits", "eight bits in groups", "four bits", "levels", "levels in fp32", "experts alone", "gpt-oss")
FOLDERS = [("moe", "Mixtral"), ("gpt-oss", "GptOss"), ("loss-free", "")]


def each(lm: LM) -> int:
    """The bytes of one expert, biases in fp32."""
    bank = next(module.bank for module in lm.modules() if hasattr(module, "bank"))
    matrices = sum(one.nbytes for name, one in [*bank.named_parameters(), *bank.named_buffers()] if "bias" not in name
                   and "levels" not in name)  # fmt: skip
    biases = sum(one.numel() * 4 for name, one in bank.named_parameters() if "bias" in name)
    return (matrices + biases) // bank.num_experts


def agree(full: LM, few: LM) -> None:
    """Prompts of few and of many tokens, rows of several lengths, steps, and greedy text: the same to the bit."""
    with torch.no_grad():
        for batch, seq in ((1, 3), (2, 12), (3, 40)):
            assert torch.equal(full(ids(batch, seq)).logits_BSV, few(ids(batch, seq)).logits_BSV), (batch, seq)
    id_BS, length_B = ids(5, 12), torch.tensor([3, 12, 1, 7, 5])
    one, other = (Decoder(lm, 5, 16) for lm in (full, few))
    assert torch.equal(one.prefill(id_BS, length_B), other.prefill(id_BS, length_B))
    for id_B in ids(6, 5):
        assert torch.equal(one.step(id_B), other.step(id_B))
    texts = [generate(lm, [[3, 1, 4], [1]], tokens=8, temperature=0).rows for lm in (full, few)]
    assert texts[0] == texts[1]


@pytest.fixture(params=["compiled", "not compiled"])
def either(request, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    else:
        monkeypatch.setenv("TURNOUT_COMPILED", "0")


@functools.cache
def written(kind: str, name: str, where: Path) -> LM:
    lm = packed(name) if kind == "packed" else make(name)
    if kind == "folder":
        to_hf(lm, where)
        return from_hf(where)
    save(where, lm)
    return load(where)


def check(full: LM, where: Path) -> None:
    moe = full.config.moe
    assert moe is not None
    for slots in (moe.top_k, 2 * moe.top_k + 3):
        few = load_offloaded(where, expert_memory=slots * each(full))
        assert few.experts is not None and few.experts.stats().slots <= slots
        assert decoding_path(few) == decoding_path(full)
        agree(full, few)
        stats = few.experts.stats()
        assert stats.misses == sum(stats.layer_misses) > 0 and stats.fetched_bytes > 0
        few.experts.close()


@pytest.mark.parametrize("name", ROUTED)
def test_whole_experts_in_a_folder_of_ours(name: str, tmp_path: Path, either) -> None:
    check(written("ours", name, tmp_path / "model"), tmp_path / "model")


@pytest.mark.parametrize("name", PACKED)
def test_experts_in_few_bits(name: str, tmp_path: Path, either) -> None:
    check(written("packed", name, tmp_path / "model"), tmp_path / "model")


@pytest.mark.parametrize("name", ["moe", "gpt-oss", "moe in one layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_transformers(name: str, dtype: torch.dtype, tmp_path: Path, compiled) -> None:
    config = {} if name != "moe in one layer" else {"qk_norm": "head"}
    lm = make(name) if not config else LM(dataclasses.replace(TINY, moe=MoEConfig(5, 2, 24, layers=(1,)), **config))
    to_hf(lm.to(dtype), tmp_path / "model")
    check(from_hf(tmp_path / "model"), tmp_path / "model")


def test_a_folder_of_transformers_read_in_another_dtype(tmp_path: Path, compiled) -> None:
    to_hf(make("moe").bfloat16(), tmp_path / "model")
    full = from_hf(tmp_path / "model", dtype=torch.float32)
    few = load_offloaded(tmp_path / "model", dtype=torch.float32, expert_memory=3 * each(full))
    agree(full, few)


@pytest.mark.parametrize("name", ["eight bits", "four bits in groups, experts"])
def test_compressed_tensors(name: str, tmp_path: Path, compiled) -> None:
    config = dataclasses.replace(TINY, width=64, heads=4, hidden=96, moe=MoEConfig(5, 2, 64))
    how = {"bits": 8, "group": None} if name == "eight bits" else {"bits": 4, "group": 32, "scale": "float32"}
    to_hf(reshape.quantize(LM(config), parts=("experts",), **how)[0], tmp_path / "model")
    full = from_hf(tmp_path / "model", packed=True)
    few = load_offloaded(tmp_path / "model", expert_memory=3 * each(full))
    agree(full, few)
    with pytest.raises(CheckpointError, match="plain or held"):
        load_offloaded(tmp_path / "model", expert_memory=3 * each(full), packed=False)


def test_mxfp4(tmp_path: Path, compiled) -> None:
    from turnout.models.checkpoint import mxfp4  # its folders: see tests/models/checkpoint

    config = dataclasses.replace(make("gpt-oss").config, width=64, hidden=64, heads=4,
                                 moe=dataclasses.replace(make("gpt-oss").config.moe, hidden=64))  # fmt: skip
    full = _in_mxfp4(LM(config, seed=1), tmp_path / "model")
    assert full.config.quantized is not None and full.config.quantized.codes == mxfp4.METHOD
    few = load_offloaded(tmp_path / "model", expert_memory=3 * each(full))
    agree(full, few)


def _in_mxfp4(lm: LM, where: Path) -> LM:
    import json

    from safetensors.torch import load_file, save_file

    to_hf(lm.bfloat16(), where)
    tensors, generator = load_file(where / "model.safetensors"), torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, ins, outs = tensors.pop(name).shape
        shape = experts, outs, ins // 32
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    keys = json.loads((where / "config.json").read_text())
    keys["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (where / "config.json").write_text(json.dumps(keys))
    return from_hf(where, packed=True)


class Ahead:
    """Fetches the next expert of the next layer ahead, and the last used go last."""

    def init(self, sizes: CacheShape):
        return sizes, ()

    def update(self, state, access: Access):
        sizes, order = state
        wanted = [(access.layer, expert) for expert in access.experts]
        others = [one for one in order if one not in wanted]
        fetch = tuple(one for one in wanted if one not in order)
        told = ((access.layer + 1) % sizes.layers, (access.experts[0] + 1) % sizes.experts)
        ahead = (told,) if told not in order and told not in wanted and len(wanted) < sizes.capacity else ()
        room = sizes.capacity - len(wanted) - len(ahead)
        held = others[len(others) - room :] if room else []
        evict = tuple(one for one in others if one not in held)
        return (sizes, (*held, *ahead, *wanted)), Decision(evict, fetch, ahead)


def test_what_is_fetched_ahead_is_counted_and_changes_no_bit(tmp_path: Path, compiled) -> None:
    save(tmp_path, lm := make("moe"))
    for policy, shared in ((Ahead(), True), (LFU(), False)):
        few = load_offloaded(tmp_path, expert_memory=4 * each(lm), policy=policy, shared=shared, threads=2)
        agree(lm, few)
        stats = few.experts.stats()
        ahead = isinstance(policy, Ahead)
        assert (stats.prefetched > 10) == ahead and (0 < stats.prefetched_used < stats.prefetched) == ahead
        assert stats.to_json_dict()["hit_rate"] == stats.hit_rate > 0 and "experts fit" in str(stats)
        few.experts.close()


@pytest.mark.parametrize("name", ["moe"])
def test_hooks_and_plain_modules_go_the_same_way(name: str, tmp_path: Path, compiled) -> None:
    save(tmp_path, lm := make(name))
    few = load_offloaded(tmp_path, expert_memory=3 * each(lm))
    for model in (lm, few):
        model.blocks[0].register_forward_hook(lambda module, given, out: None)
    assert "hooks" in decoding_path(few)
    agree(lm, few)


def test_two_generations_at_once(tmp_path: Path, compiled) -> None:
    save(tmp_path, lm := make("moe"))
    few = load_offloaded(tmp_path, expert_memory=2 * each(lm))
    prompts = [[[3, 1, 4]], [[7, 2], [5]], [[1]], [[9, 9, 9, 9]]]
    want = [generate(lm, prompt, tokens=12, temperature=0).rows for prompt in prompts]
    got: dict[int, object] = {}

    def run(number: int) -> None:
        got[number] = generate(few, prompts[number], tokens=12, temperature=0).rows

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(len(prompts))] == want


@pytest.mark.parametrize("how", ["cut", "written over"])
@pytest.mark.parametrize("prompt", [3, 60])
def test_a_file_that_changes_is_an_error_by_name(how: str, prompt: int, tmp_path: Path, compiled) -> None:
    to_hf(lm := make("moe"), tmp_path / "model")
    few = load_offloaded(tmp_path / "model", expert_memory=2 * each(lm))
    first = generate(few, ids(1, 3), tokens=3, temperature=0).rows
    weights = tmp_path / "model" / "model.safetensors"
    body = weights.read_bytes()
    with weights.open("r+b") as file:
        if how == "cut":
            file.truncate(len(body) // 4)
        else:
            file.seek(len(body) // 2)
            file.write(b"\1" * 64)
            os.utime(weights, ns=(1, 1))
    seq = ids(1, min(prompt, 40))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        generate(few, seq, tokens=3, temperature=0)
    assert few.experts.stats().misses and first


def test_what_was_cut_before_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    to_hf(lm := make("moe"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_offloaded(tmp_path / "model", expert_memory=2 * each(lm))
    save(tmp_path / "ours", lm)
    body = bytearray((tmp_path / "ours" / "model.safetensors").read_bytes())
    body[-1] ^= 1
    (tmp_path / "ours" / "model.safetensors").write_bytes(body)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_offloaded(tmp_path / "ours", expert_memory=2 * each(lm))


class Wrong:
    """Says nothing of what is missing."""

    def init(self, sizes: CacheShape):
        return None

    def update(self, state, access: Access):
        return None, Decision(evict=((0, 0),) if access.step else ())


def test_a_policy_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    save(tmp_path, lm := make("moe"))
    few = load_offloaded(tmp_path, expert_memory=2 * each(lm), policy=Wrong())
    with pytest.raises(UsageError, match="Wrong"):
        generate(few, [[1]], tokens=2)


def test_what_such_a_model_is_not_for(tmp_path: Path) -> None:
    save(tmp_path / "a", lm := make("moe"))
    few = load_offloaded(tmp_path / "a", expert_memory=2 * each(lm))
    assert not any(parameter.requires_grad for parameter in few.parameters())
    for what in (lambda: save(tmp_path / "b", few), lambda: to_hf(few, tmp_path / "c"), few.half, few.state_dict,
                 lambda: few.to("meta"), lambda: reshape.quantize(few), lambda: copy.deepcopy(few)):  # fmt: skip
        with pytest.raises(UsageError, match=r"in files|few experts in memory"):
            what()
    few.blocks[0].attention.qkv.weight.requires_grad_(True)
    with pytest.raises(UsageError, match="gradients"):
        few(ids(1, 3))
    few.experts.close()
    few.requires_grad_(False)
    with pytest.raises(UsageError, match="closed"):
        few(ids(1, 3))
    with pytest.raises(UsageError, match="experts of their own"):
        save(tmp_path / "dense", make("dense"))
        load_offloaded(tmp_path / "dense", expert_memory="1GB")


def test_too_little_memory_is_said_with_what_is_needed(tmp_path: Path) -> None:
    save(tmp_path, lm := make("moe"))
    with pytest.raises(UsageError, match=f"{2 * each(lm):,} bytes") as caught:
        load_offloaded(tmp_path, expert_memory=2 * each(lm) - 1)
    assert "top" not in str(caught.value) and "2 experts" in str(caught.value)
    with pytest.raises(UsageError, match="'2GB'"):
        load_offloaded(tmp_path, expert_memory="two")


def test_closing_and_forgetting_give_threads_and_files_back(tmp_path: Path) -> None:
    save(tmp_path, lm := make("moe"))
    gc.collect()  # what other tests have left
    before = threading.active_count()
    few = load_offloaded(tmp_path, expert_memory=2 * each(lm), threads=2)
    other = load_offloaded(tmp_path, expert_memory=2 * each(lm), threads=1)
    generate(few, [[1]], tokens=2)
    assert threading.active_count() == before + 3
    few.experts.close()
    few.experts.close()
    assert threading.active_count() == before + 1 and not few.experts.stacks[0].numel()
    del other
    gc.collect()
    assert threading.active_count() == before


_MEASURE = """
import sys, threading, torch
from turnout.models.checkpoint import load_offloaded
from turnout.models import generate
def own():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], own())
thread = threading.Thread(target=watch); thread.start()
for folder, size in zip(sys.argv[1:3], sys.argv[3:]):  # the first has the libraries take what they take
    before, peak[0] = own(), 0
    lm = load_offloaded(folder, expert_memory=int(size))
    generate(lm, [[1, 2, 3] * 30], tokens=8, temperature=0)
done.set(); thread.join()
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory of one's own is read in /proc")
@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_the_experts_are_never_all_in_memory(kind: str, tmp_path: Path) -> None:
    sizes = []
    for name, hidden in (("small", 16), ("large", 512)):
        config = dataclasses.replace(TINY, width=256, heads=4, moe=MoEConfig(64, 2, hidden), layers=2, max_seq=128)
        save(tmp_path / name, lm := LM(config)) if kind == "ours" else to_hf(lm := LM(config), tmp_path / name)
        sizes.append(8 * each(lm))
    experts, slots = 16 * sizes[1], sizes[1]
    environment = os.environ | {"TURNOUT_COMPILED": "0"}
    folders = [str(tmp_path / name) for name in ("small", "large")]
    run = [sys.executable, "-c", _MEASURE, *folders, *map(str, sizes)]
    peak = int(subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout)
    # Beside slots: what is no expert, one expert that is turned on its way, and a prompt.
    assert experts > 200e6 and peak < slots + 24e6, (peak, slots, experts)
