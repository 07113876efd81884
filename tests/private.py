"""Private parts of torch that tests compare with: where torch moves one, a test must fail and not fall silent."""

import importlib
from types import ModuleType

import pytest
import torch

__all__ = ["private"]


def private(name: str) -> ModuleType:
    """The module; a failure that says what is missing where torch has it no more.

    Args:
        name: such as ``"torch.distributed.pipelining._schedule_visualizer"``.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        why = f"torch {torch.__version__} has no {name}, with which this test compares ({error})"
        pytest.fail(f"{why}: find where it went, or pin the torch that has it", pytrace=False)
