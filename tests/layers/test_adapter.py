"""A state dict says which adapters its stacked factors are."""

import pytest
import torch
from torch import nn

from turnout.decide.token import TopK
from turnout.errors import CheckpointError
from turnout.layers import Adapter
from turnout.paths import LoRA


def layer(names=("a", "b"), ranks=(2, 6), scales=(1.0, 0.5)) -> Adapter:
    bank = LoRA(8, 4, ranks=ranks, scales=scales, generator=torch.Generator().manual_seed(0))
    return Adapter(nn.Linear(8, 4), bank, TopK(8, 2, top_k=1), names=names)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        {"names": ("b", "a")},
        {"names": ("a", "c")},
        {"ranks": (6, 2)},
        {"scales": (0.5, 1.0)},
    ],
)
def test_the_state_of_other_adapters_or_of_another_order_is_refused(other, strict):
    state = layer().state_dict()
    with pytest.raises(CheckpointError, match=r"others than .*, or of these in another order"):
        layer(**other).load_state_dict(state, strict=strict)


@pytest.mark.parametrize("signed", [True, False])
def test_the_same_adapters_come_back_and_so_does_a_state_without_names(signed):
    one, two, x_TD = layer(), layer(), torch.ones(3, 8)
    with torch.no_grad():
        one.paths.up.fill_(0.5)
    state = one.state_dict()
    assert len(state["paths.signature_N3"]) == 2
    if not signed:
        del state["paths.signature_N3"]
    two.load_state_dict(state)
    assert torch.equal(one(x_TD), two(x_TD))
