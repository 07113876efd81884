"""product and linear equal torch's own, values and gradients, whichever kernel the machine prefers."""

import dataclasses

import pytest
import torch

from turnout.errors import UsageError
from turnout.run.product import _suits, linear, own_alone, product
from turnout.run.tuned import as_tuned, tuning

SIZES = [(1, 8, 8), (3, 5, 7), (130, 96, 257), (64, 256, 256), (33, 1024, 64), (96, 300, 16)]
CAN_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def least(number):
    return dataclasses.replace(tuning(), onednn=number, onednn_turned=number)


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def kernel(request):
    if request.param and not CAN_ONEDNN:
        pytest.skip("this torch carries no oneDNN")
    with as_tuned(least(0 if request.param else None)):
        yield


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
    leaves = [torch.randn(shape, generator=generator) for shape in ((2, m, k), (n, k), (n,))][: 3 if bias else 2]
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


def test_linear_compiles_to_torchs_own(kernel):
    assert torch.compile(linear, backend="eager")(torch.ones(4, 8), torch.ones(3, 8)).shape == (4, 3)


def torn(shape, *, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inference(*shape):
    with torch.inference_mode():
        return torn(shape)


BIASES = {
    "strided": lambda n: torn((n, 3))[:, 1],
    "backwards": lambda n: torn((n,)).flip(0),
    "expanded": lambda n: torn((1,)).expand(n),
    "shifted": lambda n: torn((n + 3,))[3:],
    "row of a matrix": lambda n: torn((2, n))[1],
    "learnt, strided": lambda n: torn((n, 2)).requires_grad_()[:, 0],
    "double": lambda n: torn((n,)).double(),
    "half": lambda n: torn((n,)).to(torch.bfloat16),
    "scalar": lambda n: torn(()),
    "one": lambda n: torn((1,)),
    "column": lambda n: torn((n, 1)),
    "too long": lambda n: torn((n + 1,)),
    "too short": lambda n: torn((n - 1,)),
    "meta": lambda n: torch.empty(n, device="meta"),
    "whole numbers": torch.arange,
    "negated": lambda n: torch.complex(torn((n,)), torn((n,))).conj().imag,
}
WEIGHTS = {
    "plain": lambda n, k: torn((n, k)),
    "transposed": lambda n, k: torn((k, n)).t(),
    "strided": lambda n, k: torn((n, 2 * k))[:, ::2],
    "every other row": lambda n, k: torn((2 * n, k))[::2],
    "expanded": lambda n, k: torn((1, k)).expand(n, k),
    "one number": lambda n, k: torn((1, 1)).expand(n, k),
    "negated": lambda n, k: torch.complex(torn((n, k)), torn((n, k))).conj().imag,
    "three axes": lambda n, k: torn((2, n, k)),
    "vector": lambda n, k: torn((k,)),
    "scalar": lambda n, k: torn(()),
    "too wide": lambda n, k: torn((n, k + 1)),
    "double": lambda n, k: torn((n, k)).double(),
    "sparse": lambda n, k: torn((n, k)).to_sparse_csr(),
    "made without a graph": inference,
}
TOKENS = {
    "plain": lambda m, k: torn((m, k)),
    "a batch, its axes turned": lambda m, k: torn((k, 2, m)).permute(1, 2, 0),
    "strided": lambda m, k: torn((m, 2 * k))[:, ::2],
    "expanded": lambda m, k: torn((1, k)).expand(m, k),
    "one row": lambda m, k: torn((k,)),
    "windows": lambda m, k: torn((m + k - 1,)).unfold(0, k, 1),
    "no row": lambda m, k: torn((0, k)),
    "no width": lambda m, k: torn((m, 0)),
    "scalar": lambda m, k: torn(()),
    "negated": lambda m, k: torch.complex(torn((m, k)), torn((m, k))).conj().imag,
}


def outcome(function, *given):
    """The result, or None where it is refused."""
    try:
        with torch.no_grad():
            return function(*given)
    except (RuntimeError, TypeError, IndexError, NotImplementedError, ValueError):
        return None


def judge(x, weight, bias, name):
    found, wanted = outcome(linear, x, weight, bias), outcome(torch.nn.functional.linear, x, weight, bias)
    assert (found is None) == (wanted is None)
    if found is not None and found.device.type == "cpu":
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, check_layout=False, msg=name)


@pytest.mark.filterwarnings("ignore:Sparse CS[RC]:UserWarning")
def test_linear_takes_and_refuses_what_torchs_does(kernel):
    m, k, n = 65, 128, 130
    for name, bias in BIASES.items():
        judge(TOKENS["plain"](m, k), WEIGHTS["plain"](n, k), bias(n), name)
    for name, weight in WEIGHTS.items():
        for bias in (None, torn((n,))):
            judge(TOKENS["plain"](m, k), weight(n, k), bias, name)
    for name, x in TOKENS.items():
        judge(x(m, k), WEIGHTS["plain"](n, k), torn((n,)), name)


@pytest.mark.parametrize("size", [4, 200])
def test_a_weight_without_numbers_is_refused(kernel, size):
    """torch itself gives whatever was in memory."""
    for bias in (None, torch.zeros(size)):
        with pytest.raises(UsageError, match="the devices of x and the weight"):
            linear(torch.ones(64, size), torch.empty(size, size, device="meta"), bias)


class Logged(torch.Tensor):
    """A subclass that sees every function."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_of_another_class_goes_to_torch(kernel):
    Logged.seen = []
    weight = torn((130, 128)).as_subclass(Logged)
    assert type(linear(torn((65, 128)), weight)) is Logged and "linear" in Logged.seen


def test_gradients_of_a_strided_bias(kernel):
    found = []
    for function in (linear, torch.nn.functional.linear):
        wide = torn((130, 3)).requires_grad_()
        function(torn((65, 128)), torn((130, 128)), wide[:, 1]).square().sum().backward()
        found.append(wide.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("limits", [(None, None), (1 << 10, None), (None, 1 << 10), (1 << 20, 1 << 12)])
def test_where_torchs_own_products_are_alone_none_goes_elsewhere(limits):
    a, b = torch.ones(16, 8), torch.ones(8, 16)  # 2^11 multiply-adds
    with as_tuned(dataclasses.replace(tuning(), onednn=limits[0], onednn_turned=limits[1])):
        elsewhere = [_suits(a, b, 1 << 11, turned=turned) for turned in (False, True)]
        assert own_alone(torch.float32, 1 << 11) == (not any(elsewhere))
        assert own_alone(torch.bfloat16, 1 << 40)
