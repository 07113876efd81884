"""The doctests run wherever the package's files load; those that need triton load with torch for CUDA alone.

A warning that torch gives once in a process is given whenever it is due, so that no test passes because of another.
What lives after a file of tests is left out of later collections: there are thousands of tests in one process.
"""

import gc
import importlib.util
from collections.abc import Generator
from typing import Any

import pytest
import torch

from house import cuda_only, read

if importlib.util.find_spec("triton") is None:
    _modules = read()
    collect_ignore = [module.path for module in _modules if module.name in cuda_only(_modules)]

torch.set_warn_always(True)


def _settle() -> None:
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """What was imported to collect the tests."""
    _settle()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: Any, nextitem: Any) -> Generator[None]:
    """What the files of tests before have imported and keep."""
    yield
    if nextitem is None or nextitem.path != item.path:
        _settle()
