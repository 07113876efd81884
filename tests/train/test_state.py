"""Checkpoints: whole or not there; damage is named; nothing of the old is lost."""

import errno
import json
import os
import random

import pytest
import torch
from stand_in import Tiny
from torch import nn

from turnout.errors import CheckpointError, StorageError
from turnout.train import state
from turnout.train.step import adamw


def trained(seed=0, steps=2):
    model = Tiny(seed=seed)
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(steps):
        output = model(torch.arange(8).view(2, 4))
        (output.logits_BSV.square().mean() + output.routings[0].score_TE.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.router.bias_E += seed + 1
    return model, optimizer


def saved(folder, step=4, **options):
    model, optimizer = trained()
    state.save(folder, step, model, optimizer, {"note": [1, 2.5]}, keep=options.pop("keep", 2))
    return model, optimizer


def test_everything_comes_back_bit_for_bit(tmp_path):
    model, optimizer = saved(tmp_path)
    other, again = trained(seed=1, steps=1)
    body = state.load(tmp_path / "step-00000004", other, again)
    assert (body["step"], body["note"]) == (4, [1, 2.5])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for old, new in zip(optimizer.param_groups, again.param_groups, strict=True):
        for p, q in zip(old["params"], new["params"], strict=True):
            assert optimizer.state[p].keys() == again.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(optimizer.state[p][key], again.state[q][key]) for key in optimizer.state[p])


def test_state_comes_back_in_the_strides_of_its_parameter(tmp_path):
    """Fused AdamW on the CPU reads the memory of parameter and state side by side."""

    def stepped(model, optimizer):
        model.weight.grad = torch.empty_like(model.weight).copy_(torch.arange(12.0).view(3, 4) - 5)
        optimizer.step()
        return model.weight.detach().clone()

    def fresh():
        model = nn.Linear(4, 3, bias=False)
        model.weight = nn.Parameter(torch.arange(12.0).view(4, 3).t())
        optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
        optimizer.param_groups[0]["lr"] = 0.1
        return model, optimizer

    model, optimizer = fresh()
    stepped(model, optimizer)
    state.save(tmp_path, 1, model, optimizer, {}, keep=1)
    other, again = fresh()
    state.load(tmp_path / "step-00000001", other, again)
    assert torch.equal(stepped(other, again), stepped(model, optimizer))


def test_tied_weights_stay_tied_and_are_kept_once(tmp_path):
    from safetensors import safe_open

    saved(tmp_path)
    model, optimizer = trained(seed=1)
    state.load(tmp_path / "step-00000004", model, optimizer)
    assert model.head.weight is model.embed.weight
    with safe_open(tmp_path / "step-00000004/model.safetensors", framework="pt") as file:
        assert "head.weight" not in file.keys()


def test_an_optimizer_without_state_is_kept_too(tmp_path):
    model = Tiny()
    state.save(tmp_path, 0, model, adamw(model, weight_decay=0.1, betas=(0.9, 0.95)), {}, keep=1)
    other, optimizer = trained(seed=1)
    state.load(tmp_path / "step-00000000", other, optimizer)
    assert not optimizer.state


def test_only_the_last_ones_are_kept(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 10, 11):
        state.save(tmp_path, step, model, optimizer, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damage_is_found_and_the_file_is_named(tmp_path, name, harm):
    saved(tmp_path)
    path = tmp_path / "step-00000004" / name
    seed = random.randrange(2**32)
    content = bytearray(path.read_bytes())
    if harm == "flip":
        # In the manifest only a digest or size matters, so flip a bit of one of those.
        place = (
            content.index(b'"sha256"') + 12 if name == "manifest.json" else random.Random(seed).randrange(len(content))
        )
        content[place] ^= 1
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    wrong = state.damage(tmp_path / "step-00000004")
    assert wrong is not None, f"seed {seed}"
    assert name in wrong or (name == "manifest.json" and harm == "flip"), f"seed {seed}: {wrong}"
    with pytest.raises(CheckpointError, match="step-00000004"):
        state.choose(tmp_path, "latest")


def test_a_damaged_one_offers_the_last_whole_one_and_never_takes_it(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 3):
        state.save(tmp_path, step, model, optimizer, {}, keep=3)
    (tmp_path / "step-00000003/model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000002/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000003: model.safetensors .*--resume step-00000001"):
        state.choose(tmp_path, "latest")
    assert state.choose(tmp_path, "step-00000001") == tmp_path / "step-00000001"
    (tmp_path / "step-00000001/state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no other checkpoint here is whole"):
        state.choose(tmp_path, "latest")


def test_an_unknown_name_lists_what_there_is(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000004.*got step-7.*resume from step-00000004"):
        state.choose(tmp_path, "step-7")
    with pytest.raises(CheckpointError, match="none"):
        state.choose(tmp_path / "nothing", "step-7")
    assert state.choose(tmp_path / "nothing", "latest") is None


def test_another_model_is_refused_and_left_alone(tmp_path):
    saved(tmp_path)
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"weight is \(2, 2\).*weight is absent"):
        state.load(tmp_path / "step-00000004", model, torch.optim.AdamW(model.parameters()))
    assert torch.equal(model.weight, before)


def test_a_full_disk_leaves_the_old_ones_whole(tmp_path, monkeypatch):
    model, optimizer = saved(tmp_path)
    whole, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"step-00000005.*No space left.*free some space"):
        state.save(tmp_path, 5, model, optimizer, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    assert state.damage(tmp_path / "step-00000004") is None


def test_saving_a_step_again_keeps_the_other_one_aside(tmp_path):
    model, optimizer = saved(tmp_path)
    for _ in range(2):
        state.save(tmp_path, 4, model, optimizer, {"note": "new"}, keep=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000004", "step-00000004.replaced", "step-00000004.replaced-2"]
    assert json.loads((tmp_path / "step-00000004/state.json").read_text())["note"] == "new"


def test_clean_removes_what_a_killed_process_left(tmp_path):
    saved(tmp_path)
    (tmp_path / "step-00000008.part").mkdir()
    (tmp_path / "step-00000008.part/model.safetensors").write_bytes(b"half")
    assert [path.name for path in state.find(tmp_path)] == ["step-00000004"]
    state.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
