"""Claim: small blocks and the data type are what makes few bits cheap; 4 bits are the best use of a number of bits."""

import copy
import itertools
import math
from collections.abc import Sequence

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.trial import SEQ, small, text, trial
from turnout.measure import bits_per_byte
from turnout.models import LM
from turnout.reshape.quantize.codebooks import Codebook, codebook
from turnout.reshape.quantize.maps import maps
from turnout.reshape.quantize.nearest import nearest
from turnout.train.data import windows

_WIDTHS, _STEPS = (32, 64, 96), 300
_BITS, _BLOCK = (3, 4, 5, 6, 8), 64
_SCORED = 12_288
_POINTS = 9  # sizes at which curves are held against each other


def k_bits() -> Claim:
    """Bits per byte lost to k-bit weights, by block and data type; and at equal total bits, which k is best.

    Curves are bits per byte over log2 of the maps' bits, scales included, through models of several widths. They are
    held against each other where all of them are, straight lines between the models.

    >>> k_bits().off
    'one block a matrix, levels evenly spaced'

    Source: Dettmers and Zettlemoyer, 2023, "The case for 4-bit precision: k-bit Inference Scaling Laws", figures 1 to 3
    and 5. They have models of 19M to 176B parameters and zero-shot accuracy; here are three of under a million and bits
    per byte. Their integers are cut to be symmetric, and so are those of this claim.
    """
    lost, equal = "held-out bits per byte lost", "held-out bits per byte at equal total bits"
    return Claim(
        name="k_bits",
        statement="Blocks with scales of their own and levels that are not evenly spaced lose less at equal bits; of 3 "
        "to 8 bits, 4 give the best model for its total bits.",
        source="Dettmers and Zettlemoyer, 2023, The case for 4-bit precision: k-bit Inference Scaling Laws",
        off="one block a matrix, levels evenly spaced",
        switched={"blocks": "one block", "blocks, equal bits": "one block, equal bits"}
        | dict.fromkeys(("float", "quantile"), "even"),
        rows=(
            Row(f"{lost}, 3 bits", "below", "blocks", "one block", f"one block a matrix; blocks of {_BLOCK}"),
            Row(f"{equal}, 3 bits", "below", "blocks, equal bits", "one block, equal bits", "one block a matrix"),
            Row(f"{lost}, 4 bits, float", "below", "float", "even", "evenly spaced levels, one block a matrix"),
            Row(f"{lost}, 4 bits, quantiles", "below", "quantile", "even", "evenly spaced levels, one block a matrix"),
            Row(f"{equal}, 4 bits", "below", "4 bits", "8 bits", "8 bits", headline=True),
            Row(f"{equal}, 4 bits", "below", "4 bits", "best other", "the best of 3, 5, 6 and 8 bits", headline=True),
        ),
        measure=_measure,
        seconds=40,
        limits=(-0.1, 10.0),
        note=f"2 layers, widths {', '.join(map(str, _WIDTHS))}, {_STEPS} steps of 1,024 tokens; k bits at equal total "
        f"bits are floats in blocks of {_BLOCK}: 3 bits {{3 bits:.4f}}, 4 {{4 bits:.4f}}, 5 {{5 bits:.4f}}, 6 "
        "{6 bits:.4f}, 8 {8 bits:.4f}. Twice the weights are worth more here than what rounding to 3 bits loses: the "
        "fewest bits win. In small blocks data types are nearly alike",
    )


def _measure(seed: int) -> Values:
    models = [_taught(seed, width) for width in _WIDTHS]
    before = [_score(lm) for lm in models]

    def curve(bits: int, codes: str, block: int | None) -> list[tuple[float, float]]:
        found = [_rounded(lm, bits, codes, block) for lm in models]
        return [(math.log2(size), _score(lm)) for lm, size in found]

    def lost(points: Sequence[tuple[float, float]]) -> float:
        return sum(after - was for (_, after), was in zip(points, before, strict=True)) / len(before)

    blocks, one = curve(3, "even", _BLOCK), curve(3, "even", None)
    found = {"blocks": lost(blocks), "one block": lost(one)}
    found |= {codes: lost(curve(4, codes, None)) for codes in ("even", "float", "quantile")}
    found |= dict(zip(("blocks, equal bits", "one block, equal bits"), _level([blocks, one]), strict=True))
    found |= dict(zip([f"{k} bits" for k in _BITS], _level([curve(k, "float", _BLOCK) for k in _BITS]), strict=True))
    return found | {"best other": min(found[f"{k} bits"] for k in _BITS if k != 4)}


def _taught(seed: int, width: int) -> LM:
    """A dense model of this width, after its steps."""
    lm = LM(small(None, hidden=3 * width, width=width), seed=seed)
    trial(lm, seed=seed, steps=_STEPS)
    return lm.eval()


def _score(lm: LM) -> float:
    """Held-out bits per byte."""
    tokens = text()
    held_out = windows(tokens.held_out, batch=8, seq=SEQ, limit=_SCORED)
    return bits_per_byte(lm, held_out, torch.from_numpy(tokens.byte_length_V), domains=tokens.domains).bits_per_byte


@torch.no_grad()
def _rounded(lm: LM, bits: int, codes: str, block: int | None) -> tuple[LM, float]:
    """The model with its maps rounded, and their bits; blocks go through the rows of a matrix, as theirs do."""
    new, size = copy.deepcopy(lm), 0.0
    for one in itertools.chain(*(maps(new, layer, ("dense", "attention")) for layer in range(len(new.blocks)))):
        flat_1N = one.weight.reshape(1, -1)
        group = flat_1N.shape[1] if block is None else block
        book = _even(bits) if codes == "even" else codebook(codes, bits, weight=flat_1N, group=group)
        coded = nearest(flat_1N, book, group, dtype=torch.bfloat16)
        one.weight.copy_(coded.written_out().view_as(one.weight))
        size += flat_1N.numel() * bits + 16 * coded.scale.numel()
    return new, size


def _even(bits: int) -> Codebook:
    """The integers of the paper: as many below zero as above, one code left over."""
    half = 2 ** (bits - 1) - 1
    return Codebook(torch.arange(-half, half + 1) / half)


def _level(curves: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
    """The mean of each curve over the sizes that all of them reach."""
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    sizes = [low + (high - low) * n / (_POINTS - 1) for n in range(_POINTS)]
    return [sum(_at(curve, size) for size in sizes) / len(sizes) for curve in curves]


def _at(curve: Sequence[tuple[float, float]], size: float) -> float:
    for (left, a), (right, b) in itertools.pairwise(curve):
        if size <= right + 1e-9:
            return a + (b - a) * (size - left) / (right - left)
    raise AssertionError("within all curves")
