"""Few rows against a matrix, compiled: the values of a product in double precision, whatever the sizes and memory."""

import pytest
import torch

from turnout.errors import ShapeError, UsageError
from turnout.run.compiled import rows_times, suits_rows
from turnout.run.compiled.engine import array

pytestmark = pytest.mark.usefixtures("compiled")

DTYPES = (torch.float32, torch.bfloat16)
OFF = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def case(rows: int, ins: int, outs: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x_MI, weight_OI = (torch.randn(size, generator=generator).to(dtype) for size in ((rows, ins), (outs, ins)))
    return x_MI, weight_OI, torch.randn(outs, generator=generator)


def near(got, x_MI, weight_OI, bias_O=None) -> None:
    expected = x_MI.double() @ weight_OI.double().t() + (0 if bias_O is None else bias_O.double())
    assert got.dtype == x_MI.dtype and got.shape == expected.shape
    size = x_MI.double().abs() @ weight_OI.double().abs().t() + 1
    assert float(((got.double() - expected).abs() / size).max()) < OFF[got.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 31, 64])
def test_every_number_of_rows(rows, dtype):
    for ins, outs in ((1, 1), (7, 5), (33, 66), (96, 130)):
        x_MI, weight_OI, bias_O = case(rows, ins, outs, dtype)
        assert suits_rows(x_MI, weight_OI, bias_O)
        near(rows_times(x_MI, weight_OI, bias_O), x_MI, weight_OI, bias_O)
        near(rows_times(x_MI, weight_OI), x_MI, weight_OI)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_of_any_order(dtype):
    x_MI, weight_OI, bias_O = case(3, 40, 24, dtype)
    turned, padded = x_MI.t().contiguous().t(), torch.nn.functional.pad(weight_OI, (3, 5, 1, 0))[1:, 3:43]
    assert not turned.is_contiguous() and not padded.is_contiguous()
    near(rows_times(turned, padded, bias_O), x_MI, weight_OI, bias_O)
    near(rows_times(x_MI[:, ::2], padded[:, :20]), x_MI[:, ::2], weight_OI[:, :20])
    near(rows_times(x_MI[:, :20], padded[::3, 20:]), x_MI[:, :20], weight_OI[::3, 20:])
    near(rows_times(x_MI, weight_OI[:1].expand(24, 40)), x_MI, weight_OI[:1].expand(24, 40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_writes_where_it_is_told(dtype):
    x_MI, weight_OI, bias_O = case(2, 16, 9, dtype)
    out_MO = torch.full((2, 9), torch.nan, dtype=dtype)
    assert rows_times(x_MI, weight_OI, bias_O, out_MO=out_MO) is out_MO
    near(out_MO, x_MI, weight_OI, bias_O)


def test_nothing_to_sum_and_nothing_to_make():
    assert rows_times(torch.ones(2, 0), torch.ones(3, 0), torch.arange(3.0)).tolist() == [[0, 1, 2]] * 2
    assert rows_times(torch.ones(2, 3), torch.ones(0, 3)).shape == (2, 0)
    assert rows_times(torch.ones(0, 3), torch.ones(4, 3)).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(dtype):
    x_MI, weight_OI, _ = case(5, 40, 70, dtype)
    weight_OI[1, 3], weight_OI[2, 17], weight_OI[3, 0] = torch.nan, torch.inf, -torch.inf
    x_MI[:, 17], x_MI[:, 0] = 1, 1
    got = rows_times(x_MI, weight_OI)
    assert got[:, 1].isnan().all() and (got[:, 2] == torch.inf).all() and (got[:, 3] == -torch.inf).all()
    assert got[:, 4:].isfinite().all()


def test_two_threads_give_the_bits_of_one():
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for rows in (1, 2, 7):
                given = case(rows, 133, 300, dtype)
                torch.set_num_threads(1)
                one = rows_times(*given)
                torch.set_num_threads(2)
                assert torch.equal(rows_times(*given), one)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_named():
    x_MI, weight_OI, _ = case(2, 8, 4, torch.float32)
    with pytest.raises(ShapeError, match="M <= 64"):
        rows_times(torch.ones(65, 8), weight_OI)
    with pytest.raises(ShapeError, match=r"\(2, 8\), \(4, 7\)"):
        rows_times(x_MI, weight_OI[:, :7])
    with pytest.raises(ShapeError):
        rows_times(x_MI, weight_OI, torch.ones(3))
    for x, weight, out in (
        (x_MI.double(), weight_OI.double(), None),
        (x_MI.bfloat16(), weight_OI, None),
        (x_MI, weight_OI.t().contiguous().t(), None),
        (x_MI, weight_OI.to("meta"), None),
        (x_MI, weight_OI, torch.empty(4, 2).t()),
        (x_MI, weight_OI, torch.empty(2, 4, dtype=torch.bfloat16)),
    ):
        assert out is not None or not suits_rows(x, weight)
        with pytest.raises(UsageError, match="suits_rows"):
            rows_times(x, weight, out_MO=out)


def test_gradients_are_not_its_business():
    x_MI, weight_OI, _ = case(2, 8, 4, torch.float32)
    weight_OI.requires_grad_()
    assert not suits_rows(x_MI, weight_OI)
    with torch.no_grad():
        assert suits_rows(x_MI, weight_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_memory_that_a_kernel_has_seen_may_still_be_given_up(dtype):
    """FSDP2 gathers parameters into memory that it frees after use."""
    given = torch.arange(6).reshape(2, 3).to(dtype)
    seen = array(given)
    seen[1, 2] = seen[0, 0]
    assert given[1, 2] == given[0, 0] and array(given[:, 1:]).strides == (3 * given.itemsize, given.itemsize)
    assert array(given[:0]).shape == (0, 3)
    given.untyped_storage().resize_(0)
