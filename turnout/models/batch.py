"""A batch on its way through the blocks of a language model."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from turnout.models.attention import Angles
from turnout.models.padding import Places

__all__ = ["Batch"]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """What the first block reads, and what all blocks want to know beside what comes to them.

    Args:
        id_BS: the token ids.
        x_BSD: what goes into the first block.
        angles_L: each block's rotary angles, cosine and sine, (S, P) or (B, S, P).
        places: where padding is; None for none.

    Source: none; plain bookkeeping.
    """

    id_BS: Tensor
    x_BSD: Tensor
    angles_L: Sequence[Angles]
    places: Places | None = None
