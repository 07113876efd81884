"""What no library gets below: the bytes that a step must read by one sweep, and the products of a prompt alone.

It takes its turns like everyone else, so that a limit is of the same minutes as the times beside it. A step's limit is
the time in which this machine reads so many bytes, one after another, out of as much memory as model and cache take. A
prompt's is the time of torch's products of the same shapes, each by the fastest way that torch has for it here, and of
torch's attention. Nothing is around them: no norms, no sorting of rows, no sums.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.decoding_models import LOADS, SHAPES
from benchmarks.few_rows import sweep

__all__ = ["Limit", "distinct", "must_read"]

_DTYPES = {"fp32": (torch.float32,), "bf16": (torch.bfloat16,)}
_BLOCK = 1 << 18  # numbers that a thread reads in one call
Way = Callable[[Tensor, Tensor], Tensor]


def _onednn(x: Tensor, weight_OI: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, None, "none", [], "")


# Ways of torch to multiply rows by an (out, in) matrix; the second takes the same memory as an (in, out) one.
WAYS: dict[str, Way] = {
    "mm": lambda x, weight_OI: x @ weight_OI.t(),
    "mm, (in, out)": lambda x, weight_OI: x @ weight_OI.view(weight_OI.shape[1], weight_OI.shape[0]),
    "oneDNN": _onednn,
}


def distinct(share_LE: np.ndarray, streams: int) -> np.ndarray:
    """(L,) how many experts so many streams take together, each by itself, from the share of tokens that take each."""
    return (1 - (1 - share_LE) ** streams).sum(1)


def must_read(told: dict[str, Any], share_LE: np.ndarray, streams: int, positions: float) -> float:
    """The bytes of a step of all streams.

    Args:
        told: by a peer's ``bytes``: ``rest``, ``row`` of the embedding, ``expert`` of each layer, ``position`` of the
            cache.
        share_LE: which share of tokens takes each expert.
        streams: how many.
        positions: that each of them looks back at.
    """
    experts = float((distinct(share_LE, streams) * np.array(told["expert"])).sum()) if len(share_LE) else 0.0
    return told["rest"] + experts + streams * (told["row"] + positions * told["position"])


def shares(folder: Path) -> np.ndarray:
    """(L, E) which share of tokens takes each expert; none for a dense model."""
    return np.array(json.loads((folder / LOADS).read_text(encoding="utf-8")))


class Limit:
    """What its process does when it is told to, as the ``Server`` of ``benchmarks.decoding_peers`` does.

    Args:
        threads: how many it may use.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.threads, self.pool = threads, ThreadPoolExecutor(threads)

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """CPU and wall seconds of one request: ``do`` names a method, the rest are its arguments."""
        asked.pop("seed", None)
        wall, cpu = time.perf_counter(), time.process_time()
        getattr(self, asked.pop("do"))(**asked)
        return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}

    def load(self, folder: str, shape: str, kind: str) -> None:
        """What it imitates."""
        self.sizes, self.kind, self.share_LE = SHAPES[shape], kind, shares(Path(folder))
        self.products = dict[int, list[Callable[[], object]]]()
        self.memory = np.zeros(0, np.int64)

    def begin(self, held_bytes: int, read_bytes: float) -> None:
        """From now on a step reads so many bytes of so much memory."""
        kept = np.float32 if self.kind == "fp32" else np.int64
        self.memory = np.ones(max(1, held_bytes // np.dtype(kept).itemsize), kept)
        self.read_bytes, self.at = int(read_bytes), 0

    def steps(self, tokens: int) -> None:
        """Reads what so many steps must, all threads together."""
        numbers, pieces = tokens * self.read_bytes // self.memory.itemsize, list[np.ndarray]()
        while numbers > 0:
            piece = self.memory[self.at : self.at + min(numbers, _BLOCK)]
            numbers, self.at = numbers - len(piece), (self.at + len(piece)) % len(self.memory)
            pieces.append(piece)
        each = [pieces[thread :: self.threads] for thread in range(self.threads)]
        list(self.pool.map(lambda mine: [sweep(piece) for piece in mine], each))

    @torch.inference_mode()
    def prefill(self, tokens: int) -> None:
        """The products of a prompt of so many tokens."""
        if tokens not in self.products:
            self.products[tokens] = list(self._products(tokens))
        for call in self.products[tokens]:
            call()

    def _products(self, tokens: int) -> Iterator[Callable[[], object]]:
        """Those of every layer in turn, each by the fastest way, and the last token's output layer."""
        keys, best = self.sizes.keys, dict[tuple[int, int, int], tuple[Way, torch.dtype]]()
        width, heads, groups = (keys[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        head = keys.get("head_dim") or width // heads

        def product(rows: int, ins: int, outs: int, like: int) -> Callable[[], object]:
            shape = like, ins, outs
            if shape not in best:
                best[shape] = self._fastest(*shape)
            way, dtype = best[shape]
            x, weight_OI = torch.randn(rows, ins).to(dtype), (torch.randn(outs, ins) * ins**-0.5).to(dtype)
            return lambda: way(x, weight_OI)

        qkv = [torch.randn(1, count, tokens, head) for count in (heads, groups, groups)]
        q, k, v = (part.to(torch.float32 if self.kind == "fp32" else torch.bfloat16) for part in qkv)
        for layer in range(keys["num_hidden_layers"]):
            yield product(tokens, width, (heads + 2 * groups) * head, tokens)
            yield lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            yield product(tokens, heads * head, width, tokens)
            hidden = keys.get("moe_intermediate_size", keys["intermediate_size"])
            counts = [tokens]
            if self.sizes.has_experts:
                yield product(tokens, width, keys["num_experts"], tokens)
                counts = [max(1, round(share * tokens)) for share in self.share_LE[layer]]
            like = round(statistics.fmean(counts))
            for rows in counts:
                yield product(rows, width, 2 * hidden, like)
                yield product(rows, hidden, width, like)
        yield product(1, width, keys["vocab_size"], 1)

    def _fastest(self, rows: int, ins: int, outs: int) -> tuple[Way, torch.dtype]:
        """How a product of this shape takes the least time, of weights that come from memory."""
        found = dict[tuple[str, torch.dtype], float]()
        for dtype in _DTYPES.get(self.kind, (torch.float32, torch.bfloat16)):
            x, many = torch.randn(rows, ins).to(dtype), max(2, min(16, (64 << 20) // (ins * outs * dtype.itemsize)))
            weights = [torch.randn(outs, ins).to(dtype) for _ in range(many)]
            for name, way in WAYS.items():
                if name == "oneDNN" and dtype != torch.float32:
                    continue  # torch's mm is it
                way(x, weights[0])
                rounds = [self._time(way, x, weights) for _ in range(3)]
                found[name, dtype] = min(rounds)
        name, dtype = min(found, key=lambda one: found[one])
        return WAYS[name], dtype

    def _time(self, way: Way, x: Tensor, weights: list[Tensor]) -> float:
        start = time.process_time()
        for weight_OI in weights:
            way(x, weight_OI)
        return time.process_time() - start
