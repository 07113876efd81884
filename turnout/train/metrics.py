"""metrics.jsonl: one JSON object a line, flushed as it is written, rewound to the checkpoint when a run goes on."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turnout.errors import CheckpointError, MissingExtraError
from turnout.reading import check_fields, parse_json, read_lines
from turnout.storage import open_own, read_error, write_whole

__all__ = ["Metrics", "need_tensorboard", "read_metrics", "rewind"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in order; a half line, which a killed process leaves, is not one.

    >>> read_metrics(Path("no/such/metrics.jsonl"))
    []

    Source: none; plain bookkeeping.
    """
    if not path.exists():
        return []
    records = []
    for line in read_lines(path):
        with contextlib.suppress(CheckpointError):
            record = parse_json(line, CheckpointError, finite=False)
            check_fields(record, {"step": int}, CheckpointError)
            records.append(record)
    return records


def rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops every line after ``step`` and every half line from the file, and returns the rest."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


class Metrics:
    """The open metrics.jsonl of one run, and its TensorBoard events when they are asked for.

    Args:
        path: the file; lines are added at its end.
        tensorboard: the folder for TensorBoard events, or None.
        step: the step that the run goes on from; later events in ``tensorboard`` are hidden.

    Raises:
        MissingExtraError: TensorBoard is asked for and not installed.

    Source: none; plain bookkeeping.
    """

    def __init__(self, path: Path, *, tensorboard: Path | None = None, step: int = 0) -> None:
        self.path = path
        self._writer = None
        if tensorboard is not None:
            # purge_step hides what a killed process wrote after its last checkpoint.
            self._writer = need_tensorboard()(str(tensorboard), purge_step=step + 1 if step else None)
        try:
            self._file = open_own(path)
        except OSError as error:
            raise read_error(error, path, "turnout.train") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one line and flushes it, so that a killed process loses at most half of the last one.

        Raises:
            StorageError: the disk is full.
        """
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise read_error(error, self.path, "turnout.train") from error
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
            for domain, value in record.get("by_domain", {}).items():
                self._writer.add_scalar(f"{record['kind']}/bits_per_byte/{domain}", value, record["step"])

    def sync(self) -> None:
        """Puts the lines on the disk: before a checkpoint that counts on them takes its name."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise read_error(error, self.path, "turnout.train") from error

    def close(self) -> None:
        """Closes the file and the events; a disk that is full then has said so already."""
        try:
            self._file.close()
        except OSError:
            pass
        if self._writer is not None:
            self._writer.close()


def need_tensorboard() -> Any:
    """The class that writes TensorBoard events.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "tensorboard=True needs TensorBoard, which is not installed. Nearest fix: "
            "pip install 'turnout[tensorboard]', or leave it out: metrics.jsonl holds the same numbers."
        ) from error
    return SummaryWriter
