"""ExpertWeights: the stacked weights of a bank of feed-forward experts, as executors see them."""

import dataclasses
from typing import Literal

from torch import Tensor

Activation = Literal["swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "gelu", "gelu_tanh", "relu", "silu"]
GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai")
# Of "swiglu_oai": how steep its sigmoid is, and where gate (above) and value (on both sides) are clamped.
OAI_SLOPE, OAI_LIMIT = 1.702, 7.0


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertWeights:
    """E feed-forward experts as stacked tensors, in "input, output" order whatever the storage is.

    Expert e maps x_D to ``act(x_D @ up_EDH[e] + up_bias_EH[e]) @ down_EFD[e] + down_bias_ED[e]``. For a gated
    activation H = 2F, the first F columns are the gate and the last F the value: act(h) = g(h[:F]) * h[F:].
    With ``interleaved`` they alternate instead: column 2f is gate f, column 2f + 1 value f, and so in the bias. Any
    strides are allowed: checkpoints that store (out, in) pass ``weight.transpose(1, 2)`` and nothing is copied.

    Args:
        up_EDH: (E, D, H), with H = 2F for a gated activation and F otherwise.
        down_EFD: (E, F, D).
        up_bias_EH: (E, H) or None.
        down_bias_ED: (E, D) or None.
        activation: what lies between the two products; "swiglu_oai" is the clamped one of gpt-oss, "..._tanh" GELU by
            its tanh approximation.
        interleaved: whether gate and value alternate; of no meaning without a gate.

    >>> import torch
    >>> w = ExpertWeights(torch.zeros(4, 8, 32), torch.zeros(4, 16, 8))
    >>> w.num_experts, w.width, w.hidden, w.gated
    (4, 8, 16, True)

    Source: Shazeer, 2020, "GLU Variants Improve Transformer", for the gated activations; OpenAI, 2025,
    "gpt-oss-120b & gpt-oss-20b Model Card", with the constants of the released code, for "swiglu_oai".
    """

    up_EDH: Tensor
    down_EFD: Tensor
    up_bias_EH: Tensor | None = None
    down_bias_ED: Tensor | None = None
    activation: Activation = "swiglu"
    interleaved: bool = False

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up_EDH.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.up_EDH.shape[1]

    @property
    def hidden(self) -> int:
        """F."""
        return self.down_EFD.shape[1]

    @property
    def gated(self) -> bool:
        """Whether the up product makes a gate as well as a value."""
        return self.activation in GATED
