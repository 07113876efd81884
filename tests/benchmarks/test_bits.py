"""benchmarks.bits: what is measured is what the model says, and the bars are of the worst model."""

import dataclasses

import pytest
import torch

from benchmarks import bits
from turnout.claims.trial import SEQ, small, text
from turnout.measure import bits_per_byte
from turnout.models import LM, MoEConfig
from turnout.train.data import windows


@pytest.mark.slow
def test_logits_that_were_kept_are_scored_as_the_model_is() -> None:
    lm = LM(small(MoEConfig(4, 2, 16), hidden=32, width=32), seed=1).eval()
    held = windows(text().held_out, batch=8, seq=SEQ, limit=bits.SCORED)
    lengths_V = torch.from_numpy(text().byte_length_V)
    wanted = bits_per_byte(lm, held, lengths_V, domains=text().domains).bits_per_byte
    given = bits.answers(lm)
    assert bits.score(given) == pytest.approx(wanted, rel=1e-6)
    same = bits.compare(given, given, 16.0)
    assert (same.nats, same.top1, same.share) == (0.0, 1.0, 0.0)
    generator = torch.Generator().manual_seed(1)
    noisy = [one + torch.randn(one.shape, generator=generator) for one in given]
    far = bits.compare(given, noisy, 4.0)
    assert 0.2 < far.nats < 2 and far.top1 < 0.9 and far.share > 0.01


def test_bars_are_held_against_the_worst_model() -> None:
    good = bits.Found(nats=0.001, top1=0.99, bits=2.0, share=0.001, size=4.25)
    bad = dataclasses.replace(good, nats=0.03, share=-0.02)
    lines = bits.page({100: {bits.BARRED: good}, 101: {bits.BARRED: bad}}, 300)
    assert lines[-2:] == [
        "| KL, nats a token | <= 0.02 | 0.0300 | **missed** |", "| bits per byte | within 1% | -2.00% | **missed** |"
    ]  # fmt: skip
    assert [line.endswith("| met |") for line in bits.page({100: {bits.BARRED: good}}, 300)[-2:]] == [True, True]
    assert bits.BARRED in dict(bits.cases())
