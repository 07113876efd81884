"""Attention of many new positions equals that written out in float64."""

import pytest
import torch

from turnout.run.compiled.attention import looks, suits_looks

pytestmark = pytest.mark.usefixtures("compiled")
DTYPES = [torch.float32, torch.bfloat16]


def some(B, H, G, S, T, P, V, dtype):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(B, S, H, P, generator=g).to(dtype).transpose(1, 2)
    k, v = (torch.randn(B, G, T + 3, n, generator=g).to(dtype)[:, :, 2:-1] for n in (P, V))  # part of a larger room
    if not suits_looks(q, k, v):
        pytest.skip("this processor lacks the vectors")
    return q, k, v


def written_out(q, k, v, *, scale, window=None, softcap=None, sink_H=None):
    q, k, v = (one.double() for one in (q, k, v))
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    score, (S, T) = q @ k.transpose(2, 3) * scale, (q.shape[2], k.shape[2])
    score = score if softcap is None else softcap * (score / softcap).tanh()
    seen = torch.ones(S, T, dtype=torch.bool).tril(T - S)
    seen = seen if window is None else seen.triu(T - S - window + 1)
    score = score.masked_fill(~seen, -torch.inf)
    if sink_H is not None:
        score = torch.cat((score, sink_H.double()[:, None, None].expand(*score.shape[:2], S, 1)), 3)
    return (score.softmax(3)[..., :T] @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "H", "G", "S", "T", "P", "V"),
    [
        (1, 2, 1, 16, 16, 64, 64),
        (2, 4, 2, 25, 25, 64, 64),  # a block and one more
        (1, 3, 3, 47, 130, 66, 72),  # after others; widths of no whole vectors
        (2, 4, 1, 100, 357, 32, 128),
        (1, 2, 2, 129, 129, 192, 128),  # as latent attention has it
    ],
)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"window": 20},
        {"window": 1},
        {"softcap": 3.0},
        {"sinks": True},
        {"window": 33, "softcap": 5.0, "sinks": True},
    ],
)
def test_it_is_attention_written_out(B, H, G, S, T, P, V, dtype, how):
    q, k, v = some(B, H, G, S, T, P, V, dtype)
    how = dict(how) | {"scale": P**-0.5}
    if how.pop("sinks", False):
        how["sink_H"] = torch.randn(H, generator=torch.Generator().manual_seed(4)).to(dtype)
    found, wanted = looks(q, k, v, **how), written_out(q, k, v, **how)
    assert found.dtype == dtype and found.shape == (B, S, H * V)
    assert float((found.double() - wanted).norm() / wanted.norm()) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_what_is_not_seen_do_no_harm(dtype):
    q, k, v = some(1, 2, 2, 40, 40, 64, 64, dtype)
    assert torch.isfinite(looks(q * 1000, k, v, scale=1.0)).all()
    k[:, :, 30:], v[:, :, 30:] = torch.inf, 1e30
    assert torch.isfinite(looks(q, k, v, scale=0.1)[:, :24]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_neighbours_nor_on_threads(dtype):
    q, k, v = some(3, 4, 2, 70, 90, 64, 64, dtype)
    before, wanted = torch.get_num_threads(), looks(q, k, v, scale=0.2, window=37)
    assert torch.equal(looks(q[1:2], k[1:2], v[1:2], scale=0.2, window=37), wanted[1:2])
    later = looks(q[:, :, 29:], k, v, scale=0.2, window=37)  # in other blocks
    assert torch.equal(later, wanted[:, 29:])
    try:
        torch.set_num_threads(3)
        assert torch.equal(looks(q, k, v, scale=0.2, window=37), wanted)
    finally:
        torch.set_num_threads(before)


def test_what_it_does_not_take():
    q, k, v = some(1, 2, 2, 32, 32, 64, 64, torch.float32)
    assert not suits_looks(q[:, :, :4], k, v)  # few
    assert not suits_looks(q, k, v[..., :32]) and not suits_looks(q[..., :63], k[..., :63], v)
    assert not suits_looks(q.half(), k.half(), v.half()) and not suits_looks(q.bfloat16(), k, v)
    asked = q.detach().clone().requires_grad_()
    assert not suits_looks(asked, k, v)
    with torch.no_grad():
        assert suits_looks(asked, k, v)
