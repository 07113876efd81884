"""The same on a real CUDA device, where there is one."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from turnout.measure import bits_per_byte, certify
from turnout.measure.memory import free_on
from turnout.models.placed import roomy
from turnout.run import execute
from turnout.train import TrainConfig, train
from turnout.train.data import windows
from turnout.train.room import step_need
from turnout.types import ExpertWeights, Routing
from turnout.types.device import find_device, find_precision, there

sys.path.append(str(Path(__file__).parent))
from tables import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
models, runs = cases("models/test_lm.py"), cases("devices/test_runs.py")
tokens = runs.tokens


def test_it_is_found() -> None:
    device = find_device()
    assert device.type == "cuda" and torch.cuda.get_device_name(device) in "".join(there())
    assert 0 < free_on(device) <= torch.cuda.get_device_properties(device).total_memory
    assert roomy("auto", 2**60) == torch.device("cpu")
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    assert find_precision("auto", device) == ("bf16" if native else "fp32")


@pytest.mark.parametrize("name", models.VARIANTS)
@torch.no_grad()
def test_a_model_computes_there_what_it_does_here(name: str) -> None:
    lm = models.make(name)
    id_BS = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(lm).to("cuda")
    assert certify(lm, other, id_BS, bound=1e-4).equal
    drawn = [
        each.generate(id_BS.to(each.embedding.device), tokens=5, generator=torch.Generator().manual_seed(0)).cpu()
        for each in (lm, other)
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_training_there(tokens, tmp_path, dtype: str) -> None:
    bound = {"fp32": 1e-3, "auto": 3e-2}[dtype]
    lm, _ = runs.go(tokens, tmp_path / "here")
    other, _ = runs.go(tokens, tmp_path / "there", device="cuda", dtype=dtype)
    assert runs.losses(tmp_path / "there") == pytest.approx(runs.losses(tmp_path / "here"), rel=bound)
    peaks = [line["peak_memory_bytes"] for line in runs.lines(tmp_path / "there") if line["kind"] == "train"]
    assert 0 < peaks[0] <= peaks[-1] < 2**32
    found = [
        bits_per_byte(each.eval(), windows(tokens.held_out, batch=4, seq=32), tokens.byte_length_V).bits_per_byte
        for each in (lm, other)
    ]
    assert found[1] == pytest.approx(found[0], rel=bound)


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_going_on_on_another_device(tokens, tmp_path, first: str) -> None:
    second = "cpu" if first == "cuda" else "cuda"
    runs.go(tokens, tmp_path / "run", 9, device=first, dtype="fp32")
    whole = runs.losses(tmp_path / "run")
    _, said = runs.go(tokens, tmp_path / "run", 9, resume="step-00000006", device=second, dtype="fp32")
    assert f"began on {first} (fp32), goes on on {second} (fp32): not bit for bit." in said
    assert runs.losses(tmp_path / "run") == pytest.approx(whole, rel=1e-3)


def test_what_a_step_takes_is_foreseen() -> None:
    """Between 0.5 and 2 of the real peak."""
    big = runs.MODEL.__class__(4096, width=256, layers=4, heads=4, max_seq=256)
    lm = runs.LM(big).to("cuda").train()
    id_BS = torch.randint(4096, (16, 256), device="cuda")
    need = step_need(lm, runs.Batch(id_BS[:1].cpu(), id_BS[:1].cpu())).bytes(16)
    optimizer = torch.optim.AdamW(lm.parameters(), fused=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        lm.loss(id_BS, id_BS).nats.backward()
        optimizer.step()
    assert 0.5 < need / (torch.cuda.max_memory_allocated() - before) < 2


def test_a_step_without_room_says_what_would_fit(tokens, tmp_path) -> None:
    config = TrainConfig(steps=1, batch=10**7, seq=32, device="cuda")
    with pytest.raises(ValueError, match=r"of memory that are free on cuda:0.*pass batch="):
        train(runs.LM(runs.MODEL), tokens, config, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sort", "grouped", "kernels", "auto"])
def test_executors_against_the_reference(backend: str, dtype: torch.dtype) -> None:
    seeded = torch.Generator().manual_seed(0)
    weight_TK, index_TK = torch.rand(65, 8, generator=seeded).topk(2)
    x, up, down = (torch.randn(*shape, generator=seeded) * 0.3 for shape in ((65, 64), (8, 64, 128), (8, 64, 64)))
    routing = Routing.from_topk(index_TK.cuda(), weight_TK.cuda(), num_experts=8)
    found = []
    for name, kind in ((backend, dtype), ("reference", torch.float32)):
        tensors = [each.to(dtype).to("cuda", kind).requires_grad_() for each in (x, up, down)]
        y_TD = execute(tensors[0], routing, ExpertWeights(*tensors[1:]), backend=name)
        y_TD.float().square().sum().backward()
        found.append([y_TD.detach().float(), *(each.grad.float() for each in tensors)])
    bound = 1e-3 if dtype == torch.float32 else 3e-2
    for got, want in zip(*found, strict=True):
        assert float((got - want).norm() / want.norm()) < bound
