"""Made-up runs that look like real ones: a dense and a sparse model on three domains."""

import math
import os
import random
import sys
from collections.abc import Callable

import pytest

from turnout.measure import Passage, ReportData, RunData
from turnout.run.compiled import why_not_compiled
from turnout.types import Cost

if os.environ.get("TURNOUT_COMPILED") == "0":  # then as on a machine without it: whoever imports it all the same fails
    sys.modules["numba"] = None  # type: ignore[assignment] - as the import system spells that there is no such module

DOMAINS = ("library", "manual", "headers")
TEXT = '''def partition(self, sep, /):
    """Split the string at the first occurrence of sep.

    Return a 3-tuple containing the part before the separator,
    the separator itself, and the part after it.  If the separator
    is not found, return a 3-tuple containing the string itself,
    followed by two empty strings.
    """
    head, found, tail = self._split_once(sep)
    if not found:
        return self, type(self)(), type(self)()
    return head, sep, tail


class Fraction(numbers.Rational):
    __slots__ = ('_numerator', '_denominator')

    # We're immutable, so use __new__ not __init__
    def __new__(cls, numerator=0, denominator=None):
        """Constructs a Rational.

        Takes a string like '3/2' or '1.5', another Rational instance, a
        numerator/denominator pair, or a float.
        """
        self = super(Fraction, cls).__new__(cls)
        if denominator is None:
            if type(numerator) is int:
                self._numerator = numerator
                self._denominator = 1
                return self
'''


def shares(rng: random.Random, experts: int, spread: float) -> list[float]:
    raw = [math.exp(rng.gauss(0, spread)) for _ in range(experts)]
    return [value / sum(raw) for value in raw]


def blend(early: list[float], late: list[float], part: float) -> list[float]:
    return [(1 - part) * a + part * b for a, b in zip(early, late, strict=True)]


def pieces(text: str) -> list[str]:
    """The text in pieces of the size of tokens."""
    tokens: list[str] = []
    for letter in text:
        kind = letter.isalnum()
        if tokens and len(tokens[-1]) < 6 and (tokens[-1][-1].isalnum() == kind or tokens[-1] == " "):
            tokens[-1] += letter
        else:
            tokens.append(letter)
    return tokens


def make_passage(layers: int, experts: int, *, seed: int = 0, domain: str = "library") -> Passage:
    rng, tokens, routes = random.Random(seed), pieces(TEXT), []
    for layer in range(layers):
        row = []
        for token in tokens:
            kind = sum(map(ord, token.strip())) + 7 * layer if rng.random() < 0.8 else rng.randrange(1000)
            first = kind % experts
            second = (first + 1 + kind % max(experts - 1, 1)) % experts
            weight = 0.5 + 0.48 * rng.random()
            score = 0.2 + 0.6 * rng.random()
            entries = [(first, weight, score), (second, 1 - weight, 0.15)]
            row.append(tuple(entries[: 1 if experts == 1 else 2]))
        routes.append(tuple(row))
    return Passage(tuple(tokens), tuple(routes), tuple(map(str, range(layers))), experts, domain, "fractions.py")


def make_run(
    name: str, *, layers: int = 4, experts: int = 0, evals: int = 10, seed: int = 0, gain: float = 0.0
) -> RunData:
    rng = random.Random(seed)
    steps, each, metrics = 500, 4096, []
    early = [shares(rng, experts, 0.9) for _ in range(layers)] if experts else []
    late = [shares(rng, experts, 0.12) for _ in range(layers)] if experts else []
    for step in range(5, steps + 1, 5):
        loss = 2.9 + 4.6 * math.exp(-step / 28) + 1.3 * math.exp(-step / 190) + rng.gauss(0, 0.05) - gain * step / steps
        clock = {"seconds": step * (0.4 + 0.01 * experts), "peak_memory_bytes": 900_000_000}
        line = {
            "kind": "train",
            "step": step,
            "loss": loss,
            "lr": 3e-3,
            "grad_norm": 0.8,
            "tokens": step * each,
        } | clock
        metrics.append(line | {"tokens_per_s": 9000 + rng.gauss(0, 150) - 40 * experts})
        if evals and step % (steps // evals) == 0:
            bits = 1.62 + 1.9 * math.exp(-step / 90) - 0.3 * gain * step / steps
            part = 1 - math.exp(-step / 120)
            load = [blend(a, b, part) for a, b in zip(early, late, strict=True)]
            metrics.append(
                {
                    "kind": "eval",
                    "step": step,
                    "tokens": step * each,
                    **clock,
                    "bytes": 90_000,
                    "bits_per_byte": bits,
                    "by_domain": dict(zip(DOMAINS, (bits - 0.06, bits + 0.34, bits - 0.21), strict=True)),
                    "load": load,
                    "max_vio": sum(max(load_E) * experts - 1 for load_E in load) / layers if experts else None,
                    "entropy": 0.991 if experts else None,
                    "dropped": 0.0 if experts else None,
                }
            )
    load = [blend(a, b, 0.98) for a, b in zip(early, late, strict=True)]
    by_domain = {}
    for n, domain in enumerate(DOMAINS if experts else ()):
        tilted = [
            [s * math.exp(rng.gauss(0.9 if e % 3 == n else -0.3, 0.45)) for e, s in enumerate(row)] for row in load
        ]
        by_domain[domain] = [[s / sum(row) for s in row] for row in tilted]
    params = 1_900_000 + 740_000 * experts // 4
    model = {"vocab_size": 2048, "width": 192, "layers": layers, "hidden": 512 if experts else 518, "heads": 6}
    moe = {"num_experts": experts, "top_k": 2, "hidden": 256, "router": "TopK"} if experts else None
    return RunData(
        name,
        config={
            "recipe": name,
            "model": model | {"moe": moe},
            "train": {"steps": steps, "batch": 16, "lr": 3e-3, "seed": 0},
        },
        metrics=tuple(metrics),
        result=next((line for line in reversed(metrics) if line["kind"] == "eval"), {}),
        cost=Cost(params=params, params_active=2_640_000, flops=5_410_000.0 + experts * 6144),
        tokens_per_s=9000.0 - 40 * experts,
        load=load,
        load_by_domain=by_domain,
        passages=tuple(make_passage(layers, experts, seed=n, domain=d) for n, d in enumerate(DOMAINS) if experts),
        hardware={"cpu": "Example 9000", "cores": 2, "memory_bytes": 17179869184, "torch": "2.13.0", "commit": None},
        command="turnout demo --out runs/demo",
        texts=("held_out_text 12ab",),
    )


@pytest.fixture
def run_of() -> Callable[..., RunData]:
    return make_run


@pytest.fixture
def passage_of() -> Callable[..., Passage]:
    return make_passage


@pytest.fixture
def sample() -> ReportData:
    """What the demo leaves: a dense and a sparse run."""
    return ReportData("turnout demo", (make_run("dense"), make_run("moe", experts=16, gain=0.35, seed=1)))


@pytest.fixture
def compiled() -> None:
    """Skips a test of compiled kernels where there are none: ``pytestmark = pytest.mark.usefixtures("compiled")``."""
    if (why := why_not_compiled()) is not None:
        pytest.skip(why)
