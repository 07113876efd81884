"""The norms of a decoder: by the root mean square, with weights stored as they are or less one, and layer norms."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.models.config import LMConfig
from turnout.models.fused import rms_norm

__all__ = ["LayerNorm", "Norm", "RMSNorm", "build_norm"]


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), in fp32 up to the weight, over the last axis.

    With ``plus_one`` the weight is stored less one, so that it starts at 0, and multiplies in fp32 as well.

    Source: Zhang & Sennrich, 2019, "Root Mean Square Layer Normalization"; rounded as transformers' LlamaRMSNorm, with
    ``plus_one`` as its GemmaRMSNorm.
    """

    def __init__(self, width: int, eps: float, *, plus_one: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one = nn.Parameter(torch.full((width,), 1.0 - plus_one)), eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as x."""
        if not self.plus_one:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x.float(), self.weight.float() + 1, self.eps).type_as(x)

    @property
    def gain(self) -> float:
        """The most that the root mean square of what comes out can be."""
        return float((self.weight.detach().float() + self.plus_one).abs().max())

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.weight.numel()}, eps={self.eps}" + (", plus_one=True" if self.plus_one else "")


class LayerNorm(nn.Module):
    """y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last axis.

    Source: Ba et al., 2016, "Layer Normalization".
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as x."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    @property
    def gain(self) -> float:
        """The most that the root mean square of what comes out can be."""
        weight, bias = self.weight.detach().float(), self.bias.detach().float()
        return float(weight.abs().max() + bias.square().mean().sqrt())

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.weight.numel()}, eps={self.eps}"


Norm = RMSNorm | LayerNorm


def build_norm(config: LMConfig, width: int) -> Norm:
    """The kind of norm that a configuration names."""
    if config.norm == "layer":
        return LayerNorm(width, config.norm_eps)
    return RMSNorm(width, config.norm_eps, plus_one=config.norm == "rms_plus_one")
