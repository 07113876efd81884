"""The maps of a language model that may be held in few bits, and blocks with other weights in their place."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from turnout.layers import MoE
from turnout.models import LM, LMConfig
from turnout.models.attention import Projection
from turnout.models.lm import Block
from turnout.paths import Bank, FeedForward
from turnout.reshape.calibrate import blocks
from turnout.wrappers import unwrapped

__all__ = ["HEAD", "Map", "maps", "with_weights", "work_layers"]

# Where the output layer stands among layers.
HEAD = "head"


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """One matrix of the model, or one stack of them.

    Args:
        name: of the weight, as in the state dict of the model.
        part: which kind of maps it is of, as ``QuantizedConfig.parts`` has them.
        owner: the module that holds it.
        slot: what it is called there.

    Source: none; plain bookkeeping.
    """

    name: str
    part: str
    owner: nn.Module
    slot: str

    @property
    def is_stack(self) -> bool:
        """Whether it is one matrix for each expert."""
        return isinstance(self.owner, Bank)

    @property
    def weight(self) -> Tensor:
        """(O, I), or (E, O, I) of a stack; writing to it writes the model's."""
        if isinstance(self.owner, Bank):
            return (self.owner.up_EDH if self.slot == "up" else self.owner.down_EFD).detach().transpose(1, 2)
        return getattr(self.owner, self.slot).detach()


def maps(lm: LM, layer: int, parts: Iterable[str]) -> list[Map]:
    """The maps of these kinds in a layer; the output layer stands behind the last."""
    parts = set(parts)
    if layer == len(lm.blocks):
        return [Map("head.weight", HEAD, lm.head, "weight")] if HEAD in parts and lm.head is not None else []
    return [one for one in _of(blocks(lm)[layer], f"blocks.{layer}") if one.part in parts]


def work_layers(lm: LM, parts: Iterable[str]) -> list[int]:
    """The layers that have such maps, in order; the output layer counts as one behind the last."""
    return [layer for layer in range(len(lm.blocks) + 1) if maps(lm, layer, parts)]


def _of(block: Block, name: str) -> list[Map]:
    found = [
        Map(f"{name}.attention.{each}.weight", "attention", module, "weight")
        for each, module in block.attention.named_modules()
        if isinstance(module, Projection)
    ]
    ff = unwrapped(block.ff)
    if isinstance(ff, FeedForward):
        return found + [Map(f"{name}.ff.{slot}", "dense", ff, slot) for slot in ("up", "down")]
    assert isinstance(ff, MoE)
    if isinstance(ff.bank, Bank):
        found += [Map(f"{name}.ff.bank.{slot}", "experts", ff.bank, slot) for slot in ("up", "down")]
    if isinstance(ff.shared, FeedForward):
        found += [Map(f"{name}.ff.shared.{slot}", "shared", ff.shared, slot) for slot in ("up", "down")]
    return found


@torch.no_grad()
def with_weights(block: Block, name: str, weights: Mapping[str, Tensor]) -> Block:
    """A copy of a block with these weights, (O, I) or (E, O, I) by name, in the place of its own."""
    new = copy.deepcopy(block)
    for one in _of(new, name):
        if one.name in weights:
            one.weight.copy_(weights[one.name])
    return new


def planned_parts(config: LMConfig, parts: Iterable[str]) -> tuple[str, ...]:
    """Those of the kinds that the model has, in the order given."""
    of = config.map_inputs()
    return tuple(part for part in parts if part in of)
