"""Flows on single paths are as even as sprayed packets, with as few pieces as said; hashed ones are not."""

import numpy as np
import pytest

from turnout.decide.device import ecmp, flows
from turnout.errors import UsageError


@pytest.mark.parametrize(
    ("count", "paths"), [(8, 8), (24, 16), (16, 24), (31, 32), (32, 31), (256, 32), (1, 5), (7, 1)]
)
def test_no_path_is_busier_than_if_sprayed(count, paths):
    found = flows(count, paths)
    assert found.congestion == pytest.approx(1.0) and found.load_S == pytest.approx(np.full(paths, count / paths))
    sent = np.bincount([part[0] for part in found.parts], [part[2] for part in found.parts])
    assert sent == pytest.approx(np.ones(count))


def test_the_pieces_are_those_of_the_paper():
    assert (flows(256, 32).extra, round(flows(24, 16).extra, 2), flows(31, 32).extra) == (0.0, 0.33, 31.0)


@pytest.mark.parametrize(("count", "paths", "ratio"), [(8, 8, 2.55), (24, 16, 2.62), (256, 32, 1.80)])
def test_hashing_is_as_uneven_as_balls_in_bins(count, paths, ratio):
    found = np.mean([ecmp(count, paths, seed=seed).congestion for seed in range(400)])
    assert found == pytest.approx(ratio, rel=0.03)


def test_none_is_refused():
    with pytest.raises(UsageError, match="pass paths=8"):
        flows(4, 0)
