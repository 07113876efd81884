"""TraceWriter: records a Trace, document by document, at flat memory."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch

from turnout.errors import ShapeError, StorageError, UsageError, word
from turnout.storage import create, read_error, sealed, write_whole
from turnout.types.routing import Routing
from turnout.types.trace import DOCUMENT_COLUMNS, FORMAT, LAYER_COLUMNS


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
        self._columns: dict[str, BinaryIO] = {}
        self._sums: dict[str, Any] = {}

    def __enter__(self) -> Self:
        names = [f"{name}.bin" for name in DOCUMENT_COLUMNS] + (["token_id.bin"] if self.token_ids else [])
        for layer in range(len(self.layers)):
            names += [f"{name}.{layer:03d}.bin" for name in LAYER_COLUMNS]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._columns = {name: self._files.enter_context(create(self.path / name)) for name in names}
            self._sums = {name: hashlib.sha256() for name in names}
        except OSError as error:
            self._files.close()
            raise read_error(error, self.path, "TraceWriter") from error
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
            ShapeError: the routings, documents and ids do not fit each other or the writer; nothing was written.
            StorageError: the disk is full or gone.
            UsageError: the writer is not open.
        """
        self._check(routing_L, document_tokens, document_domains, token_id_T)
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
        self.num_tokens += sum(document_tokens)
        self.num_documents += len(document_tokens)

    def _check(
        self,
        routing_L: Sequence[Routing],
        document_tokens: Sequence[int],
        document_domains: Sequence[int],
        token_id_T: torch.Tensor | None,
    ) -> None:
        if not self._columns:
            raise UsageError(
                word(
                    "the writer",
                    got="one that is not open",
                    allowed="be open",
                    where="TraceWriter.add",
                    fix="add inside `with TraceWriter(...) as writer:`",
                )
            )
        tokens = sum(document_tokens)
        fits = (
            len(routing_L) == len(self.layers)
            and all(r.num_tokens == tokens for r in routing_L)
            and all(r.num_experts == e for r, e in zip(routing_L, self.num_experts_L, strict=True))
            and len(document_tokens) == len(document_domains)
            and all(n >= 0 for n in document_tokens)
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

    def _append(self, name: str, values: object, dtype: str) -> None:
        try:
            data = np.ascontiguousarray(values, dtype).tobytes()
            self._columns[name].write(data)
            self._sums[name].update(data)
        except OSError as error:
            raise read_error(error, self.path / name, "TraceWriter") from error

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # what went wrong first is what the user should read
                self._files.close()
            return
        try:
            with self._files:
                self._append("document.bin", [self.num_tokens], "<i8")
                for layer, entries in enumerate(self._entries_L):
                    self._append(f"start.{layer:03d}.bin", [entries], "<i8")
                for file in self._columns.values():
                    file.flush()
                    os.fsync(file.fileno())
        except StorageError:
            raise
        except OSError as error:
            raise read_error(error, self.path, "TraceWriter") from error
        self._finish()

    def _finish(self) -> None:
        head = {
            "format": FORMAT,
            "num_experts_L": self.num_experts_L,
            "layers": self.layers,
            "domains": self.domains,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "has_token_ids": self.token_ids,
            "context": self.context,
            "columns": {
                name: {"bytes": (self.path / name).stat().st_size, "sha256": self._sums[name].hexdigest()}
                for name in self._columns
            },
        }
        write_whole(self.path / "trace.json", json.dumps(sealed(head), indent=2) + "\n")
