"""Converting folders, with transformers' own models as the judges."""

import json
import shutil
from pathlib import Path

import hf_folders as folders
import pytest
import torch

from turnout.errors import CheckpointError, DataError, StorageError, UnknownNameError, UsageError
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.recipes import room
from turnout.recipes.convert import convert, repeat
from turnout.recipes.plan import make_plan
from turnout.recipes.steps import Densify, Drop, Merge, Split, Upcycle
from turnout.reshape import upcycle
from turnout.types import Report


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return folders.make(tmp_path_factory.mktemp("hf") / "llama", "llama")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return folders.make(tmp_path_factory.mktemp("hf") / "mixtral", "mixtral", num_local_experts=8)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 12, "head_dim": 12}
    return folders.make(tmp_path_factory.mktemp("hf") / "gpt_oss", "gpt_oss", **sizes, sliding_window=6)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Path:
    """DeepSeek-V2 with groups of experts."""
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    groups = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "routed_scaling_factor": 4.0}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
    folder = tmp_path_factory.mktemp("hf") / "deepseek"
    return folders.make(folder, "deepseek_v2", **sizes, **groups, **experts, num_key_value_heads=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(folders.TEXT)
    (folder / "binary.bin").write_bytes(b"\0\1\2")
    return folder


def record(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())["conversion"]


def only(out: Path) -> None:
    """Nothing but the result is left beside it."""
    assert not out.with_name(out.name + ".part").exists()


@pytest.mark.parametrize(("experts", "top_k", "shards"), [(8, 2, 1), (8, 4, 2), (6, 6, 3)])
def test_llama_becomes_a_mixtral_that_computes_the_same(llama, tmp_path, experts, top_k, shards):
    out = tmp_path / "out"
    done = convert(llama, [Upcycle(experts, top_k, shards)], out)
    assert done.plan.architecture == "MixtralForCausalLM"
    before, after = folders.logits(llama), folders.logits(out)
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert done.certificate.verdict == "within bound"
    only(out)


def test_the_small_files_go_along(llama, tmp_path):
    out = tmp_path / "out"
    convert(llama, [Upcycle(4, 2)], out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (llama / name).read_bytes()
    tokenizer = folders.transformers().AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("line 3: 0 3 6")["input_ids"]) == "line 3: 0 3 6"


@pytest.mark.parametrize("by", ["reap", "frequency", "random"])
def test_experts_of_a_mixtral_are_dropped(mixtral, text, tmp_path, by):
    out = tmp_path / "out"
    done = convert(mixtral, [Drop(share=0.25, by=by)], out, text=text)
    keys = json.loads((out / "config.json").read_text())
    assert (keys["model_type"], keys["num_local_experts"]) == ("mixtral", 6)
    kept = done.reports[0]["kept"]["0"]
    theirs = folders.transformers().AutoModelForCausalLM.from_pretrained(mixtral).state_dict()
    mine = folders.transformers().AutoModelForCausalLM.from_pretrained(out).state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(mine[name], theirs[name][kept])
    assert folders.logits(out).isfinite().all()
    gap = (folders.logits(out) - folders.logits(mixtral)).abs().max()
    assert gap > 1e-4 and done.certificate.verdict == "different"
    assert record(out)["calibration"]["skipped"] == 1 and record(out)["calibration"]["tokens"] > 1000


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek"])
def test_experts_with_biases_and_experts_in_groups_are_dropped(kind, gpt_oss, deepseek, text, tmp_path):
    path, out = {"gpt_oss": gpt_oss, "deepseek": deepseek}[kind], tmp_path / "out"
    done = convert(path, [Drop(share=0.25)], out, text=text)
    assert done.plan.architecture == json.loads((path / "config.json").read_text())["architectures"][0]
    layer, kept = list(done.reports[0]["kept"].items())[-1]
    assert len(kept) == 6
    theirs = folders.transformers().AutoModelForCausalLM.from_pretrained(path).state_dict()
    mine = folders.transformers().AutoModelForCausalLM.from_pretrained(out).state_dict()
    cut = [name for name in theirs if f"layers.{layer}.mlp.experts." in name or f"layers.{layer}.mlp.router." in name]
    assert len(cut) == (6 if kind == "gpt_oss" else 2)
    assert all(torch.equal(mine[name], theirs[name][kept]) for name in cut)
    assert folders.logits(out).isfinite().all() and done.certificate.verdict == "different"
    merged = convert(path, [Merge(keep=4)], tmp_path / "merged", as_format="model", text=text)
    assert merged.reports[0]["distinct"] and checkpoint.load(tmp_path / "merged").config.moe.num_experts == 8


def test_a_chain_is_taken_in_its_order_and_recorded(llama, text, tmp_path):
    out = tmp_path / "out"
    heard = []
    done = convert(llama, [Upcycle(8, 2), Drop(count=2), Drop(share=0.5)], out, text=text, say=heard.append)
    assert done.plan.rows[-1].config.moe.num_experts == 3
    body = record(out)
    assert [step["step"] for step in body["steps"]] == ["upcycle", "drop_experts", "drop_experts"]
    reports = [Report.from_json(json.dumps(step["report"])) for step in body["steps"]]
    assert [report.title for report in reports] == ["upcycle", "drop_experts", "drop_experts"]
    assert reports[1]["num_experts"] == [8, 6] and reports[2]["num_experts"] == [6, 3]
    assert any("step 2 of 3: drop_experts" in line for line in heard)
    # All experts are copies of one dense layer: dropping some changes nothing.
    torch.testing.assert_close(folders.logits(out), folders.logits(llama), rtol=0, atol=1e-5)


def test_the_plan_is_what_happens(llama, mixtral, gpt_oss, deepseek, text, tmp_path):
    for path, steps in [
        (llama, [Upcycle(8, 4, 2), Drop(count=4)]),
        (llama, [Split(4, 2)]),
        (mixtral, [Drop(share=0.25)]),
        (gpt_oss, [Drop(share=0.25)]),
        (deepseek, [Drop(share=0.25)]),
    ]:
        out = tmp_path / f"{path.name}-{len(steps)}-{steps[0].name}"
        plan = make_plan(path, steps, text=text)
        convert(path, steps, out, text=text)
        seen = checkpoint.peek(out)
        lm = checkpoint.from_hf(out)
        cost = lm.cost(seq=plan.seq)
        last = plan.rows[-1]
        assert lm.config == checkpoint.peek(out).config and seen.architecture == plan.architecture
        assert (last.params, last.params_active, last.flops) == (cost.params, cost.params_active, cost.flops)
        weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert last.memory_bytes <= weights <= last.memory_bytes + 20_000


def test_planning_reads_no_weights(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "from_hf", lambda *a, **k: pytest.fail("weights were loaded"))
    plan = make_plan(llama, [Upcycle(8, 2)])
    assert plan.rows[1].params > 2 * plan.rows[0].params
    assert plan.rows[1].flops < 2 * plan.rows[0].flops
    assert "2 experts" not in str(plan) and "8 experts, hidden 48, top 2" in str(plan)


def test_all_split_experts_on_are_the_dense_model(llama, tmp_path):
    convert(llama, [Split(4, 4)], tmp_path / "out")
    torch.testing.assert_close(folders.logits(tmp_path / "out"), folders.logits(llama), rtol=0, atol=1e-5)


def test_merged_experts_go_to_a_folder_of_ours(mixtral, text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="add --as model"):
        convert(mixtral, [Merge(4)], out, text=text)
    assert not out.exists()
    done = convert(mixtral, [Merge(4)], out, text=text, as_format="model")
    lm = checkpoint.load(out)
    assert sum(lm.config.moe.distinct) == 8
    assert lm.cost().params == done.plan.rows[-1].params
    assert (out / "tokenizer.json").exists()


def test_a_model_folder_in_and_out_and_exported(tmp_path, text, llama):
    moe = MoEConfig(4, 2, 12)
    lm = LM(LMConfig(vocab_size=300, width=16, layers=2, heads=2, max_seq=64, moe=moe, init_std=0.2)).eval()
    checkpoint.save(tmp_path / "own", lm)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        convert(tmp_path / "own", [Drop(count=1)], tmp_path / "smaller", text=text)
    shutil.copy(llama / "tokenizer.json", tmp_path / "own")
    convert(tmp_path / "own", [Drop(count=1)], tmp_path / "smaller", text=text)
    assert checkpoint.load(tmp_path / "smaller").config.moe.num_experts == 3
    assert (tmp_path / "smaller" / "tokenizer.json").exists()
    done = convert(tmp_path / "own", [], tmp_path / "hf", as_format="transformers")
    assert done.certificate.verdict == "bit-equal"
    id_BS = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(folders.logits(tmp_path / "hf"), lm(id_BS).logits_BSV, rtol=0, atol=1e-4)


def test_a_conversion_repeats_from_its_run_json(mixtral, text, tmp_path):
    convert(mixtral, [Drop(share=0.25)], tmp_path / "a", text=text, text_tokens=500)
    again = repeat(tmp_path / "a", tmp_path / "b")
    assert again.certificate.b.weights_sha256 is not None
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_bf16_and_mixed_dtypes(tmp_path, llama):
    half = folders.make(tmp_path / "half", "llama", torch.bfloat16)
    convert(half, [Upcycle(4, 2)], tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    mixed = shutil.copytree(llama, tmp_path / "mixed")
    shard = sorted(mixed.glob("*.safetensors"))[0]
    _rewrite(shard, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    body = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps(body | {"dtype": None}))
    with pytest.raises(CheckpointError, match="bfloat16"):
        convert(mixed, [Upcycle(4, 2)], tmp_path / "b")
    done = convert(mixed, [Upcycle(4, 2)], tmp_path / "b", dtype=torch.float32)
    assert done.certificate.equal and checkpoint.peek(tmp_path / "b").dtype == torch.float32


def _rewrite(shard: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(shard)), shard, metadata={"format": "pt"})


# ---- what is wrong is said before anything is written


def _missing_shard(path: Path) -> None:
    sorted(path.glob("*.safetensors"))[1].unlink()


def _truncated(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])


def _wrong_shape(path: Path) -> None:
    shard = next(file for file in path.glob("*.safetensors") if b"model.norm.weight" in file.read_bytes()[:5000])
    _rewrite(shard, lambda tensors: tensors | {"model.norm.weight": torch.ones(7)})


def _unknown_architecture(path: Path) -> None:
    keys = json.loads((path / "config.json").read_text())
    keys |= {"model_type": "llamma", "architectures": ["LlammaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(keys))


def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_missing_shard, r"1 of \d+ missing in .*model-00002"),
        (_truncated, "truncated or damaged"),
        (_wrong_shape, r"shape \(7,\) for model.norm.weight"),
        (_unknown_architecture, "Did you mean 'LlamaForCausalLM'"),
        (_no_config, "neither config.json nor run.json"),
    ],
)
def test_a_damaged_folder_is_refused_before_anything_is_written(llama, tmp_path, harm, words):
    path = shutil.copytree(llama, tmp_path / "in")
    harm(path)
    with pytest.raises(CheckpointError, match=words):
        make_plan(path, [Upcycle(8, 2)])
    with pytest.raises(CheckpointError, match=words):
        convert(path, [Upcycle(8, 2)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    only(tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "steps", "words"),
    [
        ("llama", [], "the steps"),
        ("llama", [Upcycle(8, 3, 2)], "granularity"),
        ("llama", [Upcycle(8, 2), Upcycle(8, 2)], "be dense"),
        ("llama", [Drop(share=0.5, by="random")], "have experts"),
        ("mixtral", [Drop(share=0.9, by="random")], "the top_k=2 of 8 experts that a token takes"),
        ("mixtral", [Drop(share=0.1, by="random")], "be at least one expert .*--drop-experts 12.5%"),
        ("mixtral", [Densify()], "a step must change the model .*densify"),
        ("mixtral", [Drop(count=2, by="random"), Densify()], "a step must change the model .*densify"),
        ("llama", [Split(1, 1)], "a step must change the model .*split"),
        ("deepseek", [Drop(share=0.2, by="random")], "each of the 2 groups .*--drop-experts 25%"),
        ("mixtral", [Drop(share=0.25)], "--calibration must be given for drop_experts"),
        ("mixtral", [Merge(4)], "--calibration must be given for merge_experts"),
        ("llama", [Split(4, 2, by="gradient")], "--by cluster"),
        ("llama", [Split(7, 2)], "divide the hidden width 48"),
    ],
)
def test_steps_that_do_not_fit_are_refused_in_the_plan(llama, mixtral, deepseek, kind, steps, words):
    with pytest.raises(UsageError, match=words):
        make_plan({"llama": llama, "mixtral": mixtral, "deepseek": deepseek}[kind], steps)


def test_fine_experts_are_refused_in_bf16_where_transformers_would_tear_them(tmp_path, llama):
    half = folders.make(tmp_path / "half", "llama", torch.bfloat16)
    with pytest.raises(UsageError, match=r"granularity=2 in bfloat16.*--granularity 1, or --dtype float32"):
        make_plan(half, [Upcycle(8, 4, 2)])
    make_plan(half, [Upcycle(8, 4, 2)], as_format="model")
    make_plan(half, [Upcycle(8, 8, 2)])  # all of them are chosen
    assert "load it in float32" in str(make_plan(half, [Upcycle(8, 4, 2)], dtype=torch.float32))


@pytest.mark.parametrize(("kind", "by"), [(Split, "clustr"), (Drop, "rep")])
def test_an_unknown_way_is_refused_at_once(kind, by):
    with pytest.raises(UnknownNameError, match="Did you mean"):
        kind(4, 2, by=by)


def test_an_existing_folder_stays_as_it_is(llama, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="which exists"):
        convert(llama, [Upcycle(8, 2)], tmp_path / "out")
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="be free to use"):
        convert(llama, [Upcycle(8, 2)], tmp_path / "new")
    assert (tmp_path / "new.part" / "mine.txt").read_text() == "mine"


def test_a_full_disk_and_a_small_memory_are_seen_early(llama, tmp_path, monkeypatch):
    plan = make_plan(llama, [Upcycle(8, 2)])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"1\.00 kB free"):
        convert(llama, [Upcycle(8, 2)], tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(room, "free_memory", lambda: plan.peak_bytes)
    with pytest.raises(UsageError, match=r"the memory must hold .*--force goes on"):
        convert(llama, [Upcycle(8, 2)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    convert(llama, [Upcycle(8, 2)], tmp_path / "out", force=True)
    assert (tmp_path / "out" / "run.json").is_file()


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss", "deepseek"])
def test_the_plan_counts_what_transformers_counts(llama, mixtral, gpt_oss, deepseek, kind):
    path = {"llama": llama, "mixtral": mixtral, "gpt_oss": gpt_oss, "deepseek": deepseek}[kind]
    model = folders.transformers().AutoModelForCausalLM.from_pretrained(path)
    row = make_plan(path, [], as_format="model").rows[0]
    assert row.params == sum(parameter.numel() for parameter in model.parameters())
    assert row.memory_bytes == sum(parameter.numel() * 4 for parameter in model.parameters())


def test_a_model_of_nothing_but_nan_is_not_said_to_be_the_same(tmp_path):
    lm = LM(LMConfig(vocab_size=300, width=8, layers=1, heads=2, hidden=12, max_seq=32))
    with torch.no_grad():
        lm.norm.weight[0] = torch.nan
    checkpoint.save(tmp_path / "a", lm)
    done = convert(tmp_path / "a", [], tmp_path / "out", as_format="transformers")
    assert done.certificate.verdict == "different" and "nothing can be said: logits are not finite" in done.summary()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "logits are not finite" in page and "computes what" not in page


def test_text_without_a_token_compares_nothing():
    lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, hidden=12))
    for batches in ([torch.zeros(0, 4, dtype=torch.long)], [torch.zeros(4, 0, dtype=torch.long)]):
        with pytest.raises(DataError, match="at least one token"):
            upcycle(lm, num_experts=2, top_k=1, batches=batches)
