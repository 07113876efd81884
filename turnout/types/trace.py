"""Trace: the recorded routings of many documents over all layers, columnar, versioned and memory-mapped."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from turnout.errors import CheckpointError, ShapeError, UsageError, nearest, word
from turnout.reading import check_fields, check_link, plain_name, read_json
from turnout.storage import check_seal, digest
from turnout.types.routing import Routing

FORMAT = "turnout.trace/2"
# name -> dtype of the columns; "L" columns exist once per layer. Little-endian, no padding, one file each.
LAYER_COLUMNS = {"start": "<i8", "expert": "<u2", "weight": "<f4"}
DOCUMENT_COLUMNS = {"document": "<i8", "domain": "<u2"}
_HEAD = {
    "format": Literal[FORMAT],
    "columns": dict[str, dict],
    "num_experts_L": list[int],
    "layers": list[str],
    "domains": list[str],
    "num_tokens": int,
    "num_documents": int,
    "has_token_ids": bool,
    "context": dict[str, Any],
}


def _corrupt(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        word(
            "the trace",
            got=f"{path} ({problem})",
            allowed=f"be a whole {FORMAT} folder",
            where="Trace.open",
            fix="record it again; a trace without its trace.json was never finished",
        )
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """A recorded sequence of routings: for every token and layer, which experts ran and with which weight.

    On disk it is a folder of flat little-endian columns beside ``trace.json``, which is written last, so that a
    half-written folder never passes for a trace. ``document`` holds the first token of each document (N + 1),
    ``domain`` the domain of each document (N), and per layer ``start`` the first entry of each token (T + 1),
    ``expert`` and ``weight`` the entries in token order. ``trace.json`` has the size and SHA-256 of every column, which
    ``open`` compares: it reads everything once, about a gigabyte a second. Columns are then mapped, not held.
    Token ids are left out unless asked for, because routes and ids together give the text away.

    Args:
        path: the folder.
        num_experts_L: experts in each routed layer.
        layers: the name of each routed layer.
        domains: the names that the ``domain`` column points to.
        num_tokens: T, over all documents.
        num_documents: N.
        has_token_ids: whether the ``token_id`` column was recorded.
        context: what the recorder wanted remembered (model, tokenizer, seed); JSON values.

    >>> import tempfile
    >>> from turnout.types import TraceWriter
    >>> routing = Routing.from_topk(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
    >>> folder = tempfile.mkdtemp() + "/trace"
    >>> with TraceWriter(folder, num_experts_L=[2], domains=["code"]) as writer:
    ...     writer.add([routing], document_tokens=[2], document_domains=[0])
    >>> trace = Trace.open(folder)
    >>> trace.num_tokens, trace.routing(0).load_E.tolist()
    (2, [1, 1])

    Source: none; the layout follows the flat-column habit of Apache Arrow, without its framing.
    """

    path: Path
    num_experts_L: tuple[int, ...]
    layers: tuple[str, ...]
    domains: tuple[str, ...]
    num_tokens: int
    num_documents: int
    has_token_ids: bool
    context: Mapping[str, object]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The trace in this folder, after the sizes and hashes of all its columns are checked.

        Raises:
            CheckpointError: the folder is not a finished trace, or a column is missing, truncated or altered.
        """
        path = Path(path)
        refuse = functools.partial(_corrupt, path)
        try:
            head = read_json(path / "trace.json", refuse=refuse, finite=False)
        except OSError as error:
            raise _corrupt(path, str(error)) from error
        if head.get("format") != FORMAT:
            raise refuse(f"format {head.get('format')!r:.40}")
        check_fields(head, _HEAD, refuse)
        check_seal(head, refuse)
        for name, column in head["columns"].items():
            check_fields(column, {"bytes": int, "sha256": str}, functools.partial(_corrupt, path / name))
            check_link(path / plain_name(name, refuse), refuse)
            found = (path / name).stat().st_size if (path / name).is_file() else -1
            if found != column["bytes"]:
                raise refuse(f"column {name} has {found} bytes, not {column['bytes']}")
        trace = cls(
            path,
            tuple(head["num_experts_L"]),
            tuple(head["layers"]),
            tuple(head["domains"]),
            head["num_tokens"],
            head["num_documents"],
            head["has_token_ids"],
            head["context"],
        )
        problem = trace._problem({name: column["bytes"] for name, column in head["columns"].items()})
        for name, column in {} if problem else head["columns"].items():
            if digest(path / name) != column["sha256"]:
                problem = f"column {name} was altered: its SHA-256 is not the one in trace.json"
        if problem:
            raise refuse(problem)
        return trace

    def _problem(self, byte_of: Mapping[str, int]) -> str | None:
        """Where the columns do not have the lengths that trace.json says; reads two numbers a layer."""
        if len(self.layers) != self.num_layers:
            return f"{len(self.layers)} names for {self.num_layers} layers"
        wanted = {"document.bin": 8 * (self.num_documents + 1), "domain.bin": 2 * self.num_documents}
        if self.has_token_ids:
            wanted["token_id.bin"] = 4 * self.num_tokens
        for layer in range(self.num_layers):
            entries = byte_of.get(f"expert.{layer:03d}.bin", 0) // 2
            wanted |= {f"start.{layer:03d}.bin": 8 * (self.num_tokens + 1), f"expert.{layer:03d}.bin": 2 * entries}
            wanted[f"weight.{layer:03d}.bin"] = 4 * entries
        if byte_of != wanted:
            return f"columns of {byte_of} bytes, not {wanted}"
        for layer in range(self.num_layers):
            if int(self.column("start", layer)[-1]) != len(self.column("expert", layer)):
                return f"layer {layer} ends at entry {int(self.column('start', layer)[-1])}"
        return None if int(self.document_N[-1]) == self.num_tokens else f"documents end at {int(self.document_N[-1])}"

    @property
    def num_layers(self) -> int:
        """L, the number of routed layers."""
        return len(self.num_experts_L)

    def column(self, name: str, layer: int | None = None) -> np.ndarray:
        """A column, memory-mapped and read-only.

        Args:
            name: ``document`` (N + 1) or ``domain`` (N) or ``token_id`` (T) without a layer; ``start`` (T + 1),
                ``expert`` (R) or ``weight`` (R) with one.
            layer: which routed layer, from 0.

        Raises:
            UsageError: there is no such column.
        """
        columns = LAYER_COLUMNS if layer is not None else DOCUMENT_COLUMNS
        dtype = columns.get(name) or ("<u4" if name == "token_id" and layer is None and self.has_token_ids else None)
        if dtype is None or (layer is not None and not 0 <= layer < self.num_layers):
            allowed = "be document, domain, or token_id when recorded, or start, expert, weight of a layer"
            raise UsageError(
                word(
                    "the column",
                    got=f"{name!r} of layer {layer}",
                    allowed=f"{allowed} below {self.num_layers}",
                    where="Trace.column",
                    fix="record token ids with token_ids=True, or name a routed layer",
                )
            )
        file = self.path / (f"{name}.bin" if layer is None else f"{name}.{layer:03d}.bin")
        if file.stat().st_size == 0:
            return np.empty(0, dtype)
        return np.memmap(file, dtype, mode="r")

    @functools.cached_property
    def document_N(self) -> np.ndarray:
        """(N + 1,) the first token of each document, and T at the end."""
        return self.column("document")

    def routing(self, layer: int, start: int = 0, stop: int | None = None) -> Routing:
        """The routing of tokens ``start`` to ``stop`` in one layer; only that part of the file is read."""
        stop = self.num_tokens if stop is None else stop
        if not 0 <= start <= stop <= self.num_tokens:
            raise ShapeError(
                word(
                    "start and stop",
                    got=f"{start} and {stop}",
                    allowed=f"lie in 0..{self.num_tokens}, in order",
                    where="Trace.routing",
                    fix=f"pass stop={self.num_tokens}",
                )
            )
        start_T = torch.from_numpy(self.column("start", layer)[start : stop + 1].astype(np.int64))
        first, last = int(start_T[0]), int(start_T[-1])
        expert_R = torch.from_numpy(self.column("expert", layer)[first:last].astype(np.int64))
        weight_R = torch.from_numpy(self.column("weight", layer)[first:last].astype(np.float32))
        token_R = torch.repeat_interleave(torch.arange(stop - start), start_T.diff())
        return Routing.from_entries(
            token_R, expert_R, weight_R, num_tokens=stop - start, num_experts=self.num_experts_L[layer]
        )

    def documents(self) -> Iterator[tuple[int, int, str]]:
        """The first token, the end and the domain of each document in turn."""
        bounds, domain_N = self.document_N, self.column("domain")
        for n in range(self.num_documents):
            yield int(bounds[n]), int(bounds[n + 1]), self.domains[int(domain_N[n])]

    def load(self, layer: int, *, domain: str | None = None) -> torch.Tensor:
        """(E,) int64, tokens received by each expert of a layer, over all documents or those of one domain.

        Raises:
            UnknownNameError: there is no such domain.
        """
        expert_R = self.column("expert", layer)
        num_experts = self.num_experts_L[layer]
        if domain is None:
            return torch.from_numpy(np.bincount(expert_R, minlength=num_experts))
        if domain not in self.domains:
            raise nearest(domain, self.domains, kind="domain", where="Trace.load")
        start_T, total_E = self.column("start", layer), np.zeros(num_experts, np.int64)
        for first, last, name in self.documents():
            if name == domain:
                total_E += np.bincount(expert_R[start_T[first] : start_T[last]], minlength=num_experts)
        return torch.from_numpy(total_E)
