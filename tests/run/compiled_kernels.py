"""Compiles the Triton kernels for a Hopper GPU where there is none; ``test_kernels.py`` runs this file.

For each kernel it compiles the first candidate, or with --all every one, and prints what ptxas made of it as JSON.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from turnout.run.kernels import backward, dispatch, forward
from turnout.run.kernels.executor import _KIND
from turnout.types import ExpertWeights
from turnout.types.weights import GATED

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Absent(DriverBase):
    """Stands for an H200: says what it is, and that nothing runs on it."""

    def __init__(self) -> None:
        self.get_current_stream = lambda device: 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a thread, by NVIDIA's cuobjdump, which Triton carries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name.upper()}:(\d+)", shown)[1]) for name in ("reg", "stack", "local")}


def instead_of_running(every: bool) -> None:
    """From here on a launch compiles its kernel and prints a line; tuning takes the first candidate, or each."""
    compile_only = JITFunction.run

    def run(self, *args, grid, warmup=False, **options):
        kernel = compile_only(self, *args, grid=grid, warmup=True, **options)
        chosen = {name: options[name] for name in options if name.startswith(("BLOCK_", "num_"))}
        ptx = kernel.asm["ptx"]
        found = {"wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"), "shared": kernel.metadata.shared}
        print(
            json.dumps({"kernel": kernel.metadata.name} | chosen | found | resources(kernel.asm["cubin"])), flush=True
        )

    def tune(self, *args, **options):
        kept = self.prune_configs_by_shape(dict(zip(self.arg_names, args, strict=False)), options)
        for config in kept if every else kept[:1]:
            self.fn.run(*args, **options, **config.all_kwargs())

    JITFunction.run = run
    Autotuner.prune_configs_by_shape = lambda self, named, options: self.early_config_prune(
        self.configs, named, **options
    )
    Autotuner.run = tune


def layer(case: argparse.Namespace) -> None:
    """Compiles what a layer of these sizes launches, forward and backward."""
    dtype, gated = getattr(torch, case.dtype), case.activation in GATED
    wide, rows = case.hidden * (2 if gated else 1), case.tokens * 2

    def stack(inner: int, outer: int) -> torch.Tensor:
        if case.transposed:
            return torch.empty(2, outer, inner, dtype=dtype).transpose(1, 2)
        return torch.empty(2, inner, outer, dtype=dtype)

    bias = (torch.empty(2, wide, dtype=dtype), torch.empty(2, case.width, dtype=dtype)) if case.bias else (None, None)
    weights = ExpertWeights(stack(case.width, wide), stack(case.hidden, case.width), *bias, case.activation)
    x_TD, weight_R = torch.empty(case.tokens, case.width, dtype=dtype), torch.empty(rows)
    token_R, offset_E = torch.zeros(rows, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    kind = _KIND[case.activation]
    tiled = dispatch.tiles(offset_E, rows, case.block_m)
    forward.up(x_TD, token_R, weight_R, weights, offset_E, tiled, kind=kind, keep=False)
    active, hidden = forward.up(x_TD, token_R, weight_R, weights, offset_E, tiled, kind=kind, keep=True)
    out = forward.product(active, weights.down_EFD, offset_E, tiled, bias_EO=bias[1], weight_R=weight_R)
    dispatch.combine(out, token_R, offset_E, 2)
    dispatch.combine(out, token_R, offset_E, 0)
    slope, active, dots = backward.hidden_slope(x_TD, hidden, token_R, weight_R, weights, offset_E, tiled, kind=kind)
    backward.stack_slope(active, x_TD, weights.down_EFD, token_R, offset_E, gather="right")
    backward.stack_slope(x_TD, slope, weights.up_EDH, token_R, offset_E, gather="left")
    forward.product(slope, weights.up_EDH.transpose(1, 2), offset_E, tiled)
    if bias[1] is not None:
        dispatch.column_sums(slope, offset_E, dtype)
        dispatch.column_sums(x_TD, offset_E, dtype, token_R=token_R, weight_R=weight_R)
        dispatch.row_dots(x_TD, token_R, bias[1], offset_E, tiled, dots[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--activation", default="swiglu")
    parser.add_argument("--block-m", type=int, default=128)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--transposed", action="store_true")
    parser.add_argument("--all", action="store_true")
    parsed = parser.parse_args()
    driver.set_active(Absent())
    instead_of_running(parsed.all)
    layer(parsed)
