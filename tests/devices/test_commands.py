"""Every command that runs a model takes --device and hands it down: on the pretended device, and refused by name."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from turnout.cli.main import COMMANDS, build_parser, main

sys.path.append(str(Path(__file__).parent))
from pretend import pretending
from tables import cases

SMALL = cases("cli/test_commands.py").SMALL
# What looks at files, or at nothing.
# Parity is of processes on the CPU; plan and place compute with numbers alone.
WITHOUT = {"bench-serve", "cache", "report", "methods", "doctor", "parity", "place", "plan", "laws"}
CUDA = ("--device", "cuda")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        lines = [f"line {n} of {number}: " + " ".join(str(n * k) for k in range(12)) for n in range(20)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    """A run that was trained on the device, which the recipe's "auto" took."""
    out = tmp_path_factory.mktemp("runs") / "there"
    with pretending():
        assert main(["train", "tiny", *SMALL, "--data", f"numbers={text}", "--out", str(out), "--quiet"]) == 0
    return out


def body(folder: Path, name: str = "run.json") -> dict:
    return json.loads((folder / name).read_text())


def test_every_command_that_runs_a_model_takes_a_device() -> None:
    parsers = next(action for action in build_parser()._actions if action.dest == "command").choices
    taking = {name for name in COMMANDS if "--device" in parsers[name]._option_string_actions}
    assert taking == set(COMMANDS) - WITHOUT


def test_auto_is_the_accelerator_and_what_it_became_is_kept(run) -> None:
    assert body(run)["train"]["device"] == "auto"
    assert body(run)["place"] == {"device": "cuda:0", "is": "cuda:0 (Pretend)", "dtype": "fp32"}
    assert body(run, "result.json")["peak_memory_bytes"] == 12345


@pytest.mark.parametrize("how", [["--device", "cpu"], ["device=cpu"], ["train.device=cpu", "--device", "cpu"]])
def test_cpu_by_name_stays_there(text, tmp_path, how: list[str], capsys) -> None:
    with pretending():
        argv = ["train", "tiny", *SMALL, "steps=1", "--data", f"numbers={text}", "--out", str(tmp_path / "r"), *how]
        assert main(argv) == 0
    assert body(tmp_path / "r")["place"]["device"] == body(tmp_path / "r")["train"]["device"] == "cpu"
    assert "training on cpu, in fp32." in capsys.readouterr().err


def test_two_devices_are_one_too_many(text, tmp_path, capsys) -> None:
    argv = [
        "train",
        "tiny",
        "device=cpu",
        "--device",
        "cuda",
        "--data",
        f"numbers={text}",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main(argv) == 2
    assert "the device must be said once" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_going_on_where_there_is_none_is_said(run, tmp_path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "steps=5"]) == 0
    assert "began on cuda (fp32), goes on on cpu (fp32): not bit for bit." in capsys.readouterr().err
    assert body(tmp_path / "run")["resumed"][0]["place"]["device"] == "cpu"


def test_a_run_again_is_where_it_was(run, tmp_path, capsys) -> None:
    with pretending():
        assert main(["run", str(run), "steps=1", "warmup=0", "--out", str(tmp_path / "a")]) == 0
    assert body(tmp_path / "a")["place"]["device"] == "cuda:0"
    capsys.readouterr()
    assert main(["run", str(run), "steps=1", "warmup=0", "--out", str(tmp_path / "b")]) == 0
    assert "was done on cuda, this is done on cpu" in capsys.readouterr().err
    assert body(tmp_path / "b")["place"]["device"] == "cpu"
    with pretending():  # a run from a machine without one
        argv = ["run", str(tmp_path / "b"), "steps=1", "--out", str(tmp_path / "c"), "--quiet"]
        assert main(argv) == 0
        assert body(tmp_path / "c")["place"]["device"] == "cpu"
        assert main([*argv[:-2], str(tmp_path / "d"), "--quiet", *CUDA]) == 0
    assert body(tmp_path / "d")["place"]["device"] == "cuda:0"


def test_eval_and_sample_give_there_what_they_give_here(run, text, capsys) -> None:
    found, said = [], []
    for device in ("cpu", "cuda"):
        with pretending():
            assert main(["eval", str(run), "--json", "--device", device]) == 0
            found.append(json.loads(capsys.readouterr().out))
            for place in (run / "model", run):  # a model by itself, and a run on another text
                argv = ["eval", str(place), "--data", str(text), "--limit", "300", "--json", "--device", device]
                assert main(argv) == 0
                found.append(json.loads(capsys.readouterr().out))
            assert main(["sample", str(run), "--prompt", "line", "--tokens", "8", "--device", device]) == 0
            said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    for here, there in zip(found[:3], found[3:], strict=True):
        assert here["values"]["bits_per_byte"] == pytest.approx(there["values"]["bits_per_byte"], rel=1e-5)
        assert (here["context"]["device"], there["context"]["device"]) == ("cpu", "cuda:0 (Pretend)")


def test_certify(run, tmp_path, capsys) -> None:
    with pretending():
        kept = tmp_path / "certificate.json"
        assert main(["certify", str(run), str(run), "--json", "--out", str(kept), *CUDA]) == 0
        assert json.loads(capsys.readouterr().out)["context"]["device"] == "cuda:0 (Pretend)"
        assert main(["certify", str(run), str(run), "--check", str(kept), "--json", "--device", "cpu"]) == 0
        assert json.loads(capsys.readouterr().out.partition("\nthe certificate")[0])["context"]["device"] == "cpu"


@pytest.mark.slow
def test_convert_and_again(run, text, tmp_path, capsys) -> None:
    argv = ["convert", str(run), "--drop-experts", "1", "--calibration", str(text), "--calibration-tokens", "256"]
    with pretending():
        assert main([*argv, "--out", str(tmp_path / "a"), "--quiet", *CUDA]) == 0
        assert main([*argv, "--out", str(tmp_path / "b"), "--quiet", "--device", "cpu"]) == 0
        assert main(["run", str(tmp_path / "a"), "--out", str(tmp_path / "c"), "--quiet"]) == 0
    records = [body(tmp_path / name)["conversion"] for name in "abc"]
    assert [record["device"] for record in records] == ["cuda:0", "cpu", "cuda:0"]
    after = [record["held_out"]["after"]["bits_per_byte"] for record in records]
    assert after[0] == after[2] == pytest.approx(after[1], rel=1e-5)
    assert main(["run", str(tmp_path / "a"), "--out", str(tmp_path / "d")]) == 0
    assert "was done on cuda, this is done on cpu" in capsys.readouterr().err


def test_demo(monkeypatch, tmp_path) -> None:
    from turnout.recipes import compare

    seen: list[object] = []

    def note(run, out, **rest):
        seen.append(run.train.device)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "execute", note)
    assert main(["demo", "--out", str(tmp_path), "--quiet", *CUDA]) == 130
    assert seen == ["cuda"]


def test_claims_stay_on_the_cpu(capsys) -> None:
    assert main(["verify", "loss_free", *CUDA]) == 2
    assert "--device must be auto or cpu" in capsys.readouterr().err
    assert main(["verify", "--device", "cpu"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "argv",
    [
        ["train", "tiny", "--out", "OUT", "--data", "TEXT"],
        ["train", "tiny", "--out", "OUT", "--data", "TEXT", "device=cuda"],
        ["run", "RUN", "--out", "OUT"],
        ["eval", "RUN"],
        ["sample", "RUN"],
        ["certify", "RUN", "RUN"],
        ["convert", "RUN", "--drop-experts", "1", "--calibration", "TEXT", "--out", "OUT"],
        ["demo", "--out", "OUT"],
    ],
    ids=lambda argv: argv[0] + (" field" if "device=cuda" in argv else ""),
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_done(argv, run, text, tmp_path, capsys) -> None:
    places = {"RUN": str(run), "OUT": str(tmp_path / "out"), "TEXT": str(text)}
    argv = [places.get(word, word) for word in argv]
    assert main(argv if "device=cuda" in argv else [*argv, *CUDA]) == 2
    said = capsys.readouterr().err
    assert "got cuda, and there is cpu" in said and "Did you mean" not in said, said
    assert f"in turnout {argv[0]}" in said or argv[0] in ("train", "run")
    assert "pass --device cpu" in said or argv[0] in ("train", "run")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.safetensors"))
