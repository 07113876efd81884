"""The cases of other tests, to be run once more on another device."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType


@functools.cache
def cases(path: str) -> ModuleType:
    """A test module below ``tests``, for its tables and makers; its tests are not run again."""
    file = Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(f"cases_of_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
