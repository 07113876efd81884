"""benchmarks.decoding: everyone's answers are compared before they are timed, and the bars are what was measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import decoding, decoding_bars, decoding_limit, decoding_page, decoding_piece
from benchmarks.decoding_limit import Limit, distinct, must_read, shares
from benchmarks.decoding_models import SHAPES, prepare
from benchmarks.decoding_peers import Server

ROOT = Path(__file__).resolve().parents[2]
OURS = ("turnout", "transformers", "adopted")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding")
    prepare("tiny", folder / "tiny", ("fp32", "bf16", "int8", "int4"), gguf=False)
    return folder


def case(job: str, streams: int, times: dict[str, list[list[float]]], kind: str = "fp32") -> dict[str, Any]:
    return {"shape": "moe", "kind": kind, "threads": 1, "job": job, "streams": streams, "context": 128, "times": times}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_who_is_timed_gives_the_logits(kind: str, work: Path, tmp_path: Path) -> None:
    for name in OURS[: 1 if kind.startswith("int") else 3]:
        server = Server(name, 1)
        assert server.answer({"do": "load", "folder": str(work / "tiny"), "shape": "tiny", "kind": kind})
        server.answer({"do": "logits", "path": str(tmp_path / "logits.npy")})
        found, wanted = np.load(tmp_path / "logits.npy"), decoding_piece.expected(name, kind, work / "tiny")
        assert wanted.std() > 0.1 and wanted.shape == (5, 3, 64)
        decoding_piece.compare(name, kind, found, wanted)
        for wrong in (found[:, ::-1], np.roll(found, 1, 0), found * 1.1, found[:2]):
            with pytest.raises(SystemExit, match=f"no times for wrong answers: logits of {name}"):
                decoding_piece.compare(name, kind, wrong, wanted)


@pytest.mark.slow
def test_all_do_what_they_are_told_with_the_same_tokens(work: Path) -> None:
    made = []
    for name in OURS:
        server = Server(name, 1)
        server.answer({"do": "load", "folder": str(work / "tiny"), "shape": "tiny", "kind": "fp32"})
        server.answer({"do": "begin", "streams": 3, "context": 5, "room": 9})
        for turn in range(2):
            timed = server.answer({"do": "steps", "tokens": 2, "seed": turn})
            assert timed["wall_s"] > 0 and set(timed) == {"cpu_s", "wall_s"}
        server.answer({"do": "begin", "streams": 1, "context": 0, "room": 12})
        server.answer({"do": "prefill", "tokens": 12, "seed": 1})
        made.append(server.answer({"do": "generate", "prompt": 6, "tokens": 5, "seed": 1})["tokens"])
        assert server.answer({"do": "memory"})["resident_bytes"] > 1e6
    assert len(made[0]) == 5 and made[0] == made[1] == made[2]


@pytest.mark.slow
def test_streams_that_were_copied_go_on_as_streams_that_read(work: Path) -> None:
    """What is timed begins with a copy, behind more tokens than the check reads: a page of cache, and the next one."""
    drawn = np.random.default_rng(3).integers(0, 64, (72, 3))
    for name in OURS:
        server = Server(name, 1)
        server.answer({"do": "load", "folder": str(work / "tiny"), "shape": "tiny", "kind": "fp32"})
        server.answer({"do": "begin", "streams": 3, "context": 60, "room": 132})
        found = np.stack([server.peer.step(id_B).copy() for id_B in drawn])
        if name == OURS[0]:
            first = found
            text_BS = np.concatenate((np.repeat(server._drawn(1, (60,))[None], 3, 0), drawn.T), 1)
            with server.peer.torch.no_grad():
                read = server.peer.lm(server.peer.torch.from_numpy(text_BS)).logits_BSV[:, 60:].numpy()
            decoding_piece.compare(name, "fp32", found, read.swapaxes(0, 1))
        decoding_piece.compare(name, "fp32", found, first)


@pytest.mark.slow
def test_an_expert_in_the_place_of_another_gets_no_times(work: Path, tmp_path: Path) -> None:
    kind = "fp32"  # what is allowed in 16 bits is more than two experts of this model differ by
    server = Server("turnout", 1)
    server.answer({"do": "load", "folder": str(work / "tiny"), "shape": "tiny", "kind": kind})
    bank = server.peer.lm.blocks[1].ff.bank
    for tensor in (*bank.parameters(), *bank.buffers()):
        if tensor.ndim > 1:
            tensor.data[:2] = tensor.data[:2].flip(0).clone()
    server.answer({"do": "logits", "path": str(tmp_path / "logits.npy")})
    with pytest.raises(SystemExit, match="no times for wrong answers"):
        found = np.load(tmp_path / "logits.npy")
        decoding_piece.compare("turnout", kind, found, decoding_piece.expected("turnout", kind, work / "tiny"))


def test_bars_are_the_worst_of_what_was_measured() -> None:
    one = {"turnout": [[2.0, 9.0], [3.0, 9.0], [9.0, 9.0]], "llama.cpp": [[4.0, 1.0], [4.0, 1.0], [4.0, 1.0]]}
    two = {"turnout": [[5.0, 9.0]], "llama.cpp": [[4.0, 1.0]], "transformers": [[20.0, 1.0]], "adopted": [[10.0, 1.0]]}
    two["limit"] = [[3.0, 9.0]]
    memory = {"peer": "turnout", "shape": "moe", "kind": "fp32", "before_bytes": 100, "resident_bytes": 330,
              "peak_bytes": 400, "weights_bytes": 180, "cache_bytes": 20}  # fmt: skip
    alone = {"shape": "moe", "form": "bf16", "rows": 2, "bar": 1.3, "ratio": 1.3}
    memory["threads"] = 1
    cases = [case("steps", 1, one), case("steps", 1, two, "int4"), case("steps", 16, two), case("prefill", 1, two)]
    cases += [case("steps", 4, two), case("generate", 1, two), case("steps", 1, {"llama.cpp": [[1.0, 1.0]]})]
    cases.append(case("steps", 1, two) | {"threads": 2})
    pieces = [{"cases": cases[:2], "memory": [memory]}]
    pieces += [{"cases": cases[2:], "memory": [memory | {"peer": "transformers"}]}]
    record = {"pieces": pieces, "alone": [alone]}
    bars = {bar.what: bar for bar in decoding_bars.judge(record)}
    one_stream = bars["one stream, fp32, over llama.cpp"]
    assert one_stream.found == {"moe, after 128, 1 thread": 0.75, "moe, after 128, 2 threads": 1.25}
    assert one_stream.worst == "moe, after 128, 2 threads" and one_stream.met == 1
    assert one_stream.least == {"moe, after 128, 2 threads": 0.75} and one_stream.beyond == 0
    assert "1.25 | 0.75 | moe, after 128, 2 threads | 0.97 | 0.75 | **missed**, met in 1 of 2 |" in one_stream.row()
    many = bars["16 streams, fp32, over llama.cpp"]
    assert many.beyond == 1 and "met in 0 of 1; the limit is above the bar in 1 |" in many.row()
    found = {what: (bar.allowed, *bar.found.values()) for what, bar in bars.items() if what != one_stream.what}
    assert found == {
        "one stream, int4, over llama.cpp": (1.1, 1.25),
        "one stream, int4, over transformers' default": (0.3, 0.25),
        "one stream, fp32, over transformers' default": (0.3, 0.25),
        "16 streams, fp32, over llama.cpp": (0.4, 1.25),
        "16 streams, fp32, over adopted transformers": (0.67, 0.5),
        "prefill, fp32, over llama.cpp": (0.6, 1.25),
        "prefill, fp32, over transformers' default": (0.9, 0.25),
        "resident memory, fp32, over weights and cache": (1.15, 1.15),
        "experts alone, bf16, 2 rows each, over a sweep": (1.3, 1.3),
    }


def test_a_limit_reads_what_so_many_streams_take() -> None:
    even_LE = np.full((3, 8), 2 / 8)
    assert distinct(even_LE, 1).tolist() == pytest.approx([2.0] * 3)
    assert distinct(even_LE, 2).tolist() == pytest.approx([8 * (1 - 0.75**2)] * 3)
    one_LE = np.eye(8)[:1]
    assert distinct(one_LE, 16).tolist() == [1.0]
    told = {"rest": 100, "row": 4, "expert": [10.0] * 3, "position": 2}
    assert must_read(told, even_LE, 1, 5) == pytest.approx(100 + 3 * 2 * 10 + 4 + 5 * 2)
    assert must_read(told | {"expert": []}, np.zeros((0,)), 3, 0) == 100 + 3 * 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_the_bytes_of_a_step_are_those_of_the_model(kind: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, folder = Server("turnout", 1), work / "tiny"
    server.answer({"do": "load", "folder": str(folder), "shape": "tiny", "kind": kind})
    told, sizes = server.answer({"do": "read_bytes"}), SHAPES["tiny"]
    share_LE = shares(folder)
    assert share_LE.shape == (2, 4) and share_LE.sum(1).tolist() == pytest.approx([2.0, 2.0])
    assert told["position"] == sizes.cache_bytes(1, 4 if kind == "fp32" else 2)
    whole = must_read(told, np.ones((2, 4)), 1, 0)
    embedding = 64 * told["row"]
    assert whole == server.peer.weights_bytes - embedding + told["row"]
    bits = {"fp32": 32, "bf16": 16, "int8": 8.5, "int4": 4.5}[kind]
    assert told["expert"] == pytest.approx([3 * 32 * 32 * bits / 8] * 2)
    read, limit = list[int](), Limit(2)
    monkeypatch.setattr(decoding_limit, "sweep", lambda piece: read.append(piece.nbytes))
    limit.answer({"do": "load", "folder": str(folder), "shape": "tiny", "kind": kind})
    limit.answer({"do": "begin", "held_bytes": 3 << 20, "read_bytes": 5 << 20})
    limit.answer({"do": "steps", "tokens": 10})
    assert sum(read) == 50 << 20 and max(read) <= 3 << 20  # the same memory again and again
    assert limit.answer({"do": "prefill", "tokens": 16, "seed": 1})["cpu_s"] > 0


def test_the_guide_says_what_its_page_measured() -> None:
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    said = text.partition(decoding_page.BEGIN)[2].partition(decoding_page.END)[0]
    with pytest.raises(SystemExit, match="no section"):
        decoding_page.into("none here", "new")
    assert decoding_page.into(text, f"{decoding_page.BEGIN}{said}{decoding_page.END}") == text
    if said == decoding_page.UNMEASURED:
        return
    page = said.partition("](")[2].partition(")")[0]
    record = json.loads((ROOT / "docs" / page).with_suffix(".json").read_text(encoding="utf-8"))
    assert decoding_page.into(text, decoding_page.section(record, page)) == text


def test_why_some_take_no_part() -> None:
    assert decoding_piece.why_absent("adopted", "dense", "fp32") == "a dense model has no experts to adopt"
    assert "few bits" in str(decoding_piece.why_absent("transformers", "moe", "int8"))
    assert all(decoding_piece.why_absent("turnout", shape, "int4") is None for shape in SHAPES)


@pytest.mark.slow
def test_the_whole_of_it_on_small_models(work: Path, tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text(f"before\n{decoding_page.BEGIN}\n{decoding_page.END}\nafter\n", encoding="utf-8")
    asked = "--kinds fp32 int4 --threads 1 --streams 1 16 --context 8 --rounds 2 --tokens 4 --prefill 16".split()
    asked += ["--peers", *OURS, "--work", str(work), "--out", str(tmp_path / "out"), "--docs", str(guide)]
    decoding.main(["--shapes", "tiny", "tiny dense", *asked])
    page, raw = (next((tmp_path / "out").glob(f"decoding-*.{kind}")).read_text() for kind in ("md", "json"))
    record = json.loads(raw)
    cases = [one for piece in record["pieces"] for one in piece["cases"]]
    assert not record["failed"] and {(one["shape"], one["kind"], *one["times"]) for one in cases} == {
        (*one, *(("limit",) if limited else ()))
        for one in (("tiny", "fp32", *OURS), ("tiny", "int4", "turnout"),
                    ("tiny dense", "fp32", *OURS[:2]), ("tiny dense", "int4", "turnout"))
        for limited in (True, False)
    }  # fmt: skip
    assert all(value > 0 for one in cases for rows in one["times"].values() for row in rows for value in row)
    assert page.count("16 streams after 8, a token |") == 4 and "a dense model has no experts to adopt" in page
    assert all(one["times"]["limit"] for one in cases if one["job"] != "generate")
    assert page.count("turnout over limit") == 4 and "the limit itself is above the bar" in page.partition("## bars")[2]
    assert "experts alone, fp32, 4 rows each, over a sweep" in page.partition("## bars")[2]
    said = guide.read_text(encoding="utf-8")
    assert said.startswith("before\n") and said.endswith("after\n") and "16 streams, fp32, over adopted" in said


def test_a_piece_that_fails_is_named_and_a_run_goes_on_from_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(shape: str, kind: str, threads: int, options: object) -> dict[str, Any]:
        done.append(kind)
        if kind == "bf16":
            raise SystemExit("no times for wrong answers: planted")
        return {"cases": [], "memory": [], "errors": {}, "absent": {}}

    done = list[str]()
    monkeypatch.setattr(decoding, "piece", measured)
    asked = ["--shapes", "tiny dense", "--kinds", "bf16", "fp32", "--threads", "1", "--work", str(tmp_path)]
    with pytest.raises(SystemExit, match="1 pieces failed: tiny dense, bf16, 1 thread"):
        decoding.main([*asked, "--out", str(tmp_path)])
    page = next(tmp_path.glob("decoding-*.md")).read_text(encoding="utf-8")
    assert "**Not measured: tiny dense, bf16, 1 thread**, SystemExit: no times for wrong answers: planted" in page
    assert "## tiny dense, fp32, 1 thread" in page
    kept = [path.name for path in (tmp_path / "pieces").iterdir()]
    assert kept == ["tiny_dense-fp32-1_thread.json"]
    with pytest.raises(SystemExit, match="1 pieces failed"):
        decoding.main(asked)
    assert done == ["bf16", "fp32", "bf16"]  # what was measured stays; of other settings it is measured anew
    decoding.main([*asked[:3], "fp32", *asked[5:], "--rounds", "2"])
    assert done[3:] == ["fp32"]
