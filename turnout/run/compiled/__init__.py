"""Kernels for a CPU that numba compiles, where it is installed (``turnout[cpu]``): few rows at the speed of memory.

Importing this imports no numba; ``compiled_here`` says whether there is one.
"""

from turnout.run.compiled.engine import compiled_here, why_not_compiled
from turnout.run.compiled.rows import rows_times, suits_rows
from turnout.run.compiled.saved import kernels_path

__all__ = ["compiled_here", "kernels_path", "rows_times", "suits_rows", "why_not_compiled"]
