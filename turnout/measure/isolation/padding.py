"""Probe: padding, of the victim by a longer neighbour, or of a neighbour; what lies under the mask must not matter."""

import torch
from torch import Tensor

from turnout.measure.isolation.finding import Finding
from turnout.measure.isolation.seen import Seen
from turnout.measure.isolation.subject import Layer, Model

__all__ = ["padding"]

_LONGER = (0, 1, 5, 20)


def padding(subject: Layer | Model, chance: torch.Generator, batches: int, bound: float) -> Finding:
    """Whether padding changes a victim's output: its own, after its text, or a neighbour's.

    A layer has no mask: there the padding is rows of zeros beside the victim's.

    Source: none; right padding as batches of transformers have it.
    """
    seen, victim = Seen(bound), subject.rows(1, chance)
    if isinstance(subject, Layer):
        for rows in (0, *range(1, 9)):
            seen.add(subject.run(torch.cat((victim, victim.new_zeros(rows, *victim.shape[1:]))))[0])
        fix = "leave padding out before the router: real= here, used_token= in DeepSpeed"
        return seen.finding("padding", "0 to 8 rows of zeros beside it", fix)
    if not subject.masks:
        return Finding("padding", "not run", 0, 0, 0.0, "it takes no attention_mask", "give it one, or never pad")
    for longer in _LONGER:
        for short in (False, True):
            for _ in range(2):  # other ids under the same mask
                row_BS, mask_BS = _padded(subject, victim, longer, short, chance)
                seen.add(subject.run(row_BS, mask_BS)[0, : subject.length])
    fix = "leave padding out of routing and attention: attention_mask must reach both"
    return seen.finding("padding", f"0 to {_LONGER[-1]} ids of padding after it, or after a neighbour", fix)


def _padded(subject: Model, victim: Tensor, longer: int, short: bool, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """The victim and three neighbours of which one is short, and which positions are tokens."""
    length = subject.length + longer
    row_BS = torch.randint(subject.vocabulary, (4, length), generator=chance).to(victim.device)
    mask_BS = torch.ones_like(row_BS)
    row_BS[0, : subject.length] = victim[0]
    mask_BS[0, subject.length :] = 0
    if short:
        mask_BS[1, subject.length // 2 :] = 0
    return row_BS, mask_BS
