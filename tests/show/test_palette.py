"""The colours differ, for every kind of sight that the palette claims."""

import itertools
import re

import numpy as np
import pytest

from turnout.show import palette

# Linear RGB as seen with protanopia and deuteranopia: Machado et al., 2009, severity 1.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
}
LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LAB = np.array(
    [
        [0.2104542553, 0.793617785, -0.0040720468],
        [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.808675766],
    ]
)


def oklab(color: str, sight: np.ndarray) -> np.ndarray:
    value = np.array([int(color[n : n + 2], 16) for n in (0, 2, 4)]) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return LAB @ np.cbrt(LMS @ np.clip(sight @ linear, 0, 1))


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("count", "least"), [(4, 0.18), (8, 0.1), (16, 0.06), (32, 0.035), (64, 0.025)])
def test_expert_colours_are_apart(sight: str, dark: bool, count: int, least: float) -> None:
    css = palette.css(count).split("@media")[dark]
    colors = re.findall(r"--e\d+:#(\w{6})", css)
    assert len(colors) == count
    seen = [oklab(color, SIGHTS[sight]) for color in colors]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > least


def test_more_experts_than_colours_repeat_them() -> None:
    assert palette.css(500) == palette.css(palette.EXPERTS)
    assert palette.expert_color(palette.EXPERTS + 3) == "var(--e3)"
