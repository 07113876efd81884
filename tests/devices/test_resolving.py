"""What becomes of ``device`` and ``dtype``, and what a device that is not there is answered."""

import contextlib
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

from turnout.errors import UsageError
from turnout.models.placed import placed, roomy
from turnout.recipes.again import as_before
from turnout.train import TrainConfig
from turnout.types import device as devices
from turnout.types.device import check_name, find_device, find_precision, shown, there


@contextlib.contextmanager
def machine(
    *, count: int = 0, built: str | None = "13.0", native: bool = True, mps: bool = False, answer: object = None
):
    """A machine with so many CUDA devices."""

    def first_sum(device: torch.device) -> None:
        if isinstance(answer, BaseException):
            raise answer

    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (torch.cuda, "is_available", lambda: count > 0),
            (torch.cuda, "device_count", lambda: count),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_name", lambda device: f"Card {torch.device(device).index}"),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation),
            (torch.cuda, "mem_get_info", lambda device: (10**9, 10**10)),
            (torch.cuda, "memory_reserved", lambda device: 0),
            (torch.cuda, "memory_allocated", lambda device: 0),
            (torch.version, "cuda", built),
            (torch.backends.mps, "is_available", lambda: mps),
            (devices, "_first_sum", first_sum),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield


def test_what_auto_takes() -> None:
    with machine(count=2):
        assert find_device() == find_device("cuda") == torch.device("cuda:0")
        assert find_device("cuda:1") == find_device(torch.device("cuda:1")) == torch.device("cuda:1")
        assert there() == ("cpu", "cuda:0 (Card 0)", "cuda:1 (Card 1)") and shown(find_device()) == "cuda:0 (Card 0)"
        assert find_precision("auto", find_device()) == "bf16" and find_precision("fp32", find_device()) == "fp32"
    with machine(count=1, native=False):
        assert find_precision("auto", find_device()) == "fp32", "emulated is no faster"
        assert find_precision("bf16", find_device()) == "bf16", "but it is what was asked for"
    with machine(mps=True):
        assert find_device() == torch.device("cpu"), "by name alone: nobody has held it against the CPU"
        assert find_device("mps") == torch.device("mps") and "mps" in there()
        assert find_precision("auto", torch.device("mps")) == "fp32"
    with machine():
        assert find_device() == torch.device("cpu") and find_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(
    ("asked", "on", "said"),
    [
        ("cuda", {"built": None}, r"built for in .*got cuda, and there is cpu.*pass device=cpu, or install a torch"),
        ("cuda:1", {}, r"torch sees.*got cuda:1, and there is cpu\. .*nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ("cuda:2", {"count": 2}, r"one of 2, counted from 0.*cuda:0 \(Card 0\), cuda:1 \(Card 1\).*pass device=cuda:1"),
        ("mps", {}, r"mps needs.*got mps.*pass device=cpu"),
        ("cuda", {"count": 1, "answer": RuntimeError("no kernel image\nmore")}, r"compute.*answers: no kernel image\."),
        ("gpu", {"count": 1}, r"auto, cpu, cuda, cuda:N .*got 'gpu'.*pass device=auto\."),
        ("cude", {"count": 1}, r"got 'cude'.*pass device=cuda\."),
        ("CPU", {}, r"got 'CPU'.*pass device=cpu\."),
        ("xpu:0", {}, r"got 'xpu:0'"),
        ("cuda:-1", {"count": 1}, r"got 'cuda:-1'"),
        ("", {}, r"got ''.*device=auto"),
        (None, {}, r"got None.*device=auto"),
        (0, {"count": 1}, r"got 0.*device=auto"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(asked: object, on: dict, said: str) -> None:
    with machine(**on), pytest.raises(UsageError, match=said):
        find_device(asked)


def test_a_configuration_holds_a_name_from_any_machine() -> None:
    sizes = {"steps": 1, "batch": 1, "seq": 1}
    assert TrainConfig(**sizes, device="cuda:7").device == check_name("cuda:7") == "cuda:7"
    with pytest.raises(UsageError, match=r"device must .* in TrainConfig; got 'gpu'"):
        TrainConfig(**sizes, device="gpu")
    with pytest.raises(UsageError, match="bf16"):
        TrainConfig(**sizes, dtype="fp16")


def test_bf16_where_there_is_none() -> None:
    with (
        machine(mps=True),
        mock.patch.object(devices, "_has_bf16", lambda device, native: False),
        pytest.raises(UsageError, match=r"dtype must be fp32 there.*got bf16 on mps.*pass dtype=fp32"),
    ):
        find_precision("bf16", torch.device("mps"))


def test_a_model_without_room_there_is_refused_or_stays() -> None:
    with machine(count=1):
        assert roomy("cuda", 10**8) == torch.device("cuda:0")
        with pytest.raises(UsageError, match=r"hold the 8.00 GB.*1.00 GB free on cuda:0 \(Card 0\).*device=cpu.*fit"):
            roomy("cuda", 8 * 10**9)
        with pytest.warns(UserWarning, match=r"on the CPU: 1.00 GB free on cuda:0"):
            assert roomy("auto", 8 * 10**9) == torch.device("cpu")
        assert roomy("cpu", 10**15) == torch.device("cpu"), "of the CPU others look after"
    model = nn.Linear(2, 2)
    assert placed(model, "cpu") is model
    with machine(mps=True), mock.patch("turnout.models.placed.free_on", lambda device: None):
        with pytest.raises(UsageError, match="float64 weights on mps"):
            placed(nn.Linear(2, 2, dtype=torch.float64), "mps")


def test_again_where_it_was() -> None:
    said: list[str] = []
    with machine(count=1):
        assert (
            as_before("cuda:3", said.append) == torch.device("cuda:0") and as_before("cpu", said.append).type == "cpu"
        )
        assert not said
    with machine(), warnings.catch_warnings():
        assert as_before("cuda:0", said.append).type == "cpu"
        assert said == ["that was done on cuda, this is done on cpu: numbers differ in rounding."]
