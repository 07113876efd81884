"""Which device runs a model, and in what precision it trains there: what was asked for, held against what is there."""

from typing import Literal

import torch

from turnout.errors import UsageError, word
from turnout.fields import device_name

__all__ = ["check_name", "find_device", "find_precision", "shown", "there"]

_WHERE = "turnout.device"


def check_name(asked: object, where: str = _WHERE) -> str:
    """The name of a device as it is written, here or on another machine; whether it is there is not looked at.

    Args:
        asked: a text, or a ``torch.device``.
        where: who asks.

    Raises:
        UsageError: no such name.

    >>> check_name("cuda:1"), check_name(torch.device("cpu"))
    ('cuda:1', 'cpu')

    Source: none; torch's own names.
    """
    return device_name(str(asked) if isinstance(asked, torch.device) else asked, where)


def find_device(asked: object = "auto") -> torch.device:
    """The device of that name, which is there and answers.

    ``"auto"`` is the current CUDA device where there is one, else the CPU. MPS is taken by name only: nobody has yet
    held what is computed there against the CPU.

    Args:
        asked: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or a ``torch.device``.

    Raises:
        UsageError: no such name, or no such device here; says what there is.

    >>> find_device("cpu")
    device(type='cpu')

    Source: none; asks torch.
    """
    name = check_name(asked)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            why = "macOS 12.3 and an Apple GPU" if torch.backends.mps.is_built() else "a torch that is built with it"
            raise _missing(name, f"be one that is there: mps needs {why}", "pass device=cpu")
        return _answering(torch.device("mps"))
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        fix = "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or pass device=cpu"
        if not built:
            fix = "pass device=cpu, or install a torch that is built for CUDA (pytorch.org/get-started)"
        allowed = "be a device that torch sees" if built else f"be one that torch {torch.__version__} is built for"
        raise _missing(name, allowed, fix)
    index, count = torch.device("cuda" if name == "auto" else name).index, torch.cuda.device_count()
    if index is not None and index >= count:
        fix = f"pass device=cuda:{count - 1}"
        raise _missing(name, f"be one of {count}, counted from 0", fix)
    return _answering(torch.device("cuda", torch.cuda.current_device() if index is None else index))


def find_precision(asked: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """``"bf16"`` or ``"fp32"``: what training computes in on this device.

    ``"auto"`` is bf16 on a CUDA device that computes in it (NVIDIA since Ampere), else fp32. On a CPU bf16 is rarely
    faster, and on MPS nobody has measured it: both take it when it is asked for.

    Args:
        asked: ``"auto"``, ``"fp32"`` or ``"bf16"``.
        device: that is there.

    Raises:
        UsageError: bf16, on a device that has none.

    >>> find_precision("auto", torch.device("cpu")), find_precision("bf16", torch.device("cpu"))
    ('fp32', 'bf16')

    Source: Kalamkar et al., 2019, "A Study of BFLOAT16 for Deep Learning Training".
    """
    if asked == "auto":
        return "bf16" if device.type == "cuda" and _has_bf16(device, native=True) else "fp32"
    if asked == "bf16" and device.type in ("cuda", "mps") and not _has_bf16(device, native=False):
        got = f"bf16 on {shown(device)}, which has none"
        raise UsageError(word("dtype", got=got, allowed="be fp32 there", where=_WHERE, fix="pass dtype=fp32"))
    return asked


def shown(device: torch.device) -> str:
    """The device with the name of what it is, where torch knows it.

    >>> shown(torch.device("cpu"))
    'cpu'

    Source: none; asks torch.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def there() -> tuple[str, ...]:
    """Every device of this machine that a model can be put on, as ``shown`` shows it.

    >>> there()[0]
    'cpu'

    Source: none; asks torch.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [shown(torch.device("cuda", index)) for index in range(count)]
    return ("cpu", *found, *(["mps"] if torch.backends.mps.is_available() else []))


def _missing(name: str, allowed: str, fix: str) -> UsageError:
    got = f"{name}, and there is {', '.join(there())}"
    return UsageError(word("device", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _answering(device: torch.device) -> torch.device:
    """The device, after a first sum on it: a driver, a card or a torch that do not fit each other show there."""
    try:
        _first_sum(device)
    except RuntimeError as error:
        got = f"{shown(device)}, which answers: {str(error).strip().splitlines()[0]}"
        fix = "pass device=cpu, or mend what it says"
        raise UsageError(word("device", got=got, allowed="be able to compute", where=_WHERE, fix=fix)) from error
    return device


def _first_sum(device: torch.device) -> None:
    assert float(torch.ones(2, device=device).sum()) == 2


def _has_bf16(device: torch.device, *, native: bool) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=not native)
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device)
    except (TypeError, RuntimeError):
        return False
    return True
