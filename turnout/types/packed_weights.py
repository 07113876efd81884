"""PackedWeights: the experts of a bank in few bits, as executors see them."""

import dataclasses

import torch
from torch import Tensor

from turnout.types.packed import Packed
from turnout.types.weights import GATED, Activation, ExpertWeights


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeights:
    """E feed-forward experts in few bits, their matrices (out, in) as checkpoints store them; else as ExpertWeights.

    Args:
        up: (E, H, D), with H = 2F for a gated activation (the gates first) and F otherwise.
        down: (E, D, F).
        up_bias_EH: (E, H) or None.
        down_bias_ED: (E, D) or None.
        activation: as in ExpertWeights.

    >>> one = Packed.of(torch.zeros(4, 32, 8, dtype=torch.int8), torch.ones(4, 32, 1), group=8, bits=4)
    >>> other = Packed.of(torch.zeros(4, 8, 16, dtype=torch.int8), torch.ones(4, 8, 2), group=8, bits=4)
    >>> weights = PackedWeights(one, other)
    >>> weights.num_experts, weights.width, weights.hidden, tuple(weights.written_out(torch.float32).up_EDH.shape)
    (4, 8, 16, (4, 8, 32))

    Source: none; plain bookkeeping.
    """

    up: Packed
    down: Packed
    up_bias_EH: Tensor | None = None
    down_bias_ED: Tensor | None = None
    activation: Activation = "swiglu"

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.up.shape[2]

    @property
    def hidden(self) -> int:
        """F."""
        return self.down.shape[2]

    @property
    def gated(self) -> bool:
        """Whether the up product makes a gate as well as a value."""
        return self.activation in GATED

    def written_out(self, dtype: torch.dtype, expert_N: Tensor | None = None) -> ExpertWeights:
        """The same experts with every weight as a number of that dtype, or those of them that are named."""
        biases = [
            bias if bias is None or expert_N is None else bias[expert_N]
            for bias in (self.up_bias_EH, self.down_bias_ED)
        ]
        up, down = (packed if expert_N is None else packed.chosen(expert_N) for packed in (self.up, self.down))
        return ExpertWeights(
            up.dequantised(dtype).transpose(1, 2),
            down.dequantised(dtype).transpose(1, 2),
            *(None if bias is None else bias.to(dtype) for bias in biases),
            activation=self.activation,
        )
