"""product and linear equal torch's own, values and gradients, whichever kernel the machine prefers."""

import pytest
import torch

from turnout.run import product as module
from turnout.run.product import linear, onednn_is_faster, product

SIZES = [(1, 8, 8), (3, 5, 7), (130, 96, 257), (64, 256, 256), (33, 1024, 64)]
CAN_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def kernel(request, monkeypatch):
    if request.param and not CAN_ONEDNN:
        pytest.skip("this torch carries no oneDNN")
    monkeypatch.setattr(module, "onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(module, "_LEAST", 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_product(kernel, size, dtype):
    m, k, n = size
    generator = torch.Generator().manual_seed(m)
    a, b = torch.randn(k, m, generator=generator).to(dtype).t(), torch.randn(k, n, generator=generator).to(dtype)
    wanted = (a.double() @ b.double()).to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(product(a, b), wanted, rtol=tolerance, atol=tolerance * k**0.5)
    poisoned = torch.full((m, n), float("nan"), dtype=dtype)
    assert product(a, b, out_MN=poisoned) is poisoned
    torch.testing.assert_close(poisoned, wanted, rtol=tolerance, atol=tolerance * k**0.5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_linear_and_its_gradients(kernel, size, bias):
    m, k, n = size
    generator = torch.Generator().manual_seed(n)
    leaves = [torch.randn(*shape, generator=generator) for shape in ((2, m, k), (n, k), (n,))][: 3 if bias else 2]
    ours, torchs = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    y, z = linear(*ours), torch.nn.functional.linear(*torchs)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    y.sum().backward()  # an expanded gradient
    z.sum().backward()
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_linear_under_autocast_is_torchs(kernel):
    x, weight = torch.randn(64, 128), torch.randn(256, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_the_choice_is_a_rule_of_the_machine():
    assert onednn_is_faster() is onednn_is_faster()


def test_linear_compiles_to_torchs_own(kernel):
    assert torch.compile(linear, backend="eager")(torch.ones(4, 8), torch.ones(3, 8)).shape == (4, 3)
