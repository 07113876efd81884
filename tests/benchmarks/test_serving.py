"""benchmarks.serving: one server after the other under the same load, and the bars are what was measured."""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import llama_cpp, llama_server, serving, serving_peers
from benchmarks.serving_page import page
from turnout.models import LM, LMConfig, MoEConfig
from turnout.recipes import tiny
from turnout.train.data import train_tokenizer

ABOUT = {"date": "2026-11-28", "threads_of_servers": 1, "rounds": 2, "quick": False}


def round_of(rate: float, first: float, p99: float | None = 0.2) -> dict[str, Any]:
    found: dict[str, Any] = {
        "throughput": {"tokens_per_s": rate, "tokens_per_cpu_s": 2 * rate, "client": 0.1},
        "low_load": {"ttft_s": first, "itl_s": 0.01, "cpu_s": 1.0},
    }
    if p99 is not None:
        found["long_prompts"] = {"itl_s": 0.1, "p99_s": p99, "gaps": 9, "long_ttft_s": 3.0}
    return found


def piece(**peers: list[dict[str, Any]]) -> dict[str, Any]:
    named = {name.replace("_", "."): rounds for name, rounds in peers.items()}
    size = dict.fromkeys(named, 10**9)
    return {"model": "moe", "kind": "fp32", "peers": named, "failed": {}, "left_out": {}, "resident_bytes": size}


def bars(*pieces: dict[str, Any]) -> dict[str, str]:
    lines = page({"about": ABOUT, "pieces": list(pieces)})
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| moe, fp32:")]
    return {row[1].removeprefix("moe, fp32: "): f"{row[3].split(' ')[0]} {row[4].strip('*')}" for row in rows}


def test_a_bar_is_the_median_of_ratios_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving_page.heading", lambda title, about: [f"# {title}"])
    ours = [round_of(30, 0.5), round_of(60, 0.5), round_of(90, 0.5)]
    theirs = [round_of(10, 1.0), round_of(60, 0.4), round_of(60, 0.4)]
    said = bars(piece(turnout=ours, llama_cpp=theirs, transformers=[round_of(10, 9.0)]))
    assert said["throughput of 16 users over llama.cpp"] == "1.50 met"
    assert said["throughput of 16 users over llama.cpp, CPU"] == "1.50 met"
    assert said["first token of one user over llama.cpp"] == "1.25 missed"
    assert said["throughput of 16 users over transformers"] == "3.00 met"
    assert said["p99 gap over median, prompts of 2,048 beside"] == "2.00 met"
    worse = bars(piece(turnout=[round_of(29, 0.5, 0.31)], llama_cpp=[round_of(20, 0.5)]))
    assert worse["throughput of 16 users over llama.cpp"] == "1.45 missed"
    assert worse["first token of one user over llama.cpp"] == "1.00 met"
    assert worse["p99 gap over median, prompts of 2,048 beside"] == "3.10 missed"


def test_what_failed_and_what_was_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving_page.heading", lambda title, about: [f"# {title}"])
    jobs, why = serving.jobs_of(256, ["throughput", "long_prompts"])
    assert jobs == ["throughput"]
    one = piece(turnout=[round_of(30, 0.5, None)], llama_cpp=[]) | {"left_out": why, "failed": {"llama.cpp": "it fell"}}
    lines = page({"about": ABOUT, "pieces": [one]})
    assert "- **llama.cpp failed**: it fell" in lines
    assert "- long prompts left out: prompts of 2,048 tokens do not fit into the model's 256 positions." in lines
    assert bars(one) == {}
    assert serving.jobs_of(4096, ["long_prompts"]) == (["long_prompts"], {})


def options(folder: Path, **others: Any) -> argparse.Namespace:
    given = {"work": folder, "peers": ["turnout"], "jobs": ["throughput", "low_load", "long_prompts"]}
    return argparse.Namespace(**given | {"threads": 1, "rounds": 1, "quick": True} | others)


def test_a_run_is_served_as_itself_though_a_shape_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = LMConfig(vocab_size=258, width=16, layers=1, heads=2, max_seq=64, moe=MoEConfig(2, 1, 8))
    lm = LM(sizes)
    train_tokenizer(["a cat, a cat"], vocab_size=258).save(str(tmp_path / "tokenizer.json"))
    opened = argparse.Namespace(lm=lm, folder=tmp_path)
    monkeypatch.setattr("turnout.recipes.models.opened", lambda *given: opened)
    run = tmp_path / "demo" / "moe"
    place, folder, _ = serving._prepared(str(run), "fp32", options(tmp_path))
    assert serving.positions(folder) == 64
    assert place != tmp_path / "served" / "moe" and folder.parent == place
    with pytest.raises(RuntimeError, match="fp32 and bf16, not in int4"):
        serving._prepared(str(run), "int4", options(tmp_path))


class Counted:
    """A model that goes on from the last token by counting up."""

    def __init__(self) -> None:
        self.fed, self.forgotten = list[list[list[int]]](), list[int]()

    def forget(self, stream: int) -> None:
        self.forgotten.append(stream)

    def feed(self, ids: list[list[int]]) -> list[Any]:
        self.fed.append(ids)
        return [torch.nn.functional.one_hot(torch.tensor(new[-1] + 1), 999).numpy() for new in ids if new]


def test_the_server_of_llama_cpp_reads_prompts_beside_texts_that_go_on() -> None:
    async def both() -> tuple[list[int], list[int], Counted]:
        model = Counted()
        worker = llama_server.Worker(model, 2, asyncio.get_running_loop())
        some = [llama_server.Asked(ids, 3, asyncio.Queue()) for ids in ([5, 6], [7] * 600)]
        worker.slots = list(some)
        for _ in range(4):
            worker.step()
        await asyncio.sleep(0)
        heard: list[list[int]] = [[], []]
        for one, tokens in zip(some, heard, strict=True):
            while (token := one.heard.get_nowait()) is not None:
                tokens.append(token)
        return heard[0], heard[1], model

    short, long, model = asyncio.run(both())
    assert short == [7, 8, 9] and long == [8, 9, 10]
    assert [[len(new) for new in ids] for ids in model.fed] == [[2, 510], [1, 90], [1, 1], [0, 1]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processor time is read from /proc")
def test_a_server_is_measured_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(serving, "MANY", 2)
    peers = ["turnout"] if llama_cpp.why_not() else ["turnout", "llama.cpp"]
    found = serving.measure("tiny", "fp32", options(tmp_path, peers=peers, jobs=["throughput", "low_load"]))
    assert not found["failed"] and not found["left_out"]
    for one in peers:
        (done,) = found["peers"][one]
        assert done["throughput"]["tokens_per_s"] > 0 and 0 < done["low_load"]["ttft_s"] < 60
        assert done["throughput"]["client"] > 0 and found["resident_bytes"][one] > 10**7
    assert json.loads(json.dumps(found)) == found


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    (tmp_path / "fp32").mkdir()
    if why := llama_cpp.why_not():
        pytest.skip(why)
    with pytest.raises(RuntimeError, match=r"llama\.cpp does not answer"):
        folder, gguf = tmp_path / "fp32", tmp_path / "none.gguf"
        serving_peers.start("llama.cpp", folder, gguf, "fp32", threads=1, streams=1, room=8)


def test_the_demo_has_no_room_for_long_prompts() -> None:
    assert serving.jobs_of(tiny().model.max_seq, ["long_prompts"])[0] == []
