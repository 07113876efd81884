"""Which positions of a batch are tokens, where each of them stands in its text, and what each may look at."""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word

__all__ = ["Places", "find_places", "new_places", "real_tokens"]


class Cached(Protocol):
    """Of a cache, what it holds and which of that is tokens."""

    length: int
    real_BP: Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """The S new positions of B rows, and the T that they may look back to, themselves included.

    A token's place is the number of tokens before it in its row, padding left out; so a text is read the same wherever
    its padding stands.

    Args:
        real_BT: (B, T) bool, false at padding.
        new: S, how many of them are new.
        aside: whether attention must be told, because a token could look at padding: not where it all comes after.

    >>> places = Places(torch.tensor([[False, True, True]]), 3, True)
    >>> places.place_BT.tolist(), places.seen(None).int().tolist()
    ([[0, 0, 1]], [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]])

    Source: positions as the ``generate`` of transformers counts them.
    """

    real_BT: Tensor
    new: int
    aside: bool

    @property
    def real_BS(self) -> Tensor:
        """(B, S) bool, of the new positions."""
        return self.real_BT[:, -self.new :]

    @property
    def place_BT(self) -> Tensor:
        """(B, T) int64, the place of each token; of padding, one of no meaning."""
        return (self.real_BT.long().cumsum(1) - 1).clamp(min=0)

    def seen(self, window: int | None) -> Tensor:
        """(B, S, T) bool, what each new position attends to: tokens up to itself, and itself even if it is padding."""
        total = self.real_BT.shape[1]
        index_T = torch.arange(total, device=self.real_BT.device)
        behind_ST = index_T[-self.new :, None] - index_T
        seen_BST = self.real_BT.unsqueeze(1) & (behind_ST >= 0)
        if window is not None:
            place_BT = self.place_BT
            seen_BST &= place_BT[:, -self.new :, None] - place_BT.unsqueeze(1) < window
        return seen_BST | (behind_ST == 0)  # a softmax over nothing is not a number


def find_places(id_BS: Tensor, attention_mask: Tensor | None, cache: Cached | None) -> Places | None:
    """Where the tokens are among padding, new or cached; None where there is none."""
    length, before_BP = (0, None) if cache is None else (cache.length, cache.real_BP)
    if attention_mask is None:
        if before_BP is None:
            return None
        attention_mask = torch.ones_like(id_BS, dtype=torch.bool)
    real_BT = real_tokens(attention_mask, id_BS, before_BP, length)
    if real_BT is None:
        return None
    # What a cache is begun with looks at no padding either, where all of it comes after.
    after = length == 0 and bool((real_BT[:, 1:] <= real_BT[:, :-1]).all())
    after = after and (cache is None or bool(real_BT[:, -1].any()))
    return Places(real_BT, id_BS.shape[1], aside=not after)


def new_places(start: int, length: int, places: Places | None, device: torch.device) -> Tensor:
    """(S,) where the new tokens stand in their text, or (B, S) where attention is told of padding."""
    if places is not None and places.aside:
        return places.place_BT[:, -length:].to(device)
    return torch.arange(start, start + length, device=device)


def real_tokens(attention_mask: Tensor, id_BS: Tensor, before_BP: Tensor | None, length: int) -> Tensor | None:
    """(B, P + S) bool, which positions are tokens, those before included; None where all are.

    Args:
        attention_mask: (B, S) or (B, P + S), 1 or true at tokens; or (B,) whole numbers, how many tokens each row has
            before its padding.
        id_BS: the new tokens.
        before_BP: (B, P) what the cache holds is tokens; None where all of it is.
        length: P, how many positions the cache holds.

    Raises:
        ShapeError: another shape.
        UsageError: other values, or not what was said of the cached positions.
    """
    batch, new = id_BS.shape
    mask = attention_mask.to(id_BS.device)
    if mask.shape == (batch,) and mask.dtype != torch.bool and not mask.is_floating_point():
        _refuse(bool(((mask < 0) | (mask > new)).any()), mask, f"be from 0 to {new} tokens a row")
        mask = torch.arange(new, device=mask.device) < mask[:, None]
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (new, length + new):
        shapes = " or ".join(dict.fromkeys((f"({batch}, {new})", f"({batch}, {length + new})")))
        allowed, fix = f"have the shape {shapes}, or be {batch} lengths", "pass the tokenizer's attention_mask"
        raise ShapeError(word("attention_mask", got=tuple(mask.shape), allowed=allowed, where="LM", fix=fix))
    _refuse(bool(((mask != 0) & (mask != 1)).any()), mask, "be 1 (or true) at tokens and 0 (or false) at padding")
    real = mask.bool()
    if length:
        held_BP = before_BP if before_BP is not None else real.new_ones(batch, length)
        if mask.shape[1] == new:
            real = torch.cat((held_BP, real), 1)
        elif not torch.equal(real[:, :length], held_BP):
            allowed = "say of cached positions what was said when they were new"
            fix = "pass the mask of the new tokens alone, (B, S)"
            raise UsageError(word("attention_mask", got="another one", allowed=allowed, where="LM", fix=fix))
    return None if bool(real.all()) else real


def _refuse(wrong: bool, mask: Tensor, allowed: str) -> None:
    if wrong:
        got = f"values from {mask.min().item()} to {mask.max().item()}"
        fix = "pass the tokenizer's attention_mask, or the rows' lengths"
        raise UsageError(word("attention_mask", got=got, allowed=allowed, where="LM", fix=fix))
