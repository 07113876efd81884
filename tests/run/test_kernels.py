"""The Triton kernels: values and gradients in Triton's interpreter, machine code for Hopper, manners without a GPU.

Triton decides when it is imported whether it interprets, so the cases run in a process of their own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turnout.errors import MissingExtraError, ShapeError, UsageError
from turnout.run import execute, kernels
from turnout.types import ExpertWeights, Routing

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the GPU kernels go untested"
)


def python(*command: str, **environment: str) -> str:
    """What a fresh Python prints; fails with all of it when it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        check=False,
        text=True,
        cwd=HERE.parents[1],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cases(*some: str, **environment: str) -> str:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", *some)
    return python("-m", "pytest", str(HERE / "interpreted_kernels.py"), *options, **environment)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    # What takes the interpreter longest, each beside one like it: activations without biases, tiles of 128 rows.
    assert " passed" in cases("-k", "not plain and not 128", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_device():
    assert " passed" in cases()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("--transposed",)], ids=["in, out", "out, in"])
def test_machine_code_for_hopper(layout, tmp_path):
    """At a large layer's sizes every product is on Hopper's own matrix instruction and nothing much spills."""
    lines = python(str(HERE / "compiled_kernels.py"), *layout, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    found = [json.loads(line) for line in lines]
    products = [kernel for kernel in found if "num_stages" in kernel]
    assert {kernel["kernel"] for kernel in products} == {
        "_up_kernel",
        "_rows_kernel",
        "_hidden_kernel",
        "_stack_kernel",
    }
    for kernel in products:
        assert kernel["wgmma"] and not kernel["mma"], kernel
        assert kernel["stack"] <= 32 and kernel["shared"] <= 227 * 1024, kernel


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--dtype float32 --activation reglu --bias --width 7 --hidden 3 --block-m 16",
        "--dtype float16 --activation gelu --bias --width 100 --hidden 36 --block-m 16",
        "--dtype bfloat16 --activation geglu_tanh --bias --width 100 --hidden 36 --block-m 16",
        "--dtype bfloat16 --activation swiglu_oai --bias --width 256 --hidden 64 --block-m 32",
    ],
)
def test_compiles(options, tmp_path):
    assert "_stack_kernel" in python(
        str(HERE / "compiled_kernels.py"), *options.split(), TRITON_CACHE_DIR=str(tmp_path)
    )


def case(**options) -> tuple[torch.Tensor, Routing, ExpertWeights]:
    routing = Routing.from_topk(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
    weights = ExpertWeights(torch.ones(2, 4, 6, **options), torch.ones(2, 3, 4, **options))
    return torch.ones(2, 4, **options), routing, weights


def test_user_mistakes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, routing, weights = case()
    with pytest.raises(UsageError, match=r"the device must be cuda.*got cpu.*backend='sort'"):
        kernels(x, routing, weights)
    with pytest.raises(UsageError, match="the device must be cuda"):
        execute(x, routing, weights, backend="kernels")
    with pytest.raises(ShapeError, match="agree in T, D, E and F"):
        kernels(x[:1], routing, weights)
    with pytest.raises(UsageError, match="autocast"):
        kernels(x.bfloat16(), routing, weights)
    with pytest.raises(UsageError, match="float64"):
        kernels(*case(dtype=torch.float64))


def test_without_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'turnout\[triton\]'"):
        kernels(*case())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_says_that_it_needs_a_device():
    with pytest.raises(AssertionError, match="needs a CUDA device"):
        python("-m", "benchmarks.gpu_layer")


@pytest.mark.slow
def test_triton_is_not_imported_before_it_is_needed():
    program = "import sys, turnout.run, turnout.run.kernels; print('triton' in sys.modules)"
    assert python("-c", program).strip() == "False"
