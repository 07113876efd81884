"""Other versions of Python than this one: what does not need torch runs on all that are found.

``scripts/test-python`` runs the quick tests with a Python whose environment has torch.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "turnout/run/pool.py"
# Runs by itself under another interpreter: a loan is over when nothing holds it, also where arguments are borrowed.
ALONE = f"""
import gc, importlib.util, threading
spec = importlib.util.spec_from_file_location("pool", {str(SOURCE)!r})
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)

class Storage:
    def __init__(self, loan):
        self.loan = loan

def lent_now(storage):  # as room is called: with everything borrowed that can be
    return pool.lend(64).obj is storage.loan.obj

pool = module.Pool(bytearray, patience=8)
storage = Storage(pool.lend(64))
assert not lent_now(storage)
block = storage.loan.obj
storage.itself = storage
del storage
gc.collect()
assert block in (pool.lend(64).obj, pool.lend(64).obj), "the end of a loan in a cycle"

def work(value):
    for _ in range(300):
        loan = pool.lend(64)
        loan[:] = bytes([value]) * 64
        assert bytes(loan) == bytes([value]) * 64
        passed.append(value)

passed = []
threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
assert len(passed) == 1200, len(passed)
print("owned")
"""


# Warnings of the compiler are the errors of a later version.
COMPILE = f"""
import pathlib, warnings
warnings.simplefilter("error")
for path in sorted(pathlib.Path({str(ROOT / "turnout")!r}).rglob("*.py")):
    compile(path.read_bytes(), str(path), "exec")
print("compiled")
"""


def interpreters():
    """This Python, and every newer one that is found."""
    names = [f"python3.{minor}{kind}" for minor in range(12, 17) for kind in ("", "t")]
    found = [path for name in names if (path := shutil.which(name)) and "shims" not in Path(path).parts]
    return [sys.executable, *found, *map(str, (Path.home() / ".pyenv/versions").glob("3.1[2-9]*/bin/python"))]


@pytest.mark.parametrize("script", [ALONE, COMPILE], ids=["memory is owned", "sources compile"])
@pytest.mark.parametrize("python", interpreters())
def test_on_every_python_found(python, script):
    made = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert made.stdout in ("owned\n", "compiled\n"), made.stderr
