"""Grouped products for GPUs in Triton, with gather, activation and combine weight fused into them.

``executor`` is what the room exports and imports no Triton; ``dispatch``, ``forward`` and ``backward`` hold the kernels
and are imported when the first one runs. Without a GPU they run in Triton's interpreter (``TRITON_INTERPRET=1``, set
before the start), which is how their values and gradients are tested everywhere.
"""

from turnout.run.kernels.executor import kernels

__all__ = ["kernels"]
