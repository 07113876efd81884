"""What training takes is known before the first step, and what does not fit is refused with what would."""

import re
import subprocess
import sys

import pytest
import torch

from turnout.errors import UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.train import TrainConfig, train
from turnout.train.data import Batch, Document, prepare
from turnout.train.room import Need, check_room, step_need

MOE = LMConfig(512, width=64, layers=3, heads=4, max_seq=128, moe=MoEConfig(4, 2, 96, router="NoisyTopK"))


def row(seq: int = 128) -> Batch:
    id_BS = torch.randint(512, (1, seq + 1), generator=torch.Generator().manual_seed(0))
    return Batch(id_BS[:, :-1], id_BS[:, 1:])


def test_what_is_counted() -> None:
    lm = LM(MOE).train()
    need, longer = step_need(lm, row(64)), step_need(lm, row(128))
    assert need.fixed_bytes == longer.fixed_bytes > 3 * 4 * sum(p.numel() for p in lm.parameters())
    assert longer.row_bytes / need.row_bytes == pytest.approx(2, rel=0.05)
    # At least the inputs of every product of every layer are kept.
    least = MOE.layers * 128 * 4 * (6 * 64 + 2 * (64 + 3 * 96))
    assert least < longer.row_bytes < 8 * least
    deeper = step_need(LM(LMConfig(512, width=64, layers=12, heads=4, max_seq=128)).train(), row())
    assert deeper.row_bytes > 2 * longer.row_bytes * 3 / 12


def test_nothing_is_changed_by_counting() -> None:
    lm = LM(MOE).train()
    before, chance = {name: t.clone() for name, t in lm.state_dict().items()}, torch.get_rng_state()
    step_need(lm, row(), dtype="bf16")
    assert torch.equal(chance, torch.get_rng_state()) and all(p.grad is None for p in lm.parameters())
    assert all(torch.equal(t, before[name]) for name, t in lm.state_dict().items())


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_largest_batch_that_fits_is_named_and_fits(wrapped: bool) -> None:
    lm = LM(MOE).train()
    model, free = torch.nn.DataParallel(lm) if wrapped else lm, 400 * 10**6
    config = TrainConfig(steps=1, batch=5000, seq=128)
    with pytest.raises(UsageError, match=r"400 MB of memory that are free.*5000 rows of 128 tokens") as error:
        check_room(model, row(), config, free_bytes=free)
    batch, accumulate = map(int, re.findall(r"(?:batch|accumulate)=(\d+)", str(error.value)))
    assert batch * accumulate >= 5000 > batch * (accumulate - 1)
    check_room(model, row(), TrainConfig(steps=1, batch=batch, seq=128), free_bytes=free)
    with pytest.raises(UsageError, match="pass batch="):
        check_room(model, row(), TrainConfig(steps=1, batch=batch + 1, seq=128), free_bytes=free)
    with pytest.raises(UsageError, match="a smaller model"):
        check_room(model, row(), config, free_bytes=10**6)


def test_a_batch_that_no_machine_holds_is_refused_before_anything_is_written(tmp_path) -> None:
    texts = [Document(str(n), f"text number {n} and so on " * 9) for n in range(20)]
    tokens = prepare({"d": texts}, tmp_path / "t", vocab_size=260, held_out=0.3, quiet=True)
    lm = LM(LMConfig(260, width=64, layers=2, heads=2, max_seq=32))
    with pytest.raises(UsageError, match="batch must fit into the"):
        train(lm, tokens, TrainConfig(steps=1, batch=10**8, seq=32), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "run.json").exists()


LIMITED = """
import resource
from turnout.measure.memory import free_memory
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
assert 250 * 2**20 < free_memory() <= 300 * 2**20, free_memory()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits on addresses are read on Linux")
def test_a_limit_on_addresses_counts() -> None:
    subprocess.run([sys.executable, "-c", LIMITED], check=True, timeout=120)


def test_need() -> None:
    assert Need(100, 10).rows(99) == 0
