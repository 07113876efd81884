"""``turnout cache``: what it prints and writes, what it recommends, and what a user gets wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from turnout.cli import cache
from turnout.cli.experts import POLICIES as FLAGGED
from turnout.cli.main import main
from turnout.decide.device.cache import Learnt
from turnout.decide.device.cache.named import NAMES
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.checkpoint import save
from turnout.recipes.cache_times import expert_times
from turnout.run.swap import ExpertCache
from turnout.types import Routing, TraceWriter


def record(path: Path, documents: int, *, tokens: int = 30) -> str:
    """Documents of two topics, 3 layers of 8 experts, 2 taken."""
    rng, liked_ZLE = np.random.default_rng(0), np.random.default_rng(1).standard_normal((2, 3, 8)) * 2
    with TraceWriter(path, num_experts_L=[8] * 3, domains=["all"], token_ids=True) as writer:
        for document in range(documents):
            noisy = liked_ZLE[document % 2] + rng.gumbel(size=(tokens, 3, 8))
            index_TLK = torch.from_numpy(np.argsort(-noisy, axis=2)[:, :, :2].copy())
            weight = torch.ones(tokens, 2)
            writer.add(
                [Routing.from_topk(index_TLK[:, layer], weight, num_experts=8) for layer in range(3)],
                document_tokens=[tokens],
                document_domains=[0],
                token_id_T=torch.from_numpy(rng.integers(0, 50, tokens)),
            )
    return str(path)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return record(tmp_path_factory.mktemp("traces") / "trace", 8)


def test_the_parser_knows_every_policy():
    assert cache.POLICIES == FLAGGED == NAMES


def test_every_policy_is_beside_the_bound_and_one_is_recommended(trace, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["cache", trace, "--slots", "2,4", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*NAMES, "belady", "take ", "needs a router")) and "cache.html" in text
    values = json.loads((out / "cache.json").read_text())["values"]
    assert values["documents"] == 2 and values["documents_learnt"] == 6
    assert len(values["rows"]) == 4 * (len(NAMES) + 1)
    for told in values["recommended"]:
        here = {r["policy"]: r for r in values["rows"] if (r["pool"], r["slots"]) == (told["pool"], told["slots"])}
        bound = here["belady"]
        assert all(r["fetches"] >= bound["fetches"] and r["seconds"] >= bound["seconds"] - 1e-9 for r in here.values())
        able = [r["seconds"] for name, r in here.items() if name not in ("belady", "pre_gated")]
        assert here[told["policy"]]["seconds"] <= 1.01 * min(able)
    page = (out / "cache.html").read_text()
    assert "What to take" in page and page.count("<svg") >= 6 and "https://" not in page


def test_the_same_twice_to_the_bit(trace, capsys):
    found = []
    for _ in range(2):
        assert main(["cache", trace, "--slots", "3", "--json"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


def test_a_memory_is_as_many_slots_as_fit(trace, capsys):
    asked = ["cache", trace, "--memory", "10KB", "--expert-bytes", "1KB", "--policy", "lru", "--json"]
    assert main(asked) == 0
    rows = json.loads(capsys.readouterr().out)["values"]["rows"]
    assert {(row["pool"], row["slots"], row["capacity"]) for row in rows} == {
        ("each layer", 3, 9),
        ("all layers", 10, 10),
    }


def test_streams_side_by_side_ask_for_the_union(trace, capsys):
    assert (
        main(["cache", trace, "--slots", "6", "--streams", "2", "--policy", "lru,lfu", "--pool", "layer", "--json"])
        == 0
    )
    values = json.loads(capsys.readouterr().out)["values"]
    assert values["documents"] == 8 and values["steps"] == 120 and values["experts_asked"] > 120 * 3 * 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--slots", "1"], "pass at least 2"),
        (["--slots", "a"], "write --slots 8,16,32"),
        (["--policy", "lur"], "lru"),
        (["--memory", "2GB"], "--expert-bytes 4.7MB"),
        (["--memory", "lots", "--expert-bytes", "1MB"], "pass --memory 2GB"),
        (["--memory", "10", "--expert-bytes", "1MB"], "pass --memory 2000000 or more"),
        (["--expert-bytes", "1MB"], "got --expert-bytes."),
        (["--slots", "99"], "--slots must be at most"),
        (["--streams", "0"], "--streams must be 1 or more"),
        (["--tokens", "0"], "--tokens must be 1 or more"),
        (["--fetch-ms", "0"], "--fetch-ms must be a finite number above 0"),
        (["--compute-ms", "nan"], "--compute-ms must be a finite number above 0"),
        (["--seed", "-1"], "--seed must be a whole number from 0"),
        (["--out", __file__], "is a file"),
    ],
)
def test_mistakes_are_told_with_what_would_do(trace, flags, said, capsys):
    assert main(["cache", trace, *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_is_written_again(trace, tmp_path):
    for _ in range(2):
        assert main(["cache", trace, "--policy", "lru, lru", "--slots", "4", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "cache.html").is_file()


def test_what_learns_needs_another_document(tmp_path, capsys):
    one = record(tmp_path / "one", 1)
    assert main(["cache", one]) == 2
    assert "leave out static, trace_matching, expert_flow" in capsys.readouterr().err
    assert main(["cache", one, "--policy", "lru", "--slots", "4"]) == 0


def test_what_is_learnt_is_written_whatever_is_compared(trace, tmp_path):
    asked = ["cache", trace, "--policy", "lru", "--slots", "4", "--save", str(tmp_path / "profile")]
    assert main(asked) == 0
    learnt = Learnt.open(tmp_path / "profile")
    assert learnt.library_NLE.shape == (6, 3, 8) and learnt.profile_LE.sum() == 6 * 30 * 3 * 2


def test_a_run_is_its_trace_and_times_are_measured_with_its_model(tmp_path, capsys):
    moe = MoEConfig(8, 2, 16)
    save(tmp_path / "run", LM(LMConfig(vocab_size=50, width=16, layers=3, heads=2, max_seq=64, moe=moe)))
    assert main(["cache", str(tmp_path / "run")]) == 2
    assert f"turnout eval {tmp_path / 'run'} --trace" in capsys.readouterr().err
    record(tmp_path / "run" / "trace", 8)
    asked = ["cache", str(tmp_path / "run"), "--policy", "lru,least-stale", "--memory", "30kB", "--json"]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["values"]["expert_bytes"] == 3 * 16 * 16 * 4 and told["context"]["model"] == str(tmp_path / "run")
    assert 0 < told["values"]["fetch_s"] < 1 and told["values"]["fetch_s"] != 1e-3
    assert "are measured here" in str(told["notes"])
    assert main([*asked, "--fetch-ms", "2", "--compute-ms", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["values"]["fetch_s"], told["values"]["compute_s"]) == (2e-3, 3e-3) and "measured" not in str(told)


def test_times_of_a_model_that_the_trace_is_not_of_are_refused(trace, tmp_path, capsys):
    moe = MoEConfig(4, 2, 16)
    save(tmp_path / "other", LM(LMConfig(vocab_size=50, width=16, layers=2, heads=2, max_seq=64, moe=moe)))
    assert main(["cache", trace, "--policy", "lru", "--memory", "30kB", "--model", str(tmp_path / "other")]) == 2
    told = capsys.readouterr().err
    assert "2 layers of 4 experts" in told and "3 layers of 8" in told and "--fetch-ms" in told


def test_times_that_nobody_said_are_said_to_be_assumed(trace, capsys):
    assert main(["cache", trace, "--policy", "lru", "--slots", "4", "--fetch-ms", "2"]) == 0
    assert "--compute-ms is assumed, 1 ms: name the model" in capsys.readouterr().out


def test_a_fetch_is_measured_where_half_of_the_files_would_hold_all_experts(tmp_path, monkeypatch, capsys):
    """It was a millionth of a second, and called measured."""
    sizes = {"width": 16, "layers": 3, "heads": 2, "max_seq": 64, "vocab_size": 4000}
    missed, right = list[int](), ExpertCache.close

    def close(cache: ExpertCache) -> None:
        missed.append(cache.stats().misses)
        right(cache)

    for per_layer in (None, (4, 8, 8)):
        moe = MoEConfig(8, 2, 16, per_layer=per_layer)
        save(tmp_path / "model", LM(LMConfig(**sizes, moe=moe)))
        with monkeypatch.context() as watched:
            watched.setattr(ExpertCache, "close", close)
            times = expert_times(tmp_path / "model")
        assert times.fetch_s > 1e-6 and times.experts == 8
    assert [count > 0 for count in missed] == [False, True] * 2, "the first held all; of the second files were read"
    save(tmp_path / "model", LM(LMConfig(**sizes, moe=MoEConfig(2, 2, 16))))
    record(tmp_path / "trace", 8)
    assert main(["cache", str(tmp_path / "trace"), "--model", str(tmp_path / "model")]) == 2
    assert "whose tokens take all 2 experts of a layer" in capsys.readouterr().err
