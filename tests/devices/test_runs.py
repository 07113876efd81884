"""A run trains on the device that was asked for, says so, and goes on on another."""

import json
import sys
from pathlib import Path

import pytest
import torch

from turnout.errors import TrainingError, UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.train import TrainConfig, train
from turnout.train.data import Batch, Document, prepare
from turnout.train.place import began
from turnout.train.room import check_room, step_need
from turnout.train.step import Step

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "train")]
from pretend import CUDA, Pretend, pretending
from stand_in import lines

MODEL = LMConfig(
    265,
    width=16,
    layers=2,
    heads=2,
    max_seq=32,
    moe=MoEConfig(4, 2, 16, router="LossFree"),
)


class Told:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def __getattr__(self, name: str):
        return lambda *arguments: None


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    texts = [Document(str(n), f"text number {n} and so on " + "word " * (n % 7)) for n in range(40)]
    return prepare({"d": texts}, tmp_path_factory.mktemp("t"), vocab_size=265, held_out=0.3, quiet=True)


def config(steps: int, **fields: object) -> TrainConfig:
    every = {"eval_every": 3, "checkpoint_every": 3, "log_every": 1}
    return TrainConfig(steps=steps, batch=2, seq=32, accumulate=2, lr=1e-2, warmup=1, **every, **fields)


def go(tokens, out, steps: int = 6, *, resume: bool | str = False, **fields: object) -> tuple[LM, list[str]]:
    lm, told = LM(MODEL), Told()
    train(lm, tokens, config(steps, **fields), out, resume=resume, progress=told)
    return lm, told.said


def losses(out) -> list[float]:
    return [line["loss"] for line in lines(out) if line["kind"] == "train"]


def test_it_learns_there_what_it_does_here(tokens, tmp_path) -> None:
    here, said = go(tokens, tmp_path / "here")
    assert said[0] == "training on cpu, in fp32." and here.embedding.device.type == "cpu"
    with pretending():
        there, said = go(tokens, tmp_path / "there", device="cuda")
        assert said[0] == "training on cuda:0 (Pretend), in fp32."
        assert type(there.embedding.data) is Pretend
        for (name, p), q in zip(there.state_dict().items(), here.state_dict().values(), strict=True):
            torch.testing.assert_close(p.cpu(), q, rtol=1e-3, atol=1e-4, msg=name)
    assert losses(tmp_path / "there") == pytest.approx(losses(tmp_path / "here"), rel=1e-4)
    assert {line["peak_memory_bytes"] for line in lines(tmp_path / "there") if line["kind"] == "train"} == {12345}
    body = json.loads((tmp_path / "there" / "run.json").read_text())
    assert body["place"] == {"device": "cuda:0", "is": "cuda:0 (Pretend)", "dtype": "fp32"}
    assert body["train"]["device"] == "cuda" and body["train"]["dtype"] == "auto"


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_it_goes_on_on_another_device_and_says_so(tokens, tmp_path, first: str) -> None:
    second = "cpu" if first == "cuda" else "cuda"
    with pretending():
        go(tokens, tmp_path / "run", 9, device=first)
        whole = losses(tmp_path / "run")
        _, said = go(tokens, tmp_path / "run", 9, resume="step-00000006", device=second)
    assert f"began on {first} (fp32), goes on on {second} (fp32): not bit for bit." in said
    assert not any("device changes" in line for line in said), "said once"
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-3)
    body = json.loads((tmp_path / "run" / "run.json").read_text())
    assert body["resumed"][0]["changed"]["device"] == [first, second]
    assert body["train"]["device"] == second and body["resumed"][0]["place"]["device"].startswith(second)


def test_the_same_device_again(tokens, tmp_path) -> None:
    with pretending():
        go(tokens, tmp_path / "run", 3, device="cuda")
        _, said = go(tokens, tmp_path / "run", 6, resume=True, device="cuda")
    assert any("to rounding, not bit for bit" in line for line in said), said
    go(tokens, tmp_path / "here", 3)
    _, said = go(tokens, tmp_path / "here", 6, resume=True)
    assert not any("bit" in line for line in said), "on a CPU it is bit for bit"


def test_another_precision_is_said(tokens, tmp_path) -> None:
    go(tokens, tmp_path / "run", 3, dtype="bf16")
    _, said = go(tokens, tmp_path / "run", 6, resume=True)
    assert "began on cpu (bf16), goes on on cpu (fp32): not bit for bit." in said


def test_a_checkpoint_from_before_says_where_it_was() -> None:
    old = {"arithmetic": "cuda, 8 threads, torch 2.10", "config": {"dtype": "bf16"}}
    assert began(old) == ("cuda", "bf16")
    assert began({"place": {"device": "cuda:1", "dtype": "fp32"}}) == ("cuda", "fp32")


# ---- room


def test_a_batch_without_room_is_refused_with_one_that_fits(tokens) -> None:
    row = Batch(torch.zeros(1, 32, dtype=torch.long), torch.zeros(1, 32, dtype=torch.long))
    with pretending(free=200 * 2**20):
        lm = LM(MODEL).to(CUDA).train()
        need = step_need(lm, row)
        assert need.fixed_bytes > 12 * sum(p.numel() for p in lm.parameters())
        assert need.row_bytes > 3 * 4 * 265 * 32, "the logits and their gradients"
        big = TrainConfig(steps=1, batch=10**6, seq=32)
        with pytest.raises(
            UsageError, match=r"210 MB of memory that are free on cuda:0 \(Pretend\).*pass batch="
        ) as no:
            check_room(lm, row, big)
        most = int(str(no.value).partition("batch=")[2].partition(";")[0])
        check_room(lm, row, TrainConfig(steps=1, batch=most, seq=32))
        with pytest.raises(UsageError, match="pass batch="):
            check_room(lm, row, TrainConfig(steps=1, batch=most + 1, seq=32))


def test_running_out_of_memory_says_what_would_fit(tokens, tmp_path, monkeypatch) -> None:
    def full(self, step, lr):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    monkeypatch.setattr(Step, "run", full)
    with pytest.raises(TrainingError, match=r"batch=2, seq=32 \(CUDA out of memory.*pass batch=1, with accumulate=4"):
        go(tokens, tmp_path / "run")
