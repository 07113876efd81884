"""The reference against formulas written out by hand, and the checks that all executors share."""

import pytest
import torch
from torch.nn import functional as F

from turnout.errors import ShapeError, UsageError
from turnout.run import activate, reference
from turnout.types import ExpertWeights, Routing


def test_formula_token_by_token():
    g = torch.Generator().manual_seed(0)
    x, weight_TE = torch.randn(5, 4, generator=g), torch.rand(5, 3, generator=g)
    weight_TE[0] = 0
    weight_TE[1, 2] = 0
    up, down = torch.randn(3, 4, 6, generator=g), torch.randn(3, 3, 4, generator=g)
    up_bias, down_bias = torch.randn(3, 6, generator=g), torch.randn(3, 4, generator=g)
    y = reference(x, Routing.from_dense(weight_TE), ExpertWeights(up, down, up_bias, down_bias))
    for t in range(5):
        expected = torch.zeros(4)
        for e in range(3):
            hidden = x[t] @ up[e] + up_bias[e]
            out = (F.silu(hidden[:3]) * hidden[3:]) @ down[e] + down_bias[e]
            expected += weight_TE[t, e] * out
        torch.testing.assert_close(y[t], expected)
    assert not y[0].any()


@pytest.mark.parametrize(
    "name, plain",
    [("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")), ("relu", F.relu)],
    ids=["silu", "gelu", "gelu_tanh", "relu"],
)
def test_gated_activations_take_the_gate_first(name, plain):
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    gated = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}[name]
    torch.testing.assert_close(activate(hidden, name), plain(hidden))
    torch.testing.assert_close(activate(hidden, gated), plain(hidden[:, :4]) * hidden[:, 4:])


def test_sums_in_fp32_whatever_the_dtype():
    """Eight equal experts of a third each: in bf16 the running sum would drift."""
    routing = Routing.from_dense(torch.full((1, 8), 1 / 3))
    weights = ExpertWeights(torch.ones(8, 1, 1).bfloat16(), torch.ones(8, 1, 1).bfloat16(), activation="relu")
    y = reference(torch.ones(1, 1).bfloat16(), routing, weights)
    assert y.dtype == torch.bfloat16 and y.item() == torch.tensor(8 / 3).bfloat16().item()


def test_user_mistakes():
    routing = Routing.from_dense(torch.ones(2, 3))
    good = ExpertWeights(torch.ones(3, 4, 6), torch.ones(3, 3, 4))
    for wrong in (
        ExpertWeights(torch.ones(2, 4, 6), torch.ones(2, 3, 4)),
        ExpertWeights(torch.ones(3, 5, 6), torch.ones(3, 3, 5)),
        ExpertWeights(torch.ones(3, 4, 6), torch.ones(3, 3, 4), activation="relu"),
    ):
        with pytest.raises(ShapeError):
            reference(torch.ones(2, 4), routing, wrong)
    with pytest.raises(ShapeError):
        reference(torch.ones(1, 2, 4), routing, good)
    with pytest.raises(UsageError, match="activation"):
        activate(torch.ones(2, 2), "tanh")
