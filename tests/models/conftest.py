"""Lets the tests of this folder import what stands beside them."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "checkpoint")]
