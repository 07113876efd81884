"""Our own folders: what is written is what is read, bit for bit, and damage is named."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from turnout.errors import CheckpointError, StorageError
from turnout.models import LM, LMConfig, MLAConfig, MoEConfig, checkpoint

TINY = LMConfig(vocab_size=31, width=16, layers=2, heads=2, hidden=24, max_seq=16)
CONFIGS = {
    "dense": TINY,
    "tied": dataclasses.replace(TINY, tie_embeddings=True, qk_norm="head", qkv_bias=True),
    "moe": dataclasses.replace(
        TINY, moe=MoEConfig(4, 2, 8, router="LossFree", layers=(1,), shared_hidden=8, shared_gate=True)
    ),
    "latent": dataclasses.replace(TINY, attention="mla", mla=MLAConfig(4, 4, 4, 4, 6)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_is_read(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    lm = LM(CONFIGS[name], seed=4).to(dtype)
    for router in lm.routers:
        router.after_step(torch.tensor([5, 0, 1, 2]))
    checkpoint.save(tmp_path / "a", lm)
    read = checkpoint.load(tmp_path / "a")
    assert read.config == lm.config and not read.training
    state = lm.state_dict()
    assert list(read.state_dict()) == list(state)
    for key, tensor in read.state_dict().items():
        assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key
    id_BS = torch.arange(12)[None]
    assert torch.equal(read(id_BS).logits_BSV, lm.eval()(id_BS).logits_BSV)
    checkpoint.save(tmp_path / "b", read)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path, LM(TINY))
    return tmp_path


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_weights_are_named(folder: Path, cut: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors of \d+ bytes"):
        checkpoint.load(folder)


def test_one_flipped_bit_is_found(folder: Path) -> None:
    weights = folder / "model.safetensors"
    body = weights.read_bytes()
    for place in (3, 40, len(body) // 2, len(body) - 1):
        flipped = bytearray(body)
        flipped[place] ^= 1
        weights.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"model\.safetensors with another SHA-256"):
            checkpoint.load(folder)


def test_missing_and_foreign_files_are_named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors, which does not exist"):
        checkpoint.load(folder)
    for text, match in (
        ("{", "be JSON"),
        ("[]", "hold an object"),
        ("{}", "turnout.lm/1"),
        ('{"model_type": "llama"}', "from_hf"),
        ('{"format": "turnout.lm/1"}', "be whole"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=match):
            checkpoint.load(folder)
    with pytest.raises(CheckpointError, match=r"hold config\.json"):
        checkpoint.load(tmp_path_factory.mktemp("empty"))


def test_a_configuration_of_other_weights_is_refused(folder: Path) -> None:
    body = json.loads((folder / "config.json").read_text())
    for change, match in (
        ({"layers": 3}, r"missing \(blocks\.2"),
        ({"layers": 1}, "left over"),
        ({"hidden": 32}, r"shape \(48, 16\) for blocks\.0\.ff\.up"),
        ({"heads": 3}, "heads=2"),
        ({"colour": 1}, "colour"),
    ):
        changed = body | {"model": body["model"] | change}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="its content is not what its sha256 says"):
            checkpoint.load(folder)
        del changed["sha256"]  # as whoever edits it by hand is told to
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=match):
            checkpoint.load(folder)


def test_a_failed_write_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("turnout.models.checkpoint.own.save_file", full)
    with pytest.raises(StorageError, match="free some space"):
        checkpoint.save(folder, LM(TINY, seed=1))
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    checkpoint.load(folder)
