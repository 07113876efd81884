"""What torch makes tensors of where nobody says so is of no account to compiled kernels: the same bits come out."""

import pytest
import torch

from turnout.models import LM, LMConfig
from turnout.models.attention import attend
from turnout.models.decoding.decoder import Decoder
from turnout.run.packed import packed_experts, packed_linear
from turnout.run.sort import sort
from turnout.types import ExpertWeights, Packed, PackedWeights, Routing

pytestmark = pytest.mark.usefixtures("compiled")


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)


def packed(*shape):
    code = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(1))
    return Packed.of(code, torch.full((*shape[:-1], shape[-1] // 32), 0.01, dtype=torch.float32), group=32, bits=4)


def routed(tokens):
    weight_TK, index_TK = normal(tokens, 4).softmax(1).topk(2)
    return Routing.from_topk(index_TK, weight_TK, num_experts=4)


def mapped(dtype, rows):
    return packed_linear(normal(rows, 64, dtype=dtype), packed(64, 64))


def fed(dtype, rows):
    return packed_experts(
        normal(rows, 64, dtype=dtype), routed(rows), PackedWeights(packed(4, 128, 64), packed(4, 64, 64))
    )


def trained(dtype, rows):
    x_TD, up, down = (normal(*size, dtype=dtype).requires_grad_() for size in ((rows, 64), (4, 128, 64), (4, 64, 64)))
    y_TD = sort(x_TD, routed(rows), ExpertWeights(up.transpose(1, 2), down.transpose(1, 2)))
    y_TD.backward(torch.ones_like(y_TD))
    return torch.cat([one.detach().flatten() for one in (y_TD, *(leaf.grad for leaf in (x_TD, up, down)))])


def looked(dtype, rows):
    q, k, v = (normal(1, 2, rows, 64, dtype=dtype) * scale for scale in (1, 0.5, 2))
    return attend(q, k, v, scale=0.125, window=None)


def decoded(dtype, rows):
    torch.manual_seed(0)
    with torch.no_grad():
        lm = LM(LMConfig(vocab_size=64, width=64, layers=1, heads=2)).float().eval()
        for one in lm.parameters():
            one.copy_(normal(*one.shape) * 0.1)
        lm.to(dtype)
    decoder = Decoder(lm, 1, 32)
    first_BV = decoder.prefill(torch.arange(rows)[None] % 64).clone()
    return torch.cat((first_BV, decoder.step(torch.tensor([3]))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("made", "rows"), [(mapped, 2), (mapped, 40), (fed, 2), (fed, 60), (trained, 60), (looked, 40), (decoded, 20)]
)
def test_the_default_dtype_is_of_no_account(made, rows, dtype):
    expected = made(dtype, rows)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = made(dtype, rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
