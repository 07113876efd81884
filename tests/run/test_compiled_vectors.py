"""The kernels for a processor with half as wide vectors and registers: the same contracts."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.usefixtures("compiled"), pytest.mark.slow]

HERE = Path(__file__).parent
FEATURES = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
TOLD = """
import sys, pytest
from turnout.run.compiled.lanes import LANES
assert LANES.made() == 8
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[1:]]))
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="an x86 processor's features")
def test_a_processor_without_avx512(tmp_path):
    given = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": FEATURES, "TURNOUT_CACHE": str(tmp_path)}
    wanted = ["test_compiled_rows.py", "test_compiled_experts.py::test_few_bits"]
    wanted += ["test_compiled_experts.py::test_one_token_has_the_same_bits_alone_among_others_and_with_more_threads"]
    command = [sys.executable, "-c", TOLD, *(str(HERE / one) for one in wanted)]
    done = subprocess.run(command, check=False, env=given, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
