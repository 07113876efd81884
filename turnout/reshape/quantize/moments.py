"""What the inputs of each map are on text: their second moments, layer by layer, each layer behind those before it."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.models import LM
from turnout.models.batch import Batch
from turnout.models.carried import refuse_carry
from turnout.models.lm import Block
from turnout.paths import Bank
from turnout.reshape.calibrate import blocks, evaluating
from turnout.reshape.quantize.maps import Map, maps, with_weights
from turnout.run import activate
from turnout.run.product import instead_of_linear
from turnout.types import Routing

__all__ = ["Stream"]


class Stream:
    """Text on its way through a model whose layers are changed one after another.

    Args:
        lm: the model as it was.
        batches: (B, S) token ids.

    Source: Frantar et al., 2022, "GPTQ", section 4: a layer is calibrated behind the layers that were quantized before.
    """

    @torch.no_grad()
    def __init__(self, lm: LM, batches: Sequence[Tensor]) -> None:
        refuse_carry(lm, "read layer by layer", where="turnout.reshape.quantize")
        self._lm, self._layer = lm, 0
        with evaluating(lm):
            self._batches = [lm.begin(id_BS) for id_BS in batches]
        self._x: list[Tensor] = [batch.x_BSD for batch in self._batches]

    def advance(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Goes on to behind this layer, in which these weights by name stand in the place of its own."""
        while self._layer < min(layer + 1, len(self._lm.blocks)):
            block = blocks(self._lm)[self._layer]
            if self._layer == layer:
                block = with_weights(block, f"blocks.{layer}", weights)
            self._x = self._through(block)
            self._layer += 1

    def moments(self, layer: int, parts: Sequence[str]) -> dict[str, Tensor]:
        """By the name of each map of these kinds in a layer, (N, I, I) the sums of x x^T, N being 1 but for stacks.

        The output layer stands behind the last.
        """
        self.advance(layer - 1, {})
        found = {one.name: _zeros(one) for one in maps(self._lm, layer, parts)}
        if layer == len(self._lm.blocks):
            with torch.no_grad(), evaluating(self._lm):
                for x_BSD in self._x:
                    _add(found["head.weight"][0], self._lm.norm(x_BSD))
            return found
        with _watching(blocks(self._lm)[layer], maps(self._lm, layer, parts), found):
            self._through(blocks(self._lm)[layer])
        return found

    @torch.no_grad()
    def _through(self, block: Block) -> list[Tensor]:
        with evaluating(block):
            return [self._one(block, batch, x) for batch, x in zip(self._batches, self._x, strict=True)]

    def _one(self, block: Block, batch: Batch, x_BSD: Tensor) -> Tensor:
        call: dict[str, Any] = {"token_id_BS": batch.id_BS, "backend": "auto", "generator": None}
        if self._lm.pre_gate is not None:
            call["routing"] = self._lm.pre_gate(batch.id_BS, cache=None, places=batch.places)
        return block(x_BSD, batch.angles_L[self._layer], None, batch.places, **call)[0]


def _zeros(one: Map) -> Tensor:
    inner = one.weight.shape[-1]
    return one.weight.new_zeros(len(one.weight) if one.is_stack else 1, inner, inner, dtype=torch.float32)


def _add(moment_II: Tensor, x: Tensor) -> None:
    x_TI = x.reshape(-1, x.shape[-1]).float()
    moment_II.addmm_(x_TI.t(), x_TI)


@contextmanager
def _watching(block: Block, chosen: Sequence[Map], found: Mapping[str, Tensor]) -> Iterator[None]:
    """While this is open, the block's products add their inputs' moments to what was found."""
    names = {id(getattr(one.owner, one.slot)): one.name for one in chosen if not one.is_stack}

    def watched(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if (name := names.get(id(weight_OI))) is not None:
            _add(found[name][0], x)
        return F.linear(x, weight_OI, bias_O)

    stacks = {one.slot: one for one in chosen if one.is_stack}
    handles = []
    if stacks:
        bank = stacks["up"].owner
        assert isinstance(bank, Bank)
        handles.append(bank.register_forward_hook(_look(bank, found[stacks["up"].name], found[stacks["down"].name])))
    try:
        with instead_of_linear(watched):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _look(bank: Bank, up_EDD: Tensor, down_EFF: Tensor) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
    def look(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
        x_TD, routing = args[0], args[1]
        assert isinstance(routing, Routing)
        bounds, weights = routing.bounds(), bank.weights()
        for e, (start, end) in enumerate(itertools.pairwise(bounds)):
            if start == end:
                continue
            x_ND = x_TD[routing.token_R[start:end]]
            _add(up_EDD[e], x_ND)
            high_NH = x_ND @ weights.up_EDH[e]
            high_NH = high_NH if weights.up_bias_EH is None else high_NH + weights.up_bias_EH[e]
            _add(down_EFF[e], activate(high_NH, weights.activation))

    return look
