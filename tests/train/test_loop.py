"""The whole loop: what it leaves, how it resumes, how it fails."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clocks import set_clock
from stand_in import Tiny, exact, lines, run, tiny_config, tiny_tokens

from turnout.errors import CheckpointError, Interrupted, MissingExtraError, StorageError, TrainingError, UsageError
from turnout.train import loop, train
from turnout.train.progress import Lines
from turnout.train.step import Step

PROGRAM = Path(__file__).with_name("stand_in.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = run(out)
    return out, result


def stop_after(monkeypatch, step, error):
    """Raises the error when ``step`` steps are done."""
    before = Step.run

    def stopping(self, number, lr):
        if number == step:
            raise error
        before(self, number, lr)

    monkeypatch.setattr(Step, "run", stopping)


def test_the_folder_is_as_documented(whole):
    out, result = whole
    records = lines(out)
    assert [(record["kind"], record["step"]) for record in records] == [
        *(
            ("train", 1),
            ("train", 3),
            ("eval", 5),
            ("train", 6),
            ("train", 9),
            ("eval", 10),
            ("train", 12),
            ("eval", 12),
        )
    ]
    first, evaluated = records[0], records[2]
    keys = ["kind", "step", "tokens", "seconds", "peak_memory_bytes"]
    assert list(evaluated)[:5] == keys
    assert list(first) == [*keys, "loss", "lr", "grad_norm", "tokens_per_s", "aux_loss", "z_loss", "penalty", "max_vio"]
    assert first["tokens"] == 64 and first["lr"] == tiny_config().lr_at(0)
    assert {"tokens", "bits_per_byte", "by_domain", "load", "max_vio", "entropy", "dropped"} <= set(evaluated)
    assert sum(evaluated["load"][0]) == pytest.approx(1) and set(evaluated["by_domain"]) == {"even", "odd"}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert json.loads((out / "run.json").read_text())["train"]["steps"] == 12
    assert not (out / "error.txt").exists()
    assert (result.steps, result.loss) == (12, records[-2]["loss"])
    assert [dict(one) for one in result.evaluations] == [record for record in records if record["kind"] == "eval"]
    assert result.tokens_per_s > 0 and result.seconds > 0 and result.peak_memory_bytes > 10**6


def test_a_dense_model_has_no_load(tmp_path):
    train(Tiny(moe=False), tiny_tokens(), tiny_config(steps=2), tmp_path / "run", quiet=True)
    first, *_, last = lines(tmp_path / "run")
    assert first["aux_loss"] is first["z_loss"] is first["max_vio"] is None
    assert last["load"] == [] and last["max_vio"] is None


def test_it_learns(tmp_path):
    result = run(tmp_path / "run", steps=150, checkpoint_every=150, lr=0.03)
    assert result.evaluations[-1]["bits_per_byte"] < 0.5 * result.evaluations[0]["bits_per_byte"]


def test_the_caller_keeps_its_random_numbers_and_training_mode(tmp_path):
    model = Tiny().eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, tiny_tokens(), tiny_config(steps=1), tmp_path / "run", quiet=True)
    assert torch.equal(torch.rand(3), expected) and not model.training


@pytest.mark.parametrize("steps", range(1, 12))
def test_resuming_after_any_step_is_exact(tmp_path, monkeypatch, whole, steps):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, steps, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(out, checkpoint_every=3)
    result = run(out, resume=True)
    assert exact(out) == exact(whole[0])
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = "checkpoints/step-00000012"
        assert (out / last / name).read_bytes() == (whole[0] / last / name).read_bytes()
    assert [e["bits_per_byte"] for e in result.evaluations] == [e["bits_per_byte"] for e in whole[1].evaluations]


def test_time_adds_up_over_the_pieces_and_leaves_the_pause_out(tmp_path, monkeypatch):
    run(tmp_path, steps=8)
    first = lines(tmp_path)
    set_clock(monkeypatch, loop, monotonic=lambda: time.monotonic() + 1000)  # the pause
    result = run(tmp_path, resume=True, steps=12)
    both = [record["seconds"] for record in lines(tmp_path)]
    assert both == sorted(both) and both[: len(first)] == [record["seconds"] for record in first]
    assert first[-1]["seconds"] < both[-1] <= result.seconds < 1000
    peaks = [record["peak_memory_bytes"] for record in lines(tmp_path)]
    assert peaks == sorted(peaks) and result.peak_memory_bytes >= peaks[-1]


def test_the_peak_of_an_earlier_process_stays(tmp_path):
    run(tmp_path, steps=4)
    path = tmp_path / "metrics.jsonl"
    records = [record | {"peak_memory_bytes": 10**15} for record in lines(tmp_path)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run(tmp_path, resume=True, steps=8).peak_memory_bytes == 10**15


def test_evaluating_and_logging_do_not_touch_the_weights(tmp_path, whole):
    run(tmp_path / "run", eval_every=1, log_every=1)
    name = "checkpoints/step-00000012/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes()


def test_resuming_a_finished_run_changes_nothing(tmp_path, whole):
    run(tmp_path / "run")
    before = exact(tmp_path / "run")
    result = run(tmp_path / "run", resume=True)
    assert exact(tmp_path / "run") == before
    assert (result.steps, result.loss, result.tokens_per_s) == (12, whole[1].loss, 0.0)


def test_resuming_from_a_named_checkpoint_keeps_later_ones_aside(tmp_path, whole, capsys):
    out = tmp_path / "run"
    run(out)
    train(Tiny(), tiny_tokens(), tiny_config(), out, resume="step-00000008", progress=Lines())
    assert exact(out) == exact(whole[0])
    assert (out / "checkpoints/step-00000012.replaced").is_dir()
    said = capsys.readouterr().err
    assert "resuming" in said and "step-00000012.replaced" in said


def test_resuming_keeps_run_json_and_says_how_it_was_resumed(tmp_path):
    out = tmp_path / "run"
    model, tokens, config = Tiny(), tiny_tokens(), tiny_config()
    train(model, tokens, config, out, run_json={"recipe": "tiny", "command": "a"}, quiet=True)
    longer = tiny_config(steps=14, eval_every=3)
    train(model, tokens, longer, out, resume=True, run_json={"recipe": "tiny", "command": "b"}, quiet=True)
    body = json.loads((out / "run.json").read_text())
    assert body["train"]["steps"] == 14
    assert body["resumed"] == [{"step": 12, "command": "b", "changed": {"steps": [12, 14]}, "place": body["place"]}]
    assert lines(out)[-1]["step"] == 14


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("batch", 3), ("seq", 8), ("accumulate", 1), ("steps", 4)])
def test_what_must_not_change_is_refused(tmp_path, name, value):
    run(tmp_path / "run", steps=5)
    with pytest.raises(UsageError, match=rf"^{name} must .*pass {name}="):
        run(tmp_path / "run", resume=True, **{"steps": 5, name: value})


def test_other_text_is_refused(tmp_path):
    run(tmp_path / "run", steps=1)
    tokens = tiny_tokens()
    tokens.digest = "other"
    with pytest.raises(UsageError, match="tokens_digest must stay 'stand-in'"):
        train(Tiny(), tokens, tiny_config(steps=1), tmp_path / "run", resume=True, quiet=True)


def test_a_damaged_checkpoint_is_not_skipped_in_silence(tmp_path, whole):
    out = tmp_path / "run"
    run(out)
    path = out / "checkpoints/step-00000012/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors was altered.*--resume step-00000008"):
        run(out, resume=True)
    assert "CheckpointError" in (out / "error.txt").read_text()
    run(out, resume="step-00000008")
    assert exact(out) == exact(whole[0])
    assert not (out / "error.txt").exists()


def test_another_run_is_not_written_over(tmp_path):
    run(tmp_path / "run", steps=1)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(UsageError, match="holds a run"):
        run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_loss_that_is_not_finite_loses_nothing(tmp_path, monkeypatch, whole):
    out = tmp_path / "run"

    class Bad(Tiny):
        def forward(self, id_BS, *, generator=None):
            self.calls = getattr(self, "calls", 0) + 1
            output = super().forward(id_BS, generator=generator)
            output.logits_BSV = output.logits_BSV * (float("nan") if self.calls == 16 and self.training else 1)
            return output

    with pytest.raises(TrainingError, match=r"step \d+ with lr .*loss nan.*step-00000004 is saved.*--resume"):
        train(Bad(), tiny_tokens(), tiny_config(), out, quiet=True)
    text = (out / "error.txt").read_text()
    assert "step     " in text and "Traceback" in text
    run(out, resume=True)
    assert exact(out) == exact(whole[0])


@pytest.mark.parametrize("allowed", [0, 3, 20, 33])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, whole, allowed):
    out, calls = tmp_path / "run", 0
    whole_fsync = os.fsync

    def full(handle):
        nonlocal calls
        calls += 1
        if calls > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole_fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left") as caught:
            run(out)
    assert any("error.txt could not be written" in note for note in caught.value.__notes__)
    if allowed > 3:
        assert "Stopped at step" in str(caught.value)
    run(out, resume=(out / "run.json").exists())
    assert exact(out) == exact(whole[0])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_really_full_disk_loses_nothing(tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=44k", "none", str(disk)], check=False).returncode:
        pytest.skip("may not mount here")
    try:
        with pytest.raises(StorageError, match=r"free some space.*Stopped at step 8 of 12; step-00000004 is saved"):
            run(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        run(disk / "run", resume=True)
        assert exact(disk / "run") == exact(whole[0])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_tensorboard_missing_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match="tensorboard"):
        train(Tiny(), tiny_tokens(), tiny_config(), tmp_path / "run", tensorboard=True, quiet=True)
    assert not (tmp_path / "run/run.json").exists()


def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path, monkeypatch, whole, capsys):
    out = tmp_path / "run"
    before = Step.run

    def interrupting(self, number, lr):
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        before(self, number, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "run", interrupting)
        with pytest.raises(Interrupted, match=r"SIGINT after step 7 of 12.*turnout train --resume --out"):
            train(Tiny(), tiny_tokens(), tiny_config(), out, progress=Lines())
    assert "finishing this step" in capsys.readouterr().err
    assert (out / "checkpoints/step-00000007").is_dir() and not (out / "error.txt").exists()
    run(out, resume=True)
    assert exact(out) == exact(whole[0])


# ---- with processes of their own


def program(*arguments):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def start(out, *, resume=False, step_ms=30):
    return program("slow", out, "resume" if resume else "new", step_ms)


def wait_for(child, step):
    for line in child.stdout:
        if line == f"step {step}\n":
            return
    raise AssertionError(child.stderr.read())


def end(child):
    _, error = child.communicate(timeout=300)
    return child.returncode, error


@pytest.mark.slow
def test_killed_before_every_disk_operation_and_resumed(tmp_path):
    child = program("sweep", tmp_path)
    said, error = child.communicate(timeout=300)
    assert child.returncode == 0, error
    *wrong, last = said.splitlines()
    assert wrong == [] and int(last.split()[1]) > 50


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(tmp_path):
    assert end(program("whole", tmp_path / "whole"))[0] == 0
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    child, out = start(tmp_path / "run"), tmp_path / "run"
    for _ in range(3):
        child.stdout.readline()
        time.sleep(draw.uniform(0, 0.6))
        child.kill()
        assert end(child)[0] == -signal.SIGKILL, f"seed {seed}"
        child = start(out, resume=(out / "run.json").exists(), step_ms=10)
    code, error = end(child)
    assert code == 0, f"seed {seed}: {error}"
    assert exact(out) == exact(tmp_path / "whole"), f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_from_outside_save(tmp_path, number):
    child = start(tmp_path / "run")
    wait_for(child, 6)
    child.send_signal(number)
    code, error = end(child)
    assert code == 1 and "Interrupted: stopped by" in error
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) >= 2


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path):
    child = start(tmp_path / "run", step_ms=20_000)
    wait_for(child, 0)
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    code, error = end(child)
    assert code == -signal.SIGINT or "KeyboardInterrupt" in error
    assert not list((tmp_path / "run/checkpoints").glob("*"))


# ---- with the language model


@pytest.mark.parametrize(
    ("router", "dtype"),
    [
        ("LossFree", "fp32"),
        ("NoisyTopK", "fp32"),
        ("TopK", "bf16"),
        ("DenseToSparse", "fp32"),
        ("PreGate", "fp32"),
    ],
)
def test_the_language_model_resumes_exactly(tmp_path, monkeypatch, router, dtype):
    from turnout.models.lm import LM, LMConfig, MoEConfig

    options = {"DenseToSparse": {"steps": 4}, "PreGate": {"width": 8, "layers": 1}}.get(router, {})
    moe = MoEConfig(num_experts=4, top_k=2, hidden=16, router=router, router_options=options)
    network = LMConfig(vocab_size=32, width=16, layers=2, heads=2, hidden=32, max_seq=16, tie_embeddings=True, moe=moe)
    config = tiny_config(dtype=dtype, aux_weight=0.0 if router == "LossFree" else 0.01, steps=6, checkpoint_every=2)

    def go(out, **options):
        return train(LM(network, seed=0), tiny_tokens(), config, out, quiet=True, **options)

    go(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run")
    go(tmp_path / "run", resume=True)
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")
    last = "checkpoints/step-00000006/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
