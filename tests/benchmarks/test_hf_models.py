"""No times for wrong answers: what the check of whole models lets pass, and what it does not."""

import pytest

pytest.importorskip("transformers")

import torch

from benchmarks.hf_models import CONTESTANTS, FEW, NOTHING, PRODUCTS, bars, best, few_wrong, limits, rows, wrong


def planted(**off):
    """Answers of all contestants, each as far off the exact ones as given."""
    g = torch.Generator().manual_seed(0)
    exact = {"logits": torch.randn(50, generator=g), "gate": torch.randn(50, generator=g)}
    found = {name: {key: value * (1 + off.get(name, 0.0)) for key, value in exact.items()} for name in CONTESTANTS}
    return found, exact


def test_in_fp32_all_agree():
    assert wrong(*planted(turnout=5e-5), "fp32") == ""
    assert "turnout, logits is off by 2.0e-04" in wrong(*planted(turnout=2e-4), "fp32")


def test_in_bf16_nobody_is_much_further_from_the_exact_than_the_eager_loop():
    assert wrong(*planted(eager=0.27, grouped_mm=0.31, turnout=0.3), "bf16") == ""
    assert "grouped_mm" in wrong(*planted(eager=0.1, grouped_mm=0.2), "bf16")
    assert "turnout" in wrong(*planted(eager=0.001, turnout=0.1), "bf16")


def test_what_is_no_number_is_wrong():
    found, exact = planted()
    found["turnout"]["gate"][3] = torch.nan
    assert "turnout, gate is off by nan" in wrong(found, exact, "bf16")


def test_of_few_tokens_the_typical_one_counts_in_bf16_and_every_one_in_fp32():
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(1, 8, 50, generator=g)
    found = {name: exact * off for name, off in zip(FEW, (1.01, 1.011, 1.009, 1.01), strict=True)}
    assert few_wrong(found, exact, "bf16") == ""
    found["turnout"][0, 3] *= 1.5  # one took another expert
    assert few_wrong(found, exact, "bf16") == ""
    assert "turnout, logits of few tokens" in few_wrong(found | {"turnout": exact * 1.03}, exact, "bf16")
    found["turnout"][0, 3] = torch.inf
    assert "turnout, logits of few tokens" in few_wrong(found, exact, "bf16")
    same = {name: exact.clone() for name in FEW}
    assert few_wrong(same, exact, "fp32") == ""
    same["batched_mm"][0, 3] *= 1.001
    assert "batched_mm, logits of few tokens are off by 1.0e-03" in few_wrong(same, exact, "fp32")


def test_bars_are_held_against_the_fastest_of_transformers_own():
    few = {"eager": [(3.0, 1), (3.0, 1)], "grouped_mm": [(2.0, 1), (2.2, 1)], "batched_mm": [(1.0, 1), (1.0, 1)]}
    few |= {"turnout": [(1.25, 1), (1.25, 1)], NOTHING: [(0.5, 1), (0.5, 1)]}
    many = {"eager": [(4.0, 1)], "grouped_mm": [(6.0, 1)], "turnout": [(1.25, 1)]}
    many |= {NOTHING: [(0.5, 1)], PRODUCTS: [(0.75, 1)]}
    assert best(few) == "batched_mm" and best(many) == "eager"
    assert rows("Mixtral fp32", "decoding", few, 10)[-1].endswith("0.80 (0.80-0.80) x, batched_mm | -, 2.00 x |")
    cases = [{"model": "Mixtral", "dtype": "fp32", "job": "decoding", "seconds": few}]
    cases.append({"model": "Mixtral", "dtype": "fp32", "job": "forward", "seconds": many})
    assert limits(few) == [None, 2] and limits(many) == [3.2, 8]
    least, mean, products, nothing = bars(cases)[-4:]
    assert least == "| fp32, the least: Mixtral decoding | >= 1 | 0.80 | **missed** in 1 of 2 |"
    assert mean == "| fp32, geometric mean of 2 | >= 1.35 | 1.60 | met |"
    assert products.endswith("bare products' time: geometric mean of 1 | | 3.20 | the limit |")
    assert nothing.endswith("no time: geometric mean of 2 | | 4.00 | the limit |")
    assert "bf16" not in "".join(bars(cases))
