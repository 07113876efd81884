"""What reading a model and putting it in few bits takes of memory, measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turnout.models import LM, LMConfig, MoEConfig, checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone says what a process held"),
]
# 31 M parameters, 125 MB in float32; the largest tensor takes 16 MiB.
CONFIG = LMConfig(vocab_size=1024, width=512, layers=4, heads=4, moe=MoEConfig(8, 2, 512))
MIB = 2**20

# How much more the process held at most while it did one thing than when it began, and than it holds afterwards.
PROGRAM = """
import json, sys, torch
from turnout.measure.memory import forget_peak, peak_memory
from turnout.models import checkpoint
from turnout.reshape import quantize
from turnout.train.allocator import return_freed_memory

torch.set_num_threads(1)
what, path, small = sys.argv[1:]
def do(path):
    if what == "quantize":
        lm = checkpoint.load(path)
        return lambda: quantize(lm, bits=4, group=64, batches=[torch.zeros(1, 8, dtype=torch.int64)])[0]
    return lambda: getattr(checkpoint, what)(path)
do(small)()  # whatever is loaded once for all
job = do(path)
return_freed_memory()
forget_peak()
before = peak_memory(torch.device("cpu"))
lm = job()
taken = peak_memory(torch.device("cpu")) - before
held = sum(tensor.nbytes for tensor in lm.state_dict().values())
print(json.dumps({"taken": taken, "held": held}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and a tiny one, in both formats."""
    path = tmp_path_factory.mktemp("memory")
    for name, lm in (("large", LM(CONFIG)), ("small", LM(LMConfig(64, 64, 1, 2, moe=MoEConfig(2, 1, 64))))):
        checkpoint.save(path / name / "load", lm)
        checkpoint.to_hf(lm, path / name / "from_hf")
    return path


def measured(what: str, folder: Path) -> dict[str, int]:
    places = [str(folder / size / ("load" if what == "quantize" else what)) for size in ("large", "small")]
    # Compiled kernels are another library's memory, loaded when they are first called.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TURNOUT_COMPILED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, *places], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", ["load", "from_hf"])
def test_reading_takes_the_model_and_a_tensor(what: str, folders: Path) -> None:
    found = measured(what, folders)
    assert found["held"] > 100e6
    assert found["taken"] < found["held"] + 16 * MIB + 32 * MIB + 8 * MIB  # a tensor, pages of the file, the rest


def test_few_bits_take_no_second_copy_of_what_they_are_made_of(folders: Path) -> None:
    found, before = measured("quantize", folders), 4 * sum(parameter.numel() for parameter in LM(CONFIG).parameters())
    assert before > 100e6 and found["held"] < 25e6
    assert found["taken"] < before + found["held"]  # three times that while eight bytes a weight were held at once
