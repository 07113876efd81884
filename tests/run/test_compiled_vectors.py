"""The kernels for processors with half as wide vectors, or without products of bfloat16: the same contracts."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from turnout.run.compiled.lanes import features as features_here

pytestmark = [pytest.mark.usefixtures("compiled"), pytest.mark.slow]

HERE = Path(__file__).parent
FEATURES = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
WIDE = FEATURES + ",+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"
TOLD = """
import sys, pytest, torch
from turnout.run.compiled.formats import meets_short
from turnout.run.compiled.lanes import LANES
assert LANES.made() == int(sys.argv.pop(1)) and not meets_short(torch.ones(1, 32).bfloat16(), torch.bfloat16)
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[1:]]))
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="an x86 processor's features")
@pytest.mark.parametrize(("name", "features", "lanes"), [("haswell", FEATURES, 8), ("skylake-avx512", WIDE, 16)])
def test_a_processor_without_products_of_bfloat16_or_avx512(name, features, lanes, tmp_path):
    if lanes == 16 and "avx512vl" not in (features_here()):
        pytest.skip("this processor has no AVX-512")
    given = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "TURNOUT_CACHE": str(tmp_path)}
    # Each compiles kernels anew. With vectors of 16 the others are those of this file's neighbours.
    few = ["test_compiled_experts.py::test_few_bits", "test_compiled_short.py"]
    wanted = ["test_compiled_rows.py", *(few if lanes == 8 else [])]
    wanted += ["test_compiled_experts.py::test_one_token_has_the_same_bits_alone_among_others_and_with_more_threads"]
    command = [sys.executable, "-c", TOLD, str(lanes), *(str(HERE / one) for one in wanted)]
    done = subprocess.run(command, check=False, env=given, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
