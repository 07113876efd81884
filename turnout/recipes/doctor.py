"""What ``turnout doctor`` prints: what is installed, and which backend each device would use and why."""

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from turnout.errors import Interrupted
from turnout.measure import hardware
from turnout.models.decoding import decoding_path
from turnout.recipes.models import opened
from turnout.run import calibrate as measure_backends
from turnout.run import choose
from turnout.run.compiled import kernels_path, rows_times, why_not_compiled
from turnout.run.tuned import tuning, tuning_path
from turnout.types import ExpertWeights, Routing
from turnout.types.device import find_device, find_precision, shown, there
from turnout.types.tuning import Tuning

# Distribution -> the extra that installs it (None: always needed), and its purpose.
_PARTS = {
    "torch": (None, "everything"),
    "numpy": (None, "token shards and traces"),
    "safetensors": (None, "checkpoints"),
    "tokenizers": (None, "byte-level BPE"),
    "huggingface_hub": (None, "models by the name that the hub knows"),
    "rich": (None, "progress"),
    "scipy": (None, "assignments, statistics of claims"),
    "transformers": ("hf", "models people already have"),
    "accelerate": ("hf", "transformers' Trainer"),
    "pyarrow": ("parquet", "parquet files"),
    "datasets": ("datasets", "hf:NAME data sets"),
    "tensorboard": ("tensorboard", "TensorBoard events"),
    "peft": ("peft", "adapters, trained by PEFT"),
    "numba": ("cpu", "few tokens on a CPU: kernels compiled for it"),
    "gguf": ("gguf", "models for llama.cpp"),
    "compressed-tensors": ("compressed", "folders in few bits, read by transformers"),
    "triton": ("triton", "GPU kernels, on Linux; torch for CUDA brings it"),
    "fastapi": ("serve", "turnout serve: the API"),
    "uvicorn": ("serve", "turnout serve: HTTP"),
    "httptools": ("serve", "turnout serve: HTTP, read and written in less time"),
    "prometheus-client": ("serve", "turnout serve: its numbers"),
    "llguidance": ("serve", "turnout serve: answers of a given form"),
    "jinja2": ("serve", "turnout serve: chat templates"),
}
# Tokens, experts, top-k, width, hidden: training, serving and decoding.
_SHAPES = ((4096, 8, 2, 256, 512), (4096, 64, 8, 1024, 256), (1, 64, 8, 1024, 256))


def examine(*, calibrate: bool = False, say: Callable[[str], None] = lambda text: None) -> Iterator[str]:
    """The findings, line by line.

    Args:
        calibrate: first measure the backends on this machine and remember the result.
        say: is told what is being measured.

    Raises:
        Interrupted: the user stopped the measurements; nothing was written.

    Source: none; plain bookkeeping.
    """
    yield "hardware"
    for name, value in hardware().items():
        yield f"  {name:<15} {value}"
    yield "installed"
    for name, (extra, purpose) in _PARTS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "MISSING: pip install turnout"
            if extra is not None:
                found = f"missing: pip install 'turnout[{extra}]'"
        yield f"  {name:<18} {found:<40} {purpose}"
    if calibrate:
        yield f"calibrated      {_calibrate(say)}, kept in {tuning_path()}"
    yield from _chosen()
    yield "devices (--device, or device= in a run)"
    found = find_device()
    yield f"  {'auto':<12} {shown(found)}, training in {find_precision('auto', found)}"
    yield f"  {'there':<12} {', '.join(there())}"
    yield "backends"
    devices = ["cpu"] + [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            for shape in _SHAPES:
                yield from _choice(device, dtype, *shape)


def decoding_of(path: str | Path) -> str:
    """How a model's tokens are made after the prompt on this machine's CPU: by one compiled step, or not and why.

    Args:
        path: a folder of a run, of transformers, or that a conversion wrote, or a model of the hub.

    Raises:
        TurnoutError: there is no model.

    Source: see ``turnout.models.decoding.decoding_path``.
    """
    found = opened(path, "turnout doctor", "cpu")
    return f"{path} decodes on a CPU by {decoding_path(found.lm)}"


def _calibrate(say: Callable[[str], None]) -> Tuning:
    try:
        return measure_backends(say=say)
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written, what held before still does") from None


def _chosen() -> Iterator[str]:
    """What the CPU's executors choose by."""
    here = tuning()
    yield f"kernels of the CPU: {here}"
    for what, limit in (("", here.onednn), (" that turn the first factor", here.onednn_turned)):
        way = "always torch's own" if limit is None else f"oneDNN's from {limit:,} multiply-adds on"
        yield f"  {'fp32 products' + what:<42} {way}"
    yield f"  {'experts at once, in intermediate numbers':<42} {here.group:,}"
    yield f"  {'rows of 16 bits rounded up to a part of':<42} 1/{here.steps}, near the mean 1/{here.steps_near}"
    yield f"  {'few tokens, row by row':<42} {here.decode_tokens}, and {here.decode_rows} an expert"
    bits = f"in few bits {here.panel_rows}, with rows of 16 bits {here.panel_rows_short}"
    yield f"  {'few tokens, compiled':<42} {here.compiled_rows} an expert; {bits}"
    yield f"  {'products of our own up to rows an expert':<42} {here.tiled_rows}, of 16 bits {here.tiled_rows_short}"
    why = why_not_compiled()
    found = f"compiled ({_first_use()}), kept in" if why is None else "not compiled, two to three times as long:"
    yield f"  {'few rows of weights stored (out, in)':<42} {found} {kernels_path() if why is None else why}"
    if here.origin != "measured":
        yield "  turnout doctor --calibrate measures this machine, in about half a minute"


def _first_use() -> str:
    """How long the first use of a kernel takes here: compiled for this processor, or read from where it is kept."""
    weight_OI, before = torch.ones(64, 64), time.perf_counter()
    rows_times(torch.ones(1, 64), weight_OI)
    return f"first use {time.perf_counter() - before:.1f} s"


def _choice(
    device: str, dtype: torch.dtype, tokens: int, experts: int, top_k: int, width: int, hidden: int
) -> Iterator[str]:
    index_TK = torch.arange(tokens * top_k, device=device).reshape(tokens, top_k) % experts
    routing = Routing.from_topk(index_TK, torch.ones(tokens, top_k, device=device) / top_k, num_experts=experts)
    up_EDH = torch.empty(1, dtype=dtype, device=device).expand(experts, width, 2 * hidden)
    down_EFD = torch.empty(1, dtype=dtype, device=device).expand(experts, hidden, width)
    x_TD = torch.empty(1, dtype=dtype, device=device).expand(tokens, width)
    choice = choose(x_TD, routing, ExpertWeights(up_EDH, down_EFD))
    case = f"{tokens} tokens, top {top_k} of {experts} experts, {width} -> {hidden}"
    yield f"  {device} {str(dtype).removeprefix('torch.')}: {choice.name} for {case}: {'; '.join(choice.reasons)}"
