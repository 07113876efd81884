"""Models in few bits: a row has the same bits alone, in a batch, and on any number of threads, step by step."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from variants import TINY, ids

from turnout.models import LM, MoEConfig
from turnout.models.decoding import Decoder
from turnout.reshape import quantize
from turnout.run import packed_linear

pytestmark = pytest.mark.usefixtures("compiled")

WIDE = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 96, "qkv_bias": True, "out_bias": True}
MOE = MoEConfig(5, 3, 64, shared_hidden=32, shared_gate=True)
ALL = ("experts", "shared", "dense", "attention", "head")
HOW = {
    "eight bits": {"bits": 8, "group": None},
    "eight bits in groups": {"bits": 8, "group": 32, "scale": "float16"},
    "four bits": {"bits": 4, "group": 32},
    "four bits in wide groups": {"bits": 4, "group": 64, "parts": ("experts",)},
    "levels": {"bits": 4, "group": 32, "codes": "nf4", "scale": "float32"},
    "levels in rows": {"bits": 4, "group": None, "codes": "float"},
}


@functools.cache
def packed(name: str, dtype: torch.dtype) -> LM:
    moe = MOE if name != "eight bits in groups" else None
    whole = LM(dataclasses.replace(TINY, **WIDE, moe=moe, init_std=0.2), seed=1).eval()
    if name == "whole":
        return whole.to(dtype)
    return quantize(whole, **{"parts": ALL, **HOW[name]}, batches=[ids(1, 8)])[0].eval().to(dtype)


def steps(lm: LM, row_N: list[int], count: Any) -> torch.Tensor:
    """(N, S, V) the scores after each further token of these rows; the prompts are read by torch, all on one thread."""
    id_BS, length_B = ids(9, 18), torch.tensor([12, 1, 5, 12, 7, 2, 9, 3, 11])
    torch.set_num_threads(1)
    decoder = Decoder(lm, 9, 4)
    assert decoder.why_plain is None
    decoder.prefill(id_BS[:, :12], length_B)
    decoder.keep(torch.tensor(row_N))
    torch.set_num_threads(count)
    return torch.stack([decoder.step(id_B).clone() for id_B in id_BS[row_N, 12:].T], 1)


@pytest.fixture
def threads() -> Iterator[Any]:
    """Sets them; they are as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*HOW, "whole"])
@torch.no_grad()
def test_a_row_has_the_same_bits_alone_and_among_any_others(name: str, dtype: torch.dtype, threads: Any) -> None:
    lm = packed(name, dtype)
    want = steps(lm, list(range(9)), 1)
    for rows in ([0], [8], [1, 5], [7, 2, 0, 3]):
        assert torch.equal(steps(lm, rows, 1), want[rows]), rows


@pytest.mark.slow  # the step is compiled once more
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*HOW, "whole"])
@torch.no_grad()
def test_rows_have_the_same_bits_on_any_number_of_threads(name: str, dtype: torch.dtype, threads: Any) -> None:
    lm, every = packed(name, dtype), list(range(9))
    want = steps(lm, every, 1)
    for count in (2, 3):
        assert torch.equal(steps(lm, every, count), want)


@pytest.mark.parametrize("rows", [65, 130])
@pytest.mark.parametrize("name", HOW)
@torch.no_grad()
def test_many_rows_have_the_same_bits_on_any_number_of_threads(name: str, rows: int, threads: Any) -> None:
    lm = packed(name, torch.float32)
    weight = lm.blocks[1].ff.bank.up.packed[2] if lm.config.moe else lm.blocks[1].ff.up.packed
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    threads(1)
    want = packed_linear(x, weight, None)
    torch.testing.assert_close(want, x @ weight.dequantised().T, rtol=0, atol=1e-4)
    for count in (2, 3):
        threads(count)
        assert torch.equal(packed_linear(x, weight, None), want)
