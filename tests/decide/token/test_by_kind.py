import pytest
import torch

from turnout.decide.token import ByKind, Skills
from turnout.errors import ShapeError, UsageError
from turnout.layers import MoE, given
from turnout.types import Given


def test_kinds_come_through_the_layer_and_padding_has_none():
    layer = MoE(8, 6, 3, router=ByKind(8, 3))
    kind_BS = torch.tensor([[0, 1, 2], [1, 1, 0]])
    with given(kind_BS=kind_BS):
        assert layer(torch.randn(2, 3, 8)).routing.dense().argmax(1).tolist() == kind_BS.flatten().tolist()
        real = torch.tensor([[True, True, False], [True, True, True]])
        assert layer(torch.randn(2, 3, 8), real=real).routing.load_E.tolist() == [2, 3, 0]
    with pytest.raises(UsageError, match="kind_BS"):
        layer(torch.randn(2, 3, 8))


def test_with_equal_weights_it_is_one_expert_and_kinds_do_not_touch_each_other():
    layer = MoE(8, 6, 2, router=ByKind(8, 2)).double()
    with torch.no_grad():
        layer.bank.up[1], layer.bank.down[1] = layer.bank.up[0], layer.bank.down[0]
    x, one = torch.randn(1, 5, 8).double(), torch.zeros(1, 5, dtype=torch.int64)
    with given(kind_BS=torch.tensor([[0, 1, 0, 1, 1]])):
        mixed = layer(x).output
    with given(kind_BS=one):
        torch.testing.assert_close(mixed, layer(x).output, rtol=1e-12, atol=1e-12)
        layer(x).output.square().sum().backward()
    assert not bool(layer.bank.up.grad[1].any()) and bool(layer.bank.up.grad[0].any())


def test_skills_outside_a_task_do_not_run():
    router = Skills(4, 5, top_k=3, table=[[0, 4], [1, 2, 4]])
    about = Given.of(2, 6, task_B=torch.tensor([1, 0]))
    assert router(torch.zeros(6, 4), given=about).load_E.tolist() == [3, 3, 3, 0, 6]
    for wrong in ([[5]], [[]], [[0, 0]], [[0, 1, 2, 3]], []):
        with pytest.raises(UsageError, match="table"):
            Skills(4, 5, top_k=3, table=wrong)
    with pytest.raises(UsageError, match="task_B"):
        router(torch.zeros(2, 4), given=Given.of(1, 2, task_B=torch.tensor([2])))
    with pytest.raises(ShapeError):
        ByKind(4, 5)(torch.zeros(3, 4), given=Given.of(1, 2, kind_T=torch.zeros(2, dtype=torch.int64)))
