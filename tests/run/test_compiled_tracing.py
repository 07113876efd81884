"""``torch.jit.trace`` sees nothing of compiled kernels: they step aside, and what was traced holds for other inputs."""

import pytest
import torch

from turnout.run.packed import packed_linear
from turnout.run.product import linear
from turnout.types import Packed

# torch calls its tracer old; what exports models by it still does.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
WEIGHT = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
PACKED = Packed.of((WEIGHT * 2).round().clamp(-8, 7).to(torch.int8), torch.ones(64, 2), group=32, bits=4)


@pytest.mark.parametrize("rows", [4, 240])
@pytest.mark.parametrize(("product", "weight"), [(linear, WEIGHT), (packed_linear, PACKED)])
def test_what_was_traced_holds_for_other_inputs(product, weight, rows, monkeypatch):
    g = torch.Generator().manual_seed(1)
    x, other = (torch.randn(rows, 64, generator=g) for _ in range(2))
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: product(x, weight), x, check_trace=False)
        monkeypatch.setenv("TURNOUT_COMPILED", "0")
        torch.testing.assert_close(traced(other), product(other, weight), rtol=1e-4, atol=1e-4)
