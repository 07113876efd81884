"""A part of a prompt, read by a model's modules layer by layer, with what went before in pages."""

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from turnout.models.contrast import ranked
from turnout.models.decoding.pages import Pages, Text
from turnout.models.lm import LM
from turnout.types import Routing

__all__ = ["Chunk", "read_chunk"]


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """What comes of a part.

    Args:
        hidden_1D: what the output layer reads after its last token.
        routings: of its tokens, in every routed layer; of the last token alone in the last layer.
    """

    hidden_1D: Tensor
    routings: tuple[Routing, ...]


class _Before:
    """What the modules take for a ``Cache``: a text's earlier positions come from its pages, and the new go there."""

    def __init__(self, pages: Pages, text: Text) -> None:
        self.length, self.real_BP = text.length, None
        self._pages, self._text = pages, text

    def update(self, layer: int, a_BHSP: Tensor, b_BHSP: Tensor) -> tuple[Tensor, Tensor]:
        """The new positions of a layer after those that the first of them sees."""
        pages, text = self._pages, self._text
        window, start = pages.windows[pages.group_L[layer]], self.length
        pages.write(text, layer, start, (a_BHSP, b_BHSP))
        if start == 0:
            return a_BHSP, b_BHSP
        # Copied even if it is one stretch of memory: where pages are decides nothing.
        before = pages.read(text, layer, 0 if window is None else max(0, start - window + 1), start)
        return torch.cat((before[0], a_BHSP), 2), torch.cat((before[1], b_BHSP), 2)


def read_chunk(lm: LM, pages: Pages, text: Text, id_S: Sequence[int]) -> Generator[None, None, Chunk]:
    """Reads the next tokens of a text, for which there are pages; half a layer between two ``next``.

    Nothing but the tokens and what went before them decides what comes out, to the bit; who runs in between does not.

    Args:
        lm: the model.
        pages: its memory.
        text: which.
        id_S: the tokens.
    """
    id_1S = torch.tensor([list(id_S)])
    before: Any = _Before(pages, text)
    batch = lm.begin(id_1S, cache=before)
    x_BSD, last = batch.x_BSD, len(lm.blocks) - 1
    routings: list[Routing] = []
    some: dict[str, Tensor] = {}
    for layer, (block, angles) in enumerate(zip(lm._blocks(), batch.angles_L, strict=True)):
        if layer == last:  # what can be compiled routes each token for itself
            some = {"only_B": torch.tensor([len(id_S) - 1])}
        call: dict[str, Any] = {"token_id_BS": id_1S, "backend": "auto", "generator": None, **some}
        if text.rank:
            call["detour"] = functools.partial(ranked(torch.tensor([text.rank])), len(routings))
        x_BSD = block.attended(x_BSD, angles, before, batch.places)
        yield
        with contextlib.nullcontext() if lm.experts is None else lm.experts.turn(text=text.number):
            x_BSD, routing = block.fed(x_BSD, batch.places, **call)
        if routing is not None:
            routings.append(routing)
        if layer < last:
            yield
    text.length += len(id_S)
    return Chunk(lm.norm(x_BSD)[:, -1], tuple(routings))
