import errno
import hashlib
import os
from pathlib import Path

import pytest

from turnout.errors import StorageError
from turnout.storage import digest, read_error, write_whole


@pytest.mark.parametrize("content", ["text, naïve", b"\x00\xff", lambda path: path.write_bytes(b"made")])
def test_content_of_every_kind(content, tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_whole(path, content)
    expected = content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else b"made"
    assert path.read_bytes() == expected
    write_whole(str(path), "again")
    assert path.read_text() == "again"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_what_a_library_writes_is_as_readable_as_the_rest(tmp_path):
    """safetensors makes files that only their owner may read."""
    import torch
    from safetensors.torch import save_file

    write_whole(tmp_path / "text", "text")
    write_whole(tmp_path / "tensors", lambda path: save_file({"x": torch.zeros(1)}, path))
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode


def broken(error: Exception):
    def write(aside: Path) -> None:
        aside.write_text("half")
        raise error

    return write


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("defect")])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(error, tmp_path):
    path = tmp_path / "file"
    write_whole(path, "before")
    with pytest.raises((StorageError, RuntimeError)):
        write_whole(path, broken(error))
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_leaves_no_half_written_file(tmp_path):
    def interrupted(aside: Path) -> None:
        aside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_whoever_reports_it(tmp_path):
    """safetensors raises an error of its own, with the system's number in its text."""
    from safetensors import SafetensorError

    system = OSError(errno.ENOSPC, "No space left on device")
    other = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (system, other):
        with pytest.raises(StorageError, match="free some space") as caught:
            write_whole(tmp_path / "file", broken(error))
        assert str(tmp_path / "file") in str(caught.value)


def test_safetensors_on_a_disk_that_takes_no_more(tmp_path):
    """The limit on a file's size stands in for the full disk: the library meets it in the same place."""
    resource = pytest.importorskip("resource")
    import torch
    from safetensors.torch import save_file

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match="too large"):
            write_whole(tmp_path / "file", lambda aside: save_file({"a": torch.zeros(100_000)}, aside))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="be a file"):
        write_whole(tmp_path / "folder", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"it is a file|parents is a file"):
        write_whole(tmp_path / "file" / "below", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="accessible"):
        write_whole(tmp_path / "locked" / "file", "x")


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "another folder"),
        (errno.ENOENT, "spelling"),
        (errno.EIO, "system's message"),
        (None, "system's message"),
    ],
)
def test_system_errors_are_worded(number, fix):
    error = OSError(number, "why") if number else OSError("why")
    message = str(read_error(error, "some/path", "here"))
    assert fix in message and "some/path" in message and "why" in message


def test_digest_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert digest(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
