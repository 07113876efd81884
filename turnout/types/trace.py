"""Trace: the recorded routings of many documents over all layers, columnar, versioned and memory-mapped."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from turnout.errors import CheckpointError, ShapeError, UsageError, nearest, word
from turnout.storage import write_whole
from turnout.types.routing import Routing

_FORMAT = "turnout.trace/1"
# name -> dtype of the columns; "L" columns exist once per layer. Little-endian, no padding, one file each.
_LAYER_COLUMNS = {"start": "<i8", "expert": "<u2", "weight": "<f4"}
_DOCUMENT_COLUMNS = {"document": "<i8", "domain": "<u2"}


def _corrupt(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        word(
            "the trace",
            got=f"{path} ({problem})",
            allowed=f"be a whole {_FORMAT} folder",
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
    ``expert`` and ``weight`` the entries in token order. Columns are mapped, not read: opening costs nothing.
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
        """The trace in this folder, after the sizes of all its columns are checked.

        Raises:
            CheckpointError: the folder is not a finished trace, or a column is missing or truncated.
        """
        path = Path(path)
        try:
            head = json.loads((path / "trace.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _corrupt(path, str(error)) from error
        if not isinstance(head, dict) or head.get("format") != _FORMAT:
            raise _corrupt(path, f"format {head.get('format') if isinstance(head, dict) else head!r}")
        try:
            for name, size in head["column_bytes"].items():
                found = (path / name).stat().st_size if (path / name).exists() else -1
                if found != size:
                    raise _corrupt(path, f"column {name} has {found} bytes, not {size}")
            return cls(
                path,
                tuple(head["num_experts_L"]),
                tuple(head["layers"]),
                tuple(head["domains"]),
                head["num_tokens"],
                head["num_documents"],
                head["has_token_ids"],
                head["context"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise _corrupt(path, f"trace.json lacks {error}") from error

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
        columns = _LAYER_COLUMNS if layer is not None else _DOCUMENT_COLUMNS
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


class TraceWriter:
    """Records a Trace document by document; a context manager whose clean exit finishes the folder.

    Memory stays flat: each ``add`` appends to the columns on disk. If the block raises, no trace.json is written
    and the folder is not a trace.

    Args:
        path: the folder, which must not hold a trace yet.
        num_experts_L: experts in each routed layer, at most 65,536.
        layers: the name of each routed layer; default "0", "1", ...
        domains: the names of the domains.
        token_ids: record the token ids too. Off by default: routes and ids give the text away.
        context: JSON values to remember.

    Raises:
        UsageError: the folder already holds a trace, or the sizes are out of range.

    >>> import tempfile
    >>> with TraceWriter(tempfile.mkdtemp() + "/t", num_experts_L=[4], domains=["all"]) as writer:
    ...     pass

    Source: none; see Trace.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_experts_L: Sequence[int],
        domains: Sequence[str],
        layers: Sequence[str] | None = None,
        token_ids: bool = False,
        context: Mapping[str, object] | None = None,
    ) -> None:
        self.path = Path(path)
        self.num_experts_L = tuple(int(n) for n in num_experts_L)
        self.layers = tuple(layers or (str(n) for n in range(len(self.num_experts_L))))
        self.domains = tuple(domains)
        self.token_ids = token_ids
        self.context = dict(context or {})
        if (self.path / "trace.json").exists():
            raise UsageError(
                word(
                    "the folder",
                    got=str(self.path),
                    allowed="not hold a trace yet",
                    where="TraceWriter",
                    fix="choose another folder, or remove this one",
                )
            )
        if len(self.layers) != len(self.num_experts_L) or not all(0 < n <= 65536 for n in self.num_experts_L):
            raise UsageError(
                word(
                    "num_experts_L",
                    got=f"{self.num_experts_L} for layers {self.layers}",
                    allowed="have one entry of 1 to 65,536 per layer",
                    where="TraceWriter",
                    fix="give one number of experts per layer name",
                )
            )
        self.num_tokens = 0
        self.num_documents = 0
        self._entries_L = [0] * len(self.layers)
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        names = [f"{name}.bin" for name in _DOCUMENT_COLUMNS] + (["token_id.bin"] if self.token_ids else [])
        for layer in range(len(self.layers)):
            names += [f"{name}.{layer:03d}.bin" for name in _LAYER_COLUMNS]
        self._columns = {name: self._files.enter_context((self.path / name).open("wb")) for name in names}
        return self

    def add(
        self,
        routing_L: Sequence[Routing],
        *,
        document_tokens: Sequence[int],
        document_domains: Sequence[int],
        token_id_T: torch.Tensor | None = None,
    ) -> None:
        """Appends one or more whole documents.

        Args:
            routing_L: one routing per layer, over the tokens of these documents in order.
            document_tokens: tokens in each document; they add up to the tokens of the routings.
            document_domains: the index into ``domains`` of each document.
            token_id_T: (T,) the tokens, when the writer was made with ``token_ids=True``.

        Raises:
            ShapeError: the routings, documents and ids do not fit each other or the writer.
        """
        tokens = sum(document_tokens)
        fits = (
            len(routing_L) == len(self.layers)
            and all(r.num_tokens == tokens for r in routing_L)
            and all(r.num_experts == e for r, e in zip(routing_L, self.num_experts_L, strict=True))
            and len(document_tokens) == len(document_domains)
            and all(0 <= d < len(self.domains) for d in document_domains)
            and (token_id_T is not None and token_id_T.numel() == tokens if self.token_ids else token_id_T is None)
        )
        if not fits:
            raise ShapeError(
                word(
                    "the documents",
                    got=f"{tokens} tokens with {[str(r) for r in routing_L]}",
                    allowed=f"fit layers {self.layers} with {self.num_experts_L} experts and {len(self.domains)} "
                    "domains, with token ids exactly when token_ids=True",
                    where="TraceWriter.add",
                    fix="pass one routing per layer over exactly these documents",
                )
            )
        starts = self.num_tokens + np.concatenate([[0], np.cumsum(document_tokens)[:-1]])[: len(document_tokens)]
        self._append("document.bin", starts, "<i8")
        self._append("domain.bin", document_domains, "<u2")
        if token_id_T is not None:
            self._append("token_id.bin", token_id_T.cpu().numpy(), "<u4")
        for layer, routing in enumerate(routing_L):
            order_R, start_T = (tensor.cpu() for tensor in routing.by_token)
            expert_R = routing.expert_R.cpu()[order_R]
            weight_R = routing.weight_R.detach().float().cpu()[order_R]
            self._append(f"start.{layer:03d}.bin", start_T[:-1].numpy() + self._entries_L[layer], "<i8")
            self._append(f"expert.{layer:03d}.bin", expert_R.numpy(), "<u2")
            self._append(f"weight.{layer:03d}.bin", weight_R.numpy(), "<f4")
            self._entries_L[layer] += routing.num_entries
        self.num_tokens += tokens
        self.num_documents += len(document_tokens)

    def _append(self, name: str, values: object, dtype: str) -> None:
        self._columns[name].write(np.ascontiguousarray(values, dtype).tobytes())

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            self._append("document.bin", [self.num_tokens], "<i8")
            for layer, entries in enumerate(self._entries_L):
                self._append(f"start.{layer:03d}.bin", [entries], "<i8")
            for file in self._columns.values():
                file.flush()
                os.fsync(file.fileno())
        self._files.close()
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        head = {
            "format": _FORMAT,
            "num_experts_L": self.num_experts_L,
            "layers": self.layers,
            "domains": self.domains,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "has_token_ids": self.token_ids,
            "context": self.context,
            "column_bytes": {name: (self.path / name).stat().st_size for name in self._columns},
        }
        write_whole(self.path / "trace.json", json.dumps(head, indent=2) + "\n")
