"""Rotary position embedding: frequencies, their published stretchings, and the rotation itself."""

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from turnout.models.config import LMConfig
from turnout.models.padding import Places, new_places

__all__ = ["Rope", "attention_scale", "rotate_neighbours"]


class Rope(nn.Module):
    """The rotary angles of a model: position p turns pair i by p * theta^(-2i / d), stretched as configured.

    With a ``theta`` of its own it is that of the windowed layers, which nothing stretches.

    Frequencies stay in fp32 whatever the model is cast to: in bf16 the angles of far positions would be noise.

    >>> cos, sin = Rope(LMConfig(vocab_size=8, width=8, layers=1, heads=2))(0, 3, torch.float32)
    >>> cos.shape, cos[0].tolist(), sin[0].tolist()
    (torch.Size([3, 2]), [1.0, 1.0], [0.0, 0.0])

    Source: Su et al., 2021, "RoFormer"; stretched linearly (Chen et al., 2023, "Extending Context Window ... via
    Positional Interpolation"), by parts as Llama 3, by YaRN (Peng et al., 2023), or for long texts alone by LongRoPE
    (Ding et al., 2024): which frequencies all tokens of a batch have is decided by its longest row, padding on the
    right included, as transformers does it without position ids.
    """

    frequency_P: Tensor
    # Those of texts that end after so many positions; None for the same in all.
    long_P: Tensor | None

    def __init__(self, config: LMConfig, *, theta: float | None = None) -> None:
        super().__init__()
        self._width, self._theta, self._scaling = config.rotated_width, config.rope_theta, config.rope_scaling
        if theta is not None:
            self._theta, self._scaling = theta, None
        frequency_P, self.magnitude = self._frequencies()
        self.register_buffer("frequency_P", frequency_P, persistent=False)
        self.register_buffer("long_P", self._long(), persistent=False)

    def forward(
        self, start: int, length: int, dtype: torch.dtype, places: Places | None = None
    ) -> tuple[Tensor, Tensor]:
        """(S, P) each, cosine and sine of the angles at positions ``start`` to ``start + length``.

        Where attention is told of padding they are (B, S, P), at the places of the rows' tokens.
        """
        position_S = new_places(start, length, places, self.frequency_P.device).float()
        frequency_P = self.long_P if self._is_long(start + length, places) else self.frequency_P
        assert frequency_P is not None
        with torch.autocast(frequency_P.device.type, enabled=False):
            angle_SP = position_S.unsqueeze(-1) * frequency_P
        cos_SP, sin_SP = angle_SP.cos(), angle_SP.sin()
        if self.magnitude != 1:
            cos_SP, sin_SP = cos_SP * self.magnitude, sin_SP * self.magnitude
        return cos_SP.to(dtype), sin_SP.to(dtype)

    @property
    def border(self) -> int | None:
        """The most tokens of a text that has other frequencies than longer ones; None where all have the same."""
        return None if self.long_P is None else typing.cast(Any, self._scaling)["original_max_position_embeddings"]

    def changes(self, start: int, length: int, places: Places | None) -> bool:
        """Whether the first ``start`` positions were turned by other frequencies than they are with further ones."""
        if self.long_P is None or start == 0 or self._is_long(start, places):
            return False
        return self._is_long(start + length, places)

    def _is_long(self, end: int, places: Places | None) -> bool:
        if self.border is None:
            return False
        if places is not None and places.aside:
            end = int(places.place_BT[:, :end].max()) + 1
        return end > self.border

    def _long(self) -> Tensor | None:
        scaling: Mapping[str, Any] = self._scaling or {}
        if scaling.get("rope_type") != "longrope":
            return None
        return _stretched(self._width, self._theta, scaling["long_factor"])

    def _frequencies(self) -> tuple[Tensor, float]:
        plain_P = 1.0 / self._theta ** (torch.arange(0, self._width, 2, dtype=torch.float32) / self._width)
        scaling: Mapping[str, Any] = self._scaling or {"rope_type": "default"}
        if scaling["rope_type"] == "linear":
            return plain_P / scaling["factor"], 1.0
        if scaling["rope_type"] == "llama3":
            return _llama3(plain_P, scaling), 1.0
        if scaling["rope_type"] == "yarn":
            return _yarn(plain_P, self._theta, scaling)
        if scaling["rope_type"] == "longrope":
            return _stretched(self._width, self._theta, scaling["short_factor"]), scaling["attention_factor"]
        return plain_P, 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if not self.frequency_P.is_meta:
            with torch.device("cpu"):
                device = self.frequency_P.device
                self.frequency_P, long_P = self._frequencies()[0].to(device), self._long()
                self.long_P = None if long_P is None else long_P.to(device)
        return self


def rotate_neighbours(x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """The heads turned, pair i being positions 2i and 2i + 1; they come out as halves, which no product of two sees."""
    cos_S1P, sin_S1P = cos_SP.unsqueeze(-2), sin_SP.unsqueeze(-2)
    a, b = x_BSHP[..., 0::2], x_BSHP[..., 1::2]
    return torch.cat((a * cos_S1P - b * sin_S1P, b * cos_S1P + a * sin_S1P), dim=-1)


def attention_scale(config: LMConfig) -> float:
    """What the products of queries and keys are multiplied with: head_width^-1/2; more for latent YaRN models."""
    if config.attention_scale is not None:
        return config.attention_scale
    scale = config.head_width**-0.5
    scaling: Mapping[str, Any] = config.rope_scaling or {}
    all_dim = scaling.get("mscale_all_dim", 0)
    if config.attention == "mla" and all_dim:
        scale *= _magnitude(scaling["factor"], all_dim) ** 2
    return scale


def _magnitude(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _stretched(width: int, theta: float, factors: Sequence[float]) -> Tensor:
    share_P = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * theta**share_P)


def _llama3(plain_P: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    before = scaling["original_max_position_embeddings"]
    length_P = 2 * math.pi / plain_P
    slow_P = torch.where(length_P > before / low, plain_P / factor, plain_P)
    smooth_P = (before / length_P - low) / (high - low)
    between_P = (1 - smooth_P) * slow_P / factor + smooth_P * slow_P
    is_between_P = ~(length_P < before / high) * ~(length_P > before / low)
    return torch.where(is_between_P, between_P, slow_P)


def _yarn(plain_P: Tensor, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    factor, pairs = scaling["factor"], plain_P.numel()
    before = scaling["original_max_position_embeddings"]

    def pair_turning(turns: float) -> float:
        return 2 * pairs * math.log(before / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_turning(scaling.get("beta_fast") or 32)
    high = pair_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high = high + 0.001 if low == high else high
    ramp_P = ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    # As published: 1 - (1 - ramp) rather than ramp, for the same last bit.
    keep_P = 1 - ramp_P
    position_P = theta ** (torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / (2 * pairs))
    frequency_P = 1.0 / (factor * position_P) * (1 - keep_P) + 1.0 / position_P * keep_P
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        scale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = _magnitude(factor)
        if scale and all_dim:
            magnitude = _magnitude(factor, scale) / _magnitude(factor, all_dim)
    return frequency_P, float(magnitude)
