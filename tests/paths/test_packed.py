"""Modules of packed weights: what they hold, keep and refuse."""

import copy
import pickle

import pytest
import torch

from turnout.errors import UsageError
from turnout.paths import PackedBank, PackedFeedForward, PackedLinear, PackedWeight
from turnout.types import Packed, Routing

PACKS = {"bits": 4, "group": 8, "levels": True}


def filled(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for buffer in module.buffers():
        if buffer.dtype == torch.uint8:
            buffer.random_(0, 256, generator=generator)
        else:
            buffer.normal_(generator=generator)
    return module


def test_dtypes_stay_whatever_the_model_is_brought_to():
    weight = filled(PackedWeight(3, 16, **PACKS, scale=torch.float16))
    before = weight.packed.dequantised()
    for module in (weight.double(), weight.bfloat16(), weight.half(), weight.to("cpu", torch.float64), weight.float()):
        assert [buffer.dtype for buffer in module.buffers()] == [torch.uint8, torch.float16, torch.float32]
        assert torch.equal(module.packed.dequantised(), before)
    assert weight.to("meta").code.is_meta and weight.scale.dtype == torch.float16


def test_copies_and_state_dicts_are_exact():
    bank = filled(PackedBank(3, 16, 8, packs=PACKS, bias=True))
    other = PackedBank(3, 16, 8, packs=PACKS, bias=True)
    other.load_state_dict(bank.state_dict())
    for twin in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank)), other):
        assert all(
            torch.equal(a, b) for a, b in zip(bank.state_dict().values(), twin.state_dict().values(), strict=True)
        )
    with pytest.raises(RuntimeError, match=r"up\.scale"):
        other.load_state_dict({name: part for name, part in bank.state_dict().items() if "up.scale" not in name})


def test_only_what_fits_is_filled_in():
    weight = PackedWeight(2, 8, bits=4, group=4)
    packed = Packed.of(torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 2, dtype=torch.bfloat16), group=4, bits=4)
    assert torch.equal(weight.fill(packed).packed.dequantised(), torch.ones(2, 8))
    for wrong in (
        Packed.of(torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 2), group=4, bits=4),
        Packed.of(torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 1, dtype=torch.bfloat16), group=8, bits=4),
        Packed.of(torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 2, dtype=torch.bfloat16), group=4, bits=8),
    ):
        with pytest.raises(UsageError, match="packed must be"):
            weight.fill(wrong)


def test_nothing_in_few_bits_asks_for_gradients():
    for module in (PackedLinear(8, 4, packs=PACKS, bias=True), PackedFeedForward(8, 16, packs=PACKS, bias=True)):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert module(torch.ones(2, 8)).shape[0] == 2


def test_costs_are_those_of_whole_weights():
    bank = PackedBank(4, 16, 8, packs=PACKS)
    assert bank.cost(6, 12).params == 4 * (16 * 16 + 16 * 8) and bank.cost(6, 12).flops == 2.0 * 12 * (16 * 16 + 16 * 8)
    assert PackedFeedForward(16, 8, packs=PACKS).cost(3).flops == 2.0 * 3 * (16 * 16 + 16 * 8)


def test_a_bank_averages_its_experts():
    bank = filled(PackedBank(2, 16, 8, packs=PACKS))
    weight_BE = torch.tensor([[0.5, 0.5]])
    found = bank.merged(torch.ones(3, 16), Routing.from_dense(weight_BE), torch.zeros(3, dtype=torch.long))
    assert found.shape == (3, 16) and torch.isfinite(found).all()
