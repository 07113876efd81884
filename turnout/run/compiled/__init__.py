"""Kernels for a CPU that numba compiles, where it is installed (``turnout[cpu]``): few rows at the speed of memory.

Importing this imports no numba; ``compiled_here`` says whether there is one.
"""

from turnout.run.compiled.engine import compiled_here, why_not_compiled
from turnout.run.compiled.rows import rows_times, suits_rows

__all__ = ["compiled_here", "rows_times", "suits_rows", "why_not_compiled"]
