"""The doctests run wherever the package's files load; those that need triton load with torch for CUDA alone."""

import importlib.util

from house import cuda_only, read

if importlib.util.find_spec("triton") is None:
    _modules = read()
    collect_ignore = [module.path for module in _modules if module.name in cuda_only(_modules)]
