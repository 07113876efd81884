"""llama.cpp itself, as the judge of GGUF files and as a peer: logits, and single steps of several streams.

``benchmarks/llama-cpp`` sets it up once. A process that uses it starts as ``command()`` says, because its C library may
be a newer one than this machine's; ``logits`` does so by itself.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

__all__ = ["Llama", "command", "logits", "tokenized", "why_not"]

# The types of a cache, as llama.cpp numbers them.
_TYPES = {"f32": 0, "f16": 1, "bf16": 30}
# As many tokens as it takes at once by default.
_ONCE = 512


def _place() -> Path:
    # As turnout.storage.cache_folder, whose module loads torch: a process that runs llama.cpp has another C library.
    own, cache = os.environ.get("TURNOUT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(cache or Path.home() / ".cache") / "turnout") / "llama-cpp"


def why_not() -> str | None:
    """Why llama.cpp is not here; None where it is."""
    if not (_place() / "site").is_dir():
        return f"no llama.cpp in {_place()}: run benchmarks/llama-cpp once"
    return None


def command() -> tuple[list[str], dict[str, str]]:
    """How a Python that can load llama.cpp starts, and its environment."""
    place, python = _place(), [sys.executable]
    found = sorted((place / "libc").glob("usr/lib/*/ld-linux-*.so.*"))
    if found:
        own = [path for path in ("/lib", "/usr/lib") for path in (f"{path}/{found[0].parent.name}", path)]
        python = [str(found[0]), "--library-path", ":".join([str(found[0].parent), *own]), *python]
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), str(place / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return python, os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def logits(path: str | Path, ids: Sequence[Sequence[int]], *, threads: int = 1) -> list[np.ndarray]:
    """For each text its (S, V) logits, as llama.cpp computes them with a cache in fp32.

    Args:
        path: a GGUF file.
        ids: the tokens of each text.
        threads: how many it may use.

    Raises:
        RuntimeError: it does not load, or fails; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "asked.npz"), Path(folder, "answer.npz")
        np.savez(asked, *[np.asarray(text, np.int32) for text in ids])
        _ask("logits", str(path), str(asked), str(answer), str(threads))
        with np.load(answer) as found:
            return [found[name] for name in found.files]


def tokenized(path: str | Path, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, with what the model puts around it; names of special tokens are read as them.

    Args:
        path: a GGUF file.
        texts: any.

    Raises:
        RuntimeError: as ``logits``.
    """
    return json.loads(_ask("tokenize", str(path), json.dumps(list(texts))))


def _ask(*arguments: str) -> str:
    """What this file prints, run where llama.cpp loads."""
    start, environment = command()
    done = subprocess.run(
        [*start, "-m", "benchmarks.llama_cpp", *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # its log cuts tokens within characters
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp and {arguments[1]}: {done.stderr[-3000:]}")
    return done.stdout


@dataclasses.dataclass(frozen=True)
class _Parts:
    ffi: Any
    lib: Any
    model: Any
    context: Any


class Llama:
    """A model in llama.cpp, with one cache for several streams."""

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 512,
        streams: int = 1,
        threads: int = 1,
        cache: Literal["f32", "f16", "bf16"] = "f16",
    ) -> None:
        """Loads it.

        Args:
            path: a GGUF file.
            context: the tokens that all streams together may have.
            streams: how many.
            threads: how many it may use.
            cache: the type of keys and values; f16 is llama.cpp's default.
        """
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # pyrefly: ignore[missing-import]

        ffi, lib = get_ffi(), get_lib()
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(os.fsencode(path), options)
        if model == ffi.NULL:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._parts, self._ends = _Parts(ffi, lib, model, ffi.NULL), [0]
        self.renew(context=context, streams=streams, threads=threads, cache=cache)
        self.vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))

    def renew(
        self,
        *,
        context: int,
        streams: int,
        threads: int = 1,
        cache: Literal["f32", "f16", "bf16"] = "f16",
        apart: bool = False,
    ) -> None:
        """Begins anew with another cache.

        Args:
            context: the tokens that all streams together may have.
            streams: how many.
            threads: how many it may use.
            cache: the type of keys and values.
            apart: whether each stream has its own share of the cache; at most 512 tokens are then fed at once.
        """
        ffi, lib = self._parts.ffi, self._parts.lib
        if self._parts.context != ffi.NULL:
            lib.llama_free(self._parts.context)
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch = context, min(context, _ONCE) if apart else context
        options.n_ubatch, options.n_seq_max, options.kv_unified = options.n_batch, streams, not apart
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = _TYPES[cache]
        if cache == "f32":  # its attention in one piece sums in fp16
            options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        made = lib.llama_init_from_model(self._parts.model, options)
        self._parts = dataclasses.replace(self._parts, context=made)
        if made == ffi.NULL:
            lib.llama_model_free(self._parts.model)
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens for {streams} streams")
        self._ends = [0] * streams

    def copy_first(self) -> None:
        """Every stream goes on from what the first one has read."""
        lib = self._parts.lib
        memory = lib.llama_get_memory(self._parts.context)
        for stream in range(1, len(self._ends)):
            lib.llama_memory_seq_cp(memory, 0, stream, -1, -1)
        self._ends = [self._ends[0]] * len(self._ends)

    def forget(self, stream: int) -> None:
        """One stream begins anew."""
        lib = self._parts.lib
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._parts.context), stream, -1, -1)
        self._ends[stream] = 0

    def close(self) -> None:
        """Gives its memory back."""
        self._parts.lib.llama_free(self._parts.context)
        self._parts.lib.llama_model_free(self._parts.model)

    def clear(self) -> None:
        """Forgets all streams."""
        lib = self._parts.lib
        lib.llama_memory_clear(lib.llama_get_memory(self._parts.context), True)
        self._ends = [0] * len(self._ends)

    def feed(self, ids: Sequence[Sequence[int]], *, every: bool = False) -> np.ndarray:
        """Goes on with each stream, and gives the logits after its last new token, or after every new one.

        Args:
            ids: the new tokens of each stream, in order.
            every: whether to give all rows.

        Returns:
            (rows, V), stream after stream.
        """
        ffi, lib = self._parts.ffi, self._parts.lib
        total = sum(map(len, ids))
        batch, row, wanted = lib.llama_batch_init(total, 0, 1), 0, []
        try:
            for stream, new in enumerate(ids):
                for place, token in enumerate(new):
                    batch.token[row], batch.pos[row] = int(token), self._ends[stream] + place
                    batch.n_seq_id[row], batch.seq_id[row][0] = 1, stream
                    batch.logits[row] = every or place == len(new) - 1
                    wanted += [row] if batch.logits[row] else []
                    row += 1
                self._ends[stream] += len(new)
            batch.n_tokens = total
            if code := lib.llama_decode(self._parts.context, batch):
                raise RuntimeError(f"llama_decode gave {code}")
            size = self.vocab * 4
            rows = [ffi.buffer(lib.llama_get_logits_ith(self._parts.context, at), size)[:] for at in wanted]
        finally:
            lib.llama_batch_free(batch)
        return np.stack([np.frombuffer(one, np.float32) for one in rows])

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with what the model puts around it; names of special tokens are read as them."""
        ffi, lib, data = self._parts.ffi, self._parts.lib, text.encode()
        vocab, room = lib.llama_model_get_vocab(self._parts.model), len(data) + 16
        ids = ffi.new("llama_token[]", room)
        count = lib.llama_tokenize(vocab, data, len(data), ids, room, True, True)
        if count < 0:
            raise RuntimeError(f"llama_tokenize gave {count}")
        return [int(token) for token in ids[0:count]]


def _main(what: str, path: str, asked: str, answer: str = "", threads: str = "1") -> None:
    if what == "tokenize":
        llama = Llama(path)
        print(json.dumps([llama.tokenize(text) for text in json.loads(asked)]))
        return
    with np.load(asked) as found:
        texts = [found[name] for name in found.files]
    llama, rows = Llama(path, context=max(map(len, texts)), threads=int(threads), cache="f32"), []
    for text in texts:
        llama.clear()
        rows.append(llama.feed([text.tolist()], every=True))
    np.savez(answer, *rows)


if __name__ == "__main__":
    _main(*sys.argv[1:])
