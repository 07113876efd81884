"""A file that is read a tensor at a time: mapped anew as it goes, and the same file to the end."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from turnout.errors import CheckpointError
from turnout.models.checkpoint import mapped
from turnout.models.checkpoint.own import opened


@pytest.mark.parametrize("once", [1, 40, 1 << 20])
def test_tensors_are_what_was_written_however_often_it_is_mapped(
    once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_ONCE", once)
    tensors = {f"t{n}": torch.arange(n * 5).view(n, 5).float() for n in range(6)}
    save_file(tensors, tmp_path / "x.safetensors")
    with opened(tmp_path / "x.safetensors") as file:
        assert file.keys() == sorted(tensors)
        found = {name: file.get_tensor(name) for name in file.keys()}  # held: earlier mappings stay for them
        assert file.get_slice("t3").get_shape() == [3, 5] and file.get_slice("t3").get_dtype() == "F32"
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_ONCE", 1)
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(4)}, path)
    with pytest.raises(CheckpointError, match="changed while it was read"), opened(path) as file:
        file.get_tensor("a")
        save_file({"a": torch.ones(3), "b": torch.ones(4)}, tmp_path / "y")
        (tmp_path / "y").replace(path)
        file.get_tensor("b")
