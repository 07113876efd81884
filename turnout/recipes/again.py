"""Where something is done again: on the device that it was done on, where that is here too."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from turnout.errors import UsageError
from turnout.reading import read_json
from turnout.recipes.run import Run
from turnout.types.device import find_device, find_precision

__all__ = ["as_before", "as_it_ran"]


def as_before(device: str, say: Callable[[str], None]) -> torch.device:
    """The device of that kind, or what "auto" takes where there is none here, which is said.

    Args:
        device: where it was done: "cpu", "cuda:0", "mps".
        say: is told that it is another.
    """
    kind = device.partition(":")[0]
    try:
        return find_device(kind)
    except UsageError:
        here = find_device()
        say(f"that was done on {kind}, this is done on {here.type}: numbers differ in rounding.")
        return here


def as_it_ran(run_json: str | Path, fields: Sequence[str], say: Callable[[str], None]) -> Run:
    """The run in a run.json with these fields changed, on the device and in the precision that it ran in.

    What its ``place`` says counts, for what it left to "auto" and where no field names another device; runs from before
    there was a ``place`` were on the CPU.

    Args:
        run_json: the file, or the folder that holds it.
        fields: ``name=value``, as ``Run.override`` takes them.
        say: is told what is not as it was.

    Raises:
        TurnoutError: there is no run, or a field that it does not have.
    """
    path = Path(run_json)
    run, train = Run.open(path), {}
    if not any(field.partition("=")[0] in ("device", "train.device") for field in fields):
        body = read_json(path / "run.json" if path.is_dir() else path, any_link=True)
        place = {"device": "cpu", "dtype": "fp32", **(body.get("place") or {})}
        device = as_before(place["device"], say) if run.train.device == "auto" else find_device(run.train.device)
        same = device.type == place["device"].partition(":")[0]
        train["device"] = device.type if run.train.device == "auto" else run.train.device
        if run.train.dtype == "auto":
            train["dtype"] = place["dtype"] if same else find_precision("auto", device)
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **train)).override(fields)
