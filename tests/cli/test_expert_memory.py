"""``--expert-memory`` and ``--n-cpu-moe`` of commands that run a model."""

from pathlib import Path

import numpy as np
import pytest

from turnout.cli.main import main
from turnout.decide.device import expert_slots
from turnout.decide.device.cache import Learnt
from turnout.errors import UsageError
from turnout.fields import byte_size
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.recipes.expert_room import ExpertRoom
from turnout.train.data import train_tokenizer
from turnout.types import Accesses

EACH = 3 * 16 * 12 * 4  # bytes of an expert


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sample") / "moe"
    sizes = {"vocab_size": 300, "width": 16, "layers": 2, "heads": 2, "max_seq": 64, "init_std": 0.4}
    checkpoint.to_hf(LM(LMConfig(**sizes, moe=MoEConfig(4, 2, 12))), place)
    lines = "\n".join(f"line {n}: the cat and the dog " + " ".join(str(n * k) for k in range(9)) for n in range(40))
    train_tokenizer([lines], vocab_size=300).save(str(place / "tokenizer.json"))
    return place


def said(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = main(["sample", *map(str, argv)])
    return code, *capsys.readouterr()


def test_the_text_is_the_same_and_what_came_of_it_is_said(folder, capsys) -> None:
    drawn = folder, "--prompt", "the cat", "--tokens", "9", "--seed", "3"
    _, whole, silent = said(capsys, *drawn)
    code, few, told = said(capsys, *drawn, "--expert-memory", f"{5 * EACH / 1000}kB")
    assert code == 0 and few == whole and not silent
    understood, done = told.splitlines()
    assert f"{5 * EACH:,} bytes hold 4 of 8 experts of {EACH:,} bytes, 2 of 4 in each of 2 layers" in understood
    assert done.startswith("experts: 4 of 8 experts fit; ") and " misses (" in done
    _, other, told = said(capsys, *drawn, "--expert-memory", 3 * EACH, "--expert-policy", "lfu")
    assert other == whole and "hold 3 of 8 experts" in told and "in each" not in told


def test_policies_that_learnt_change_no_text(folder, tmp_path, capsys) -> None:
    used_SLE = np.random.default_rng(0).random((40, 2, 4)) < 0.5
    Learnt.of(Accesses.of_used(used_SLE, np.arange(40) // 10), seed=0, steps=5).save(tmp_path / "profile")
    drawn = folder, "--prompt", "the cat", "--tokens", "9", "--seed", "3"
    _, whole, _ = said(capsys, *drawn)
    for name in ("static", "trace-matching", "expert_flow", "lfru"):
        few = "--expert-memory", 5 * EACH, "--expert-policy", name, "--expert-profile", tmp_path / "profile"
        code, out, told = said(capsys, *drawn, *few)
        assert code == 0 and out == whole, told
        assert ("has no effect" in told) == (name == "lfru")
    Learnt.of(Accesses.of_used(used_SLE[:, :1], np.arange(40) // 10), seed=0, steps=5).save(tmp_path / "profile")
    code, out, told = said(capsys, *drawn, *few[:2], "--expert-policy", "static", *few[4:])
    assert code == 2 and "--expert-profile must be of 2 layers of 4 experts in turnout sample" in told
    for other in (tmp_path / "nothing", tmp_path, folder / "model.safetensors", folder / "config.json"):
        code, out, told = said(capsys, *drawn, *few[:2], "--expert-policy", "static", "--expert-profile", other)
        assert code == 2 and not out
        assert "--expert-profile must be what turnout cache --save wrote in turnout sample; got " in told


def test_what_is_asked_wrongly_is_said_by_its_flag(folder, capsys) -> None:
    for flags, words in (
        (("--expert-memory", "2 experts"), "--expert-memory must be bytes"),
        (("--expert-memory", EACH), f"{2 * EACH:,} bytes"),
        (("--expert-memory", "1GB", "--expert-policy", "lrv"), "Did you mean 'lru'?"),
        (("--expert-memory", "1GB", "--expert-policy", "static"), "turnout cache TRACE --save FILE"),
        (("--expert-memory", "1GB", "--expert-policy", "static", "--expert-profile", "none"), "--save FILE"),
        (("--expert-memory", "1GB", "--expert-policy", "pre-gated"), "router=PreGate"),
        (("--expert-profile", "none"), "--expert-profile must go with --expert-memory"),
        (("--n-cpu-moe", "-1"), "--n-cpu-moe"),
    ):
        code, out, told = said(capsys, folder, "--prompt", "a", *flags)
        assert code == 2 and not out and words in told, told


def test_layers_whose_experts_stay_with_the_cpu_change_nothing_on_one(folder, capsys) -> None:
    drawn = folder, "--prompt", "the cat", "--tokens", "4", "--temperature", "0"
    _, whole, _ = said(capsys, *drawn)
    code, same, told = said(capsys, *drawn, "--n-cpu-moe", "1")
    assert code == 0 and same == whole and "changes nothing on a CPU" in told


def test_with_an_accelerator_both_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from turnout.recipes import expert_room

    monkeypatch.setattr(expert_room, "find_device", lambda device: torch.device("cuda"))
    for room in (ExpertRoom("1GB"), ExpertRoom(n_cpu_moe=2)):
        with pytest.raises(UsageError, match="go with --device cpu"):
            room.load(tmp_path, "turnout sample", "cuda")


def test_sizes_and_slots() -> None:
    assert [byte_size(size, what="expert_memory", where="here") for size in ("2GB", "0.5 kB", "3 MiB", 7, "12")] == [
        2_000_000_000, 500, 3 << 20, 7, 12,
    ]  # fmt: skip
    for size in ("", "GB", "-1", "2 Gb/s", 0, True, "1.2.3MB"):
        with pytest.raises(UsageError, match="expert_memory"):
            byte_size(size, what="expert_memory", where="here")
    whole = expert_slots("1GB", expert_bytes=10, layers=3, experts=8, top_k=2)
    assert (whole.slots, whole.shared) == (8, False)
    assert expert_slots(59, expert_bytes=10, layers=3, experts=8, top_k=2).shared
