"""Where a run trains, on which device and in which precision, and what that says about the run that it goes on with."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from turnout.models.placed import placed
from turnout.run.compiled import why_not_compiled
from turnout.run.tuned import tuning
from turnout.train.config import TrainConfig
from turnout.types.device import find_precision, shown

__all__ = ["Place", "crossing", "sent", "settle"]


@dataclasses.dataclass(frozen=True)
class Place:
    """What ``device`` and ``dtype`` of a configuration became.

    Args:
        device: where the model is.
        dtype: "fp32" or "bf16".

    >>> str(Place(torch.device("cpu"), "fp32"))
    'cpu (fp32)'

    Source: none; plain bookkeeping.
    """

    device: torch.device
    dtype: Literal["fp32", "bf16"]

    def __str__(self) -> str:
        return f"{self.device.type} ({self.dtype})"

    def to_json_dict(self) -> dict[str, Any]:
        """What run.json and checkpoints hold of it; on a CPU with all that its executors choose by."""
        at = {"device": str(self.device), "is": shown(self.device), "dtype": self.dtype}
        if self.device.type != "cpu":
            return at
        return at | {"executors": {**tuning().to_json_dict(), "compiled": why_not_compiled() or _compiler()}}


def settle(model: nn.Module, config: TrainConfig) -> Place:
    """Puts the model where the configuration says, or leaves it where it is with ``"auto"``.

    Raises:
        UsageError: no such device here, no room on it, or no bf16.
    """
    if config.device != "auto":
        placed(model, config.device)
    device = next((p.device for p in model.parameters() if p.requires_grad), torch.device("cpu"))
    return Place(device, find_precision(config.dtype, device))


def crossing(body: Mapping[str, Any], place: Place, here: str) -> Iterator[str]:
    """What a run that goes on must be told about the bits of its losses.

    Args:
        body: the checkpoint's state.json.
        place: where the run goes on.
        here: what its last bits depend on, in words, as ``body["arithmetic"]`` is.
    """
    then, before = body["arithmetic"], began(body)
    if before != (place.device.type, place.dtype):
        yield f"began on {before[0]} ({before[1]}), goes on on {place}: not bit for bit."
    elif then != here:
        yield f"saved with {then}, going on with {here}: losses may differ in the last bits."
    elif (before := _kernels(body.get("place"))) != (now := _kernels(place.to_json_dict())):
        yield (
            f"saved with kernels chosen by the tuning {before}, going on with {now}: "
            "losses may differ in the last bits. run.json holds the tuning of then, turnout doctor shows that of now."
        )
    elif place.device.type != "cpu":
        # index_add and the gradient of an embedding add with atomics there.
        yield f"on {place.device.type} sums are added in no fixed order: losses agree to rounding, not bit for bit."


def _kernels(place: Mapping[str, Any] | None) -> str:
    """The tuning by which kernels were chosen, and what compiled them; checkpoints of before say nothing of it."""
    kept = (place or {}).get("executors") or {}
    return f"{kept.get('digest', 'unknown')}, {kept['compiled']}" if "compiled" in kept else "of an older turnout"


def _compiler() -> str:
    return f"compiled by numba {importlib.metadata.version('numba')}"


def began(body: Mapping[str, Any]) -> tuple[str, str]:
    """Device type and precision that a checkpoint was saved on; older ones say it elsewhere.

    >>> began({"arithmetic": "cpu, 2 threads, torch 2.13", "config": {"dtype": "bf16"}})
    ('cpu', 'bf16')

    Source: none; plain bookkeeping.
    """
    place = body.get("place") or {"device": body["arithmetic"].partition(",")[0], "dtype": body["config"]["dtype"]}
    return place["device"].partition(":")[0], place["dtype"]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to CUDA while the CPU goes on, which takes memory that the system does not move."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
