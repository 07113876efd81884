"""Zipped weights: every bit comes back, the input is left alone, and what was altered is refused."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from turnout.cli.main import main
from turnout.errors import CheckpointError, StorageError, TurnoutError
from turnout.models import LM, LMConfig, checkpoint
from turnout.models.checkpoint.zipped import END, ZippedFile, plain_or_zipped, unzip, zip_weights
from turnout.models.zipnn.planes import decode, encode, joined, planes
from turnout.storage import sealed

TINY = LMConfig(vocab_size=300, width=32, layers=2, heads=2, hidden=48)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return {
        "bf16": torch.randn(300, 70).bfloat16() * 0.02,
        "every bf16": every.view(torch.bfloat16),
        "every fp16": every.clone().view(torch.float16),
        "fp32": torch.randn(77, 3),
        "was bf16": torch.randn(999).bfloat16().float(),
        "fp64": torch.randn(5).double(),
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "int8": torch.randint(-5, 5, (400,)).to(torch.int8),
        "int64": torch.arange(9),
        "fp8": torch.randn(64).to(torch.float8_e4m3fn),
        "scales": torch.arange(256).to(torch.uint8).view(torch.float8_e8m0fnu),
        "bool": torch.rand(17) > 0.5,
        "zeros": torch.zeros(5000),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_every_bit_comes_back_and_the_input_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turnout.models.checkpoint.zipped._CHUNK", 1 << 12)  # several pieces
    source, zipped, back = tmp_path / "a.safetensors", tmp_path / "a.zipnn", tmp_path / "b.safetensors"
    stored = tensors(0)
    save_file(stored, source, metadata={"format": "pt"})
    before = hashlib.sha256(source.read_bytes()).hexdigest(), source.stat().st_mtime_ns
    source.chmod(0o444)
    done = zip_weights(source, zipped)
    assert before == (hashlib.sha256(source.read_bytes()).hexdigest(), source.stat().st_mtime_ns)
    assert done.before_bytes == source.stat().st_size and done.after_bytes == zipped.stat().st_size
    kept = zipped.read_bytes()
    unzip(zipped, back)
    assert back.read_bytes() == source.read_bytes() and zipped.read_bytes() == kept
    with ZippedFile(zipped) as file:
        assert set(file.keys()) == set(stored) and file.metadata() == {"format": "pt"}
        for name, tensor in stored.items():
            assert file.get_slice(name).get_shape() == list(tensor.shape), name
            found = file.get_tensor(name)
            assert (
                found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(bits(found), bits(tensor))
            )
            found.fill_(0)  # memory of its own
            assert torch.equal(bits(file.get_tensor(name)), bits(tensor))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_planes_hold_exponents_in_the_last(width: int) -> None:
    rng = np.random.default_rng(width)
    byte_N = rng.integers(0, 256, 64 * width, dtype=np.uint8)
    byte_N.flags.writeable = False
    parts = list(planes(byte_N, width))
    assert len(parts) == width and np.array_equal(joined(parts), byte_N)
    if width == 4:
        number = np.frombuffer(byte_N.tobytes(), "<u4")
        assert np.array_equal(parts[3], (number >> 23 & 0xFF).astype(np.uint8))
    if width == 2:
        number = np.frombuffer(byte_N.tobytes(), "<u2")
        assert np.array_equal(parts[1], (number >> 7 & 0xFF).astype(np.uint8))


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_of_any_length(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for width in (1, 2, 4, 8):
        for spread in (1, 3, 256):
            raw = rng.integers(0, spread, width * int(rng.integers(0, 500)), dtype=np.uint8).tobytes()
            assert decode(encode(raw, width), len(raw)).tobytes() == raw, (seed, width, spread)


def test_weights_in_bfloat16_lose_a_third_of_their_bytes() -> None:
    raw = bits((torch.randn(200_000) * 0.02).bfloat16()).numpy().tobytes()
    streams = encode(raw, 2)
    assert [code for code, _ in streams] == ["raw", "huffman"]
    assert sum(len(stream) for _, stream in streams) < 0.68 * len(raw)


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    save_file({"a": torch.randn(500).bfloat16(), "b": torch.zeros(40)}, tmp_path / "a.safetensors")
    zip_weights(tmp_path / "a.safetensors", tmp_path / "a.zipnn")
    return tmp_path / "a.zipnn"


def test_every_flipped_byte_is_seen(zipped: Path, tmp_path: Path) -> None:
    whole = zipped.read_bytes()
    for at in range(0, len(whole), 7):
        zipped.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(TurnoutError):
            unzip(zipped, tmp_path / "b.safetensors")
        assert not (tmp_path / "b.safetensors").exists(), at
    for size in (0, 5, 30, len(whole) // 2, len(whole) - 1):
        zipped.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            unzip(zipped, tmp_path / "b.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "a.zipnn"]


def test_nothing_is_written_over_and_only_safetensors_are_zipped(zipped: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File exists"):
        zip_weights(tmp_path / "a.safetensors", zipped)
    with pytest.raises(StorageError, match="File exists"):
        unzip(zipped, tmp_path / "a.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="be safetensors"):
        zip_weights(tmp_path / "no.safetensors", tmp_path / "no.zipnn")
    with pytest.raises(StorageError, match=r"exist|No such"):
        zip_weights(tmp_path / "gone.safetensors", tmp_path / "no.zipnn")
    assert not (tmp_path / "no.zipnn").exists() and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", ["transformers", "model"])
def test_a_folder_is_zipped_read_and_unzipped_on_the_command_line(
    kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm, folder = LM(TINY).bfloat16().eval(), tmp_path / "m"
    if kind == "transformers":
        checkpoint.to_hf(lm, folder, shard_bytes=20_000)
        assert len(list(folder.glob("*.safetensors"))) > 1
    else:
        checkpoint.save(folder, lm)
    assert main(["convert", str(folder), "--zip", "--out", str(tmp_path / "z"), "--quiet"]) == 0
    assert "% of" in capsys.readouterr().out
    assert not list((tmp_path / "z").glob("*.safetensors")) and list((tmp_path / "z").glob(f"*.safetensors{END}"))
    read = checkpoint.from_hf if kind == "transformers" else checkpoint.load
    found = read(tmp_path / "z")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), read(folder).parameters(), strict=True))
    assert checkpoint.peek(tmp_path / "z").dtype == torch.bfloat16
    assert main(["convert", str(tmp_path / "z"), "--unzip", "--out", str(tmp_path / "u"), "--quiet"]) == 0
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "u").iterdir()} == files
    assert main(["convert", str(folder), "--unzip", "--out", str(tmp_path / "v")]) == 2
    assert "--zip wrote" in capsys.readouterr().err
    assert main(["convert", str(folder), "--zip", "--split", "2", "--top-k", "1", "--out", str(tmp_path / "v")]) == 2
    assert not (tmp_path / "v").exists()


def test_an_altered_weight_of_a_zipped_folder_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", LM(TINY))
    zip_weights(tmp_path / "m" / "model.safetensors", tmp_path / "m" / f"model.safetensors{END}")
    (tmp_path / "m" / "model.safetensors").unlink()
    path = tmp_path / "m" / f"model.safetensors{END}"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"checksum|stream"):
        checkpoint.load(tmp_path / "m")
    keys = json.loads((tmp_path / "m" / "config.json").read_text())
    assert keys["files"]["model.safetensors"]["bytes"] > 0


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(torch.bfloat16, 0.6, 0.68), (torch.float16, 0.8, 0.93), (torch.float32, 0.8, 0.85), (torch.float64, 0.85, 0.95)],
)
def test_what_is_left_of_a_file_in_each_dtype(dtype: torch.dtype, least: float, most: float, tmp_path: Path) -> None:
    drawn = torch.randn(60_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    save_file({"a": (drawn * 0.02).to(dtype)}, tmp_path / "a.safetensors")
    assert least < zip_weights(tmp_path / "a.safetensors", tmp_path / "a.zipnn").share < most


def test_bytes_of_six_bits_are_coded_and_random_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    coded = {most: encode(rng.integers(0, most, 1 << 14, dtype=np.uint8).tobytes(), 1)[0] for most in (64, 256)}
    assert coded[64][0] == "huffman" and len(coded[64][1]) < 0.77 * (1 << 14) and coded[256][0] == "raw"


def test_what_comes_after_a_stream_or_is_missing_of_it_is_refused() -> None:
    raw = bytes(range(16)) * 200
    ((code, stream),) = encode(raw, 1)
    assert code == "huffman" and decode([(code, stream)], len(raw)).tobytes() == raw
    for wrong in (stream + b"\0", stream[:-1]):
        with pytest.raises(CheckpointError, match="a stream must be 3200 bytes"):
            decode([(code, wrong)], len(raw))


def test_tensors_that_lie_in_another_order_than_they_are_named_come_back(tmp_path: Path) -> None:
    entries = {"b": [24, 40], "a": [16, 24], "z": [0, 16]}
    head = {name: {"dtype": "F32", "shape": [(e - s) // 4], "data_offsets": [s, e]} for name, (s, e) in entries.items()}
    text, data = json.dumps(head).encode(), np.arange(10, dtype="<f4").tobytes()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    zip_weights(tmp_path / "a.safetensors", tmp_path / "a.zipnn")
    unzip(tmp_path / "a.zipnn", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    with ZippedFile(tmp_path / "a.zipnn") as file:
        assert file.get_tensor("a").tolist() == [4, 5] and file.in_order() == ["z", "a", "b"]


def test_a_file_that_is_there_is_read_rather_than_its_zipped_twin(zipped: Path, tmp_path: Path) -> None:
    twin = zipped.rename(tmp_path / f"a.safetensors{END}")
    assert plain_or_zipped(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    (tmp_path / "a.safetensors").unlink()
    assert plain_or_zipped(tmp_path / "a.safetensors") == twin


@pytest.mark.parametrize(
    ("key", "value", "sealed_anew", "said"),
    [
        ("sha256_of_file", "0" * 64, True, "another SHA-256 than the file had"),
        ("sha256_of_file", "0" * 64, False, "its content is not what its sha256 says"),
        ("format", "turnout.zipnn/2", True, "of the format"),
        ("chunks", {"a": [], "b": []}, True, "pieces of 0 bytes"),
    ],
)
def test_what_a_file_says_of_itself_is_checked(
    key: str, value: Any, sealed_anew: bool, said: str, zipped: Path, tmp_path: Path
) -> None:
    whole = zipped.read_bytes()
    size = int.from_bytes(whole[-8:], "little")
    body = json.loads(zlib.decompress(whole[-8 - size : -8])) | {key: value}
    if sealed_anew:
        body.pop("sha256")
        body = sealed(body)
    text = zlib.compress(json.dumps(body).encode())
    zipped.write_bytes(whole[: -8 - size] + text + len(text).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match=said):
        unzip(zipped, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists() and not list(tmp_path.glob("*.part"))
