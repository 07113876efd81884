"""The mixture-of-experts layer: routed plus shared experts."""

import pytest
import torch
from torch import nn

from turnout.errors import ShapeError, UsageError
from turnout.layers import MoE
from turnout.types import Routing


class Even(nn.Module):
    """Token t goes to expert t mod E."""

    def __init__(self, width=8, num_experts=4):
        super().__init__()
        self.width, self.num_experts = width, num_experts

    def forward(self, x_TD, *, token_id_T=None, generator=None):
        index_TK = torch.arange(len(x_TD))[:, None] % self.num_experts
        return Routing.from_topk(index_TK, torch.ones(len(x_TD), 1), num_experts=self.num_experts)


def moe(**options):
    return MoE(8, 6, 4, router=Even(), std=0.3, generator=torch.Generator().manual_seed(0), **options)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def test_shared_expert_adds_to_the_routed_ones():
    with_shared = moe(shared_hidden=12)
    routed = with_shared.bank(X.view(10, 8), Even()(X.view(10, 8))).view(2, 5, 8)
    torch.testing.assert_close(with_shared(X).output, routed + with_shared.shared(X))


def test_gate_scales_the_shared_expert():
    gated = moe(shared_hidden=12, shared_gate=True)
    routed = gated.bank(X.view(10, 8), Even()(X.view(10, 8))).view(2, 5, 8)
    scale = torch.sigmoid(X @ gated.shared_gate[0])[..., None]
    torch.testing.assert_close(gated(X).output, routed + scale * gated.shared(X))


def test_every_parameter_is_reached():
    layer = moe(shared_hidden=12, shared_gate=True)
    layer(X).output.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_autocast():
    layer = moe(shared_hidden=12, shared_gate=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(X).output
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(X).output, rtol=5e-2, atol=5e-2)


def test_names_in_the_state_dict():
    assert list(moe(shared_hidden=12, shared_gate=True).state_dict()) == [
        "shared_gate",
        "bank.up",
        "bank.down",
        "shared.up",
        "shared.down",
    ]


def test_user_mistakes():
    with pytest.raises(ShapeError, match="width 9 and 4 experts"):
        MoE(8, 6, 4, router=Even(width=9))
    with pytest.raises(UsageError, match="shared_hidden"):
        moe(shared_gate=True)
