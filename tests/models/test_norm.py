"""The kinds of norms, against torch's own and each other: values, gradients, dtypes, and how far they reach."""

import pytest
import torch
from torch import nn

from turnout.errors import UnknownNameError, UsageError
from turnout.models import LM, LMConfig
from turnout.models.norm import LayerNorm, RMSNorm, build_norm

CONFIG = LMConfig(vocab_size=8, width=8, layers=1, heads=2, norm_eps=0.1)


def given(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in ((3, 5, 8), (8,), (8,)))


@pytest.mark.parametrize("grad", [True, False])
def test_equal_to_torch(grad: bool) -> None:
    x, weight, bias = given()
    pairs = []
    for norm, other in (
        (LayerNorm(8, 0.1), nn.LayerNorm(8, eps=0.1)),
        (RMSNorm(8, 0.1), nn.RMSNorm(8, eps=0.1)),
        (RMSNorm(8, 0.1, plus_one=True), nn.RMSNorm(8, eps=0.1)),
    ):
        plus = float(isinstance(norm, RMSNorm) and norm.plus_one)
        norm.weight.data, other.weight.data = weight - plus, weight.clone()
        if isinstance(norm, LayerNorm):
            norm.bias.data, other.bias.data = bias, bias.clone()
        pairs.append((norm, other))
    with torch.set_grad_enabled(grad):
        for norm, other in pairs:
            a, b = x.clone().requires_grad_(grad), x.clone().requires_grad_(grad)
            torch.testing.assert_close(norm(a), other(b))
            if grad:
                norm(a).square().sum().backward()
                other(b).square().sum().backward()
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(norm.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-5)


def test_every_kind_starts_alike_and_is_built_everywhere() -> None:
    x = given()[0]
    for kind, name in (("rms", "RMSNorm"), ("rms_plus_one", "RMSNorm"), ("layer", "LayerNorm")):
        config = LMConfig(vocab_size=8, width=8, layers=2, heads=2, norm=kind, norm_place="both", qk_norm="head")
        norm = build_norm(config, 8)
        assert float(
            (norm(x.detach()).detach().square().mean(-1) - 1).abs().max()
        ) < 1e-3 and norm.gain == pytest.approx(1)
        norms = [module for part, module in LM(config).named_modules() if part.endswith("norm")]
        assert len(norms) == 2 * 6 + 1 and {type(module).__name__ for module in norms} == {name}


@pytest.mark.parametrize("kind", ["rms", "rms_plus_one", "layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays_and_the_gain_bounds_what_comes_out(kind: str, dtype: torch.dtype) -> None:
    x, weight, bias = given(1)
    norm = build_norm(LMConfig(vocab_size=8, width=8, layers=1, heads=2, norm=kind), 8)
    norm.weight.data = weight
    if isinstance(norm, LayerNorm):
        norm.bias.data = bias * 3
    out = norm.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert float(out.detach().double().square().mean(-1).sqrt().max()) <= norm.gain * 1.01


def test_what_does_not_go_together_is_refused() -> None:
    sizes = {"vocab_size": 8, "width": 8, "layers": 1, "heads": 2}
    with pytest.raises(UnknownNameError, match="rms_plus_one"):
        LMConfig(**sizes, norm="rms_plus")
    with pytest.raises(UsageError, match="attention_softcap must be None with sinks"):
        LMConfig(**sizes, sinks=True, attention_softcap=5.0)
    for name in ("attention_softcap", "logit_softcap", "local_rope_theta"):
        with pytest.raises(UsageError, match=f"{name} must be positive, or None"):
            LMConfig(**sizes, **{name: 0.0})
    assert LMConfig(vocab_size=8, width=6, layers=1, heads=2, rope_layers=()).head_width == 3  # nothing turns
    with pytest.raises(UsageError, match="even"):
        LMConfig(vocab_size=8, width=6, layers=1, heads=2)
