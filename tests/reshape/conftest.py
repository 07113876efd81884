"""Lets the tests of this folder import what stands beside them, and gives them text."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def text() -> list[torch.Tensor]:
    from small import ids

    return [ids(seed=3), ids(seed=4)]
