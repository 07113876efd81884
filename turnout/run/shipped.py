"""What turnout knows of processors before it is calibrated on one: their measurements, and a rule for all others."""

import dataclasses
import functools
from collections.abc import Mapping

import torch

from turnout.types.processor import Processor
from turnout.types.tuning import Tuning

__all__ = ["has_onednn", "shipped"]

_Seconds = Mapping[str, Mapping[str, tuple[float, ...]]]
# One thread of an AMD EPYC 9005 (Zen 5, AVX-512, no AMX) with torch 2.13, where oneDNN's fp32 products run at 240 and
# MKL's at 108 GFLOP/s.
_ZEN5: _Seconds = {
    "cpu float32 forward": {
        "sort": (8.3e-05, 1.6e-05, 9.7e-12, 7.4e-09),
        "grouped": (6.6e-05, 1.4e-05, 4.3e-11, 0.0),
    },
    "cpu float32 training": {
        "sort": (0.0003, 0.00032, 1.3e-10, 1.3e-08),
        "grouped": (0.00049, 0.00019, 2.5e-10, 1.7e-09),
    },
    "cpu bfloat16 forward": {
        "sort": (0.00018, 2.3e-05, 1.2e-11, 0.0),
        "grouped": (9.4e-06, 6.7e-05, 0.0, 3.2e-09),
    },
    "cpu bfloat16 training": {
        "sort": (0.00062, 0.00027, 1.1e-10, 0.0),
        "grouped": (3.2e-05, 0.00039, 1.3e-10, 1.7e-08),
    },
}
# One thread of an AMD EPYC 9004 (Zen 4, AVX-512) with torch 2.13 and numba 0.68.
_ZEN4: _Seconds = {
    "cpu float32 forward": {
        "sort": (0.000838, 5.7e-05, 3.57e-11, 0.0),
        "grouped": (0.000482, 4.23e-05, 3.15e-11, 8.73e-10),
    },
    "cpu float32 training": {"sort": (0.00401, 0.00014, 9.07e-11, 0.0), "grouped": (0.00318, 0.000117, 8.96e-11, 0.0)},
    "cpu bfloat16 forward": {
        "sort": (0.000275, 7.65e-05, 1.87e-11, 0.0),
        "grouped": (0.000174, 7.57e-05, 2.33e-11, 2.12e-09),
    },
    "cpu bfloat16 training": {
        "sort": (0.00408, 0.000155, 5.89e-11, 0.0),
        "grouped": (0.00218, 0.000287, 9.07e-11, 0.0),
    },
}
_LEAST = 1 << 20
# By ``Processor.kind``.
_KNOWN = {
    "AuthenticAMD 26 AVX512": Tuning("", "", 1, onednn=_LEAST, onednn_turned=_LEAST, seconds=_ZEN5),
    # MKL 94, oneDNN 101 GFLOP/s at best, a sixth more in large products, and half of MKL's for gradients of small
    # experts, for which it turns the rows first.
    "AuthenticAMD 25 AVX512": Tuning(
        "", "", 1, onednn=1 << 30, group=1 << 19, packed_rows=64, tiled_rows=1024, tiled_rows_short=512, seconds=_ZEN4
    ),
}


@functools.cache
def has_onednn() -> bool:
    """Whether this torch computes fp32 products with MKL and carries oneDNN's beside it, so that there is a choice."""
    carried = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return carried and "BLAS_INFO=mkl" in torch.__config__.show()


def shipped(here: Processor, threads: int) -> Tuning:
    """What is known of this processor, or where it was never measured a rule.

    The rule: an AVX-512 processor that is not Intel's takes oneDNN, for which MKL has no AVX-512 path.

    >>> shipped(Processor("AMD EPYC", "AuthenticAMD 25 AVX512"), 1).origin
    'shipped'

    Source: none; measured, see docs/performance.md.
    """
    known = _KNOWN.get(here.kind)
    if known is None:
        wide = here.kind.endswith("AVX512") and not here.kind.startswith("GenuineIntel")
        least = _LEAST if wide else None
        taken = Tuning("", "", 1, onednn=least, onednn_turned=least, seconds=_ZEN5)
    else:
        taken = dataclasses.replace(known, origin="shipped")
    if not has_onednn():
        taken = dataclasses.replace(taken, onednn=None, onednn_turned=None)
    return dataclasses.replace(taken, processor=str(here), torch=torch.__version__, threads=threads)
