"""What is special about grouped: the limits of torch's product."""

import pytest
import torch

from turnout.errors import UsageError
from turnout.run import grouped, reference
from turnout.types import ExpertWeights, Routing


@pytest.mark.parametrize(
    "dtype, width, hidden", [(torch.float32, 5, 3), (torch.bfloat16, 9, 7), (torch.bfloat16, 8, 16)]
)
def test_widths_that_are_no_multiple_of_16_bytes(dtype, width, hidden):
    g = torch.Generator().manual_seed(0)
    weights = ExpertWeights(
        torch.randn(3, width, 2 * hidden, generator=g).to(dtype), torch.randn(3, hidden, width, generator=g).to(dtype)
    )
    x, routing = torch.randn(6, width, generator=g).to(dtype), Routing.from_dense(torch.rand(6, 3, generator=g))
    torch.testing.assert_close(grouped(x, routing, weights), reference(x, routing, weights), rtol=5e-2, atol=5e-2)


def test_double_precision_is_refused_with_a_way_out():
    weights = ExpertWeights(torch.ones(1, 2, 4).double(), torch.ones(1, 2, 2).double())
    with pytest.raises(UsageError, match="backend='sort'"):
        grouped(torch.ones(1, 2).double(), Routing.from_dense(torch.ones(1, 1)), weights)
