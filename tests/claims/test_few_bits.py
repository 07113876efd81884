"""Claims about few bits and few bytes: their arms, and the sizes that these are held at, made anew by other means."""

import importlib
import zlib

import numpy as np
import pytest
import torch

from turnout.models import LM
from turnout.models.zipnn import encode
from turnout.reshape.quantize.codebooks import float_levels

K_BITS, ZIPNN = (importlib.import_module(f"turnout.claims.{name}") for name in ("k_bits", "zipnn"))
# The maps of a model of two layers, as they are called.
MAPS = ("attention.qkv.weight", "attention.out.weight", "ff.up", "ff.down")


def levels(bits: int, codes: str) -> torch.Tensor:
    half = 2 ** (bits - 1) - 1
    return torch.arange(-half, half + 1) / half if codes == "even" else float_levels(bits)


@pytest.mark.parametrize("block", [64, None])
@pytest.mark.parametrize(("bits", "codes"), [(3, "even"), (4, "even"), (3, "float"), (4, "float"), (8, "float")])
def test_weights_are_rounded_in_their_blocks_and_scales_are_counted(bits: int, codes: str, block: int | None) -> None:
    lm = LM(K_BITS.small(None, hidden=96, width=32), seed=1)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    new, size = K_BITS._rounded(lm, bits, codes, block)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    wanted = 0
    for name, tensor in new.state_dict().items():
        if not name.endswith(MAPS):
            assert torch.equal(tensor, before[name]), name
            continue
        flat = before[name].reshape(-1, block or tensor.numel())
        scale = flat.abs().amax(1, keepdim=True).bfloat16().float()
        all_N = scale[..., None] * levels(bits, codes)  # each weight's choice
        nearest = levels(bits, codes)[(all_N - flat[..., None]).abs().argmin(2)] * scale
        torch.testing.assert_close(tensor.view_as(flat), nearest, rtol=0, atol=1e-7, msg=name)
        wanted += bits * tensor.numel() + 16 * len(flat)
    assert size == wanted > bits * 2 * (32 * 64 + 32 * 32 + 3 * 32 * 96)


def test_quantiles_come_from_the_weights_of_their_map() -> None:
    lm = LM(K_BITS.small(None, hidden=96, width=32), seed=1)
    with torch.no_grad():
        lm.blocks[0].ff.up.copy_(lm.blocks[0].ff.up ** 3)
    new, _ = K_BITS._rounded(lm, 4, "quantile", None)
    counts = new.blocks[0].ff.up.unique(return_counts=True)[1].sort().values
    # But the two ends, which are stretched to the largest weights, and zero.
    assert len(counts) == 16 and counts[14] < 1.5 * counts[2], "levels are taken about equally often"


def test_curves_are_held_against_each_other_where_all_of_them_are() -> None:
    one, other, third = [(0.0, 9.0), (2.0, 5.0), (4.0, 5.0)], [(1.0, 3.0), (3.0, 1.0)], [(-5.0, 2.0), (9.0, 2.0)]
    # From 1 to 3: 7 to 5 in a line, then 5; 3 to 1; 2. Nine sizes, the ends among them.
    assert K_BITS._level([one, other, third]) == pytest.approx([(7 + 6.5 + 6 + 5.5 + 5 * 5) / 9, 2.0, 2.0])


def test_the_least_of_all_others_is_what_four_bits_are_held_against(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, str, int | None]]()

    def rounded(lm: float, bits: int, codes: str, block: int | None) -> tuple[float, float]:
        asked.append((bits, codes, block))
        return lm + bits / 10 + (block is None), 2.0 ** (lm * bits)

    monkeypatch.setattr(K_BITS, "_taught", lambda seed, width: float(width))
    monkeypatch.setattr(K_BITS, "_score", lambda lm: lm)
    monkeypatch.setattr(K_BITS, "_rounded", rounded)
    monkeypatch.setattr(K_BITS, "_level", lambda curves: [curve[0][1] for curve in curves])
    found = K_BITS._measure(0)
    assert found["blocks"] == pytest.approx(0.3) and found["one block"] == pytest.approx(1.3)
    assert found["even"] == pytest.approx(found["float"]) == pytest.approx(found["quantile"]) == pytest.approx(1.4)
    assert found["best other"] == found["3 bits"] == pytest.approx(32.3) and found["4 bits"] == pytest.approx(32.4)
    assert {(4, codes, None) for codes in ("even", "float", "quantile")} < set(asked)
    assert {(k, "float", 64) for k in (3, 4, 5, 6, 8)} | {(3, "even", 64), (3, "even", None)} < set(asked)


def some(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The weights that the claim measures: those of a trained model's matrices, and no vectors."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.matrix = torch.nn.Parameter(0.05 * torch.randn(300, 80, generator=generator))
    module.stack = torch.nn.Parameter(0.02 * torch.randn(3, 40, 90, generator=generator))
    module.vector = torch.nn.Parameter(torch.ones(4000))
    monkeypatch.setattr(ZIPNN, "taught", lambda seed, routed: module)
    return torch.cat([module.matrix.detach().flatten(), module.stack.detach().flatten()])


def test_every_share_is_of_the_bytes_of_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, found = some(monkeypatch), ZIPNN._measure(0)

    def lying(tensor: torch.Tensor) -> bytes:
        return tensor.view(torch.uint8).numpy().tobytes()

    def left(tensor: torch.Tensor, width: int) -> float:
        return sum(len(stream) for _, stream in encode(lying(tensor), width)) / tensor.nbytes

    short = weights.bfloat16()
    assert found["zlib"] == len(zlib.compress(lying(short), 6)) / short.nbytes
    assert found["grouped"] == left(short, 2) < found["as they lie"] == left(short, 1)
    assert found["grouped, fp32"] == left(weights, 4) < found["as they lie, fp32"] == left(weights, 1)
    assert found["of zlib"] == found["grouped"] / found["zlib"]
    assert found["clean"] == left(short.float(), 4) < found["grouped, fp32"]
    assert 0.6 < found["grouped"] < 0.7 and 0.8 < found["grouped, fp32"] < 0.87


def test_one_byte_that_another_came_back_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, true = some(monkeypatch), ZIPNN.decode

    def wrong(streams: list[tuple[str, bytes]], size: int) -> np.ndarray:
        found = true(streams, size)
        found[7] ^= 1
        return found

    assert ZIPNN._measure(0)["changed"] == 0
    monkeypatch.setattr(ZIPNN, "decode", wrong)
    monkeypatch.setattr(ZIPNN, "_CHUNK", 50_000)
    assert ZIPNN._measure(0)["changed"] == -(-2 * len(weights) // 50_000) / (2 * len(weights))
