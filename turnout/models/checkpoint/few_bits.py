"""Where the packed matrices of a folder lie in a model that holds them in few bits: views of its codes and scales."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from turnout.errors import CheckpointError, TurnoutError, word
from turnout.models.checkpoint import mxfp4
from turnout.models.checkpoint.compressed import Kind, pack, settings
from turnout.models.checkpoint.own import outline
from turnout.models.checkpoint.survey import Survey
from turnout.models.config import LMConfig
from turnout.models.families.family import Names
from turnout.models.families.tensors import Slot, slots
from turnout.models.lm import LM
from turnout.models.part_configs import QuantizedConfig
from turnout.paths import PackedWeight
from turnout.reading import Refuse
from turnout.types import Packed

__all__ = ["Held", "code_models", "held_config", "held_slots", "packed_tensors", "quantized_as"]


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """One matrix or stack of a folder, in a model that holds it in few bits.

    Args:
        code: the view of its codes, (O, I) or (E, O, I) in the folder's order; O may be two axes.
        scale: of its scales.
        owner: the module that holds it, perhaps with others.
    """

    code: Tensor
    scale: Tensor
    owner: PackedWeight

    @property
    def packed(self) -> Packed:
        """The matrix; a copy where others lie between its rows."""
        its, rows = self.owner, (self.code.ndim > 3) + 1
        code, scale = (one.contiguous().flatten(-1 - rows, -2) for one in (self.code, self.scale))
        return Packed(code, scale, its.group, its.bits, its.levels)

    def fill(self, packed: Packed) -> None:
        """Copies the matrix in, to the bit."""
        self.code.copy_(packed.code.view(self.code.shape))
        self.scale.copy_(packed.scale.view(self.scale.shape))
        if packed.levels is not None and self.owner.levels is not None:
            self.owner.levels.copy_(packed.levels)


def held_slots(lm: LM, names: Names) -> tuple[dict[str, Slot], dict[str, Held]]:
    """Every tensor that the folder of this model holds whole, and every matrix that it holds packed, by name.

    Args:
        lm: a model with maps in few bits.
        names: how the architecture names its tensors.
    """
    codes, scales, owners = code_models(lm, dataclasses.replace(lm.config, quantized=None))
    by_memory = {owner.code.untyped_storage()._cdata: owner for owner in owners.values()}
    scale_slots, whole, held = slots(scales, names), dict[str, Slot](), dict[str, Held]()
    for name, slot in slots(codes, names).items():
        owner = by_memory.get(slot.view.untyped_storage()._cdata)
        if owner is None:
            whole[name] = slot
        else:
            held[name] = Held(_rows(slot, names), _rows(scale_slots[name], names), owner)
    return whole, held


def code_models(lm: LM, plain: LMConfig) -> tuple[LM, LM, dict[str, PackedWeight]]:
    """A model with codes where weights would be and all else as it is, one with scales there, and whose they are.

    Codes and scales have a row for each row of weights, and whoever cuts maps by rows alone cuts them so.

    Args:
        lm: a model with maps in few bits.
        plain: its configuration, all whole; parts of it that the model has not stay without memory.
    """
    owners = {name: module for name, module in lm.named_modules() if isinstance(module, PackedWeight)}
    codes, scales = outline(plain), outline(plain)
    codes.rope = scales.rope = lm.rope
    for name, tensor in lm.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] not in owners:
            _put(codes, name, tensor)
    for name, owner in owners.items():
        _put(codes, name, owner.code)
        _put(scales, name, owner.scale)
    return codes, scales, owners


def _rows(slot: Slot, names: Names) -> Tensor:
    """The view with inputs last, where folders have them so when they are packed."""
    return slot.view.movedim(1, -1) if names.alternating and slot.view.ndim > 2 else slot.view


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, slot = name.rpartition(".")
    place = model.get_submodule(owner)
    is_buffer = slot in dict(place.named_buffers(recurse=False))
    setattr(place, slot, tensor.detach() if is_buffer else nn.Parameter(tensor.detach(), requires_grad=False))


def packed_tensors(lm: LM, names: Names, others: Iterable[Names]) -> tuple[dict[str, Slot], dict[str, Any]]:
    """What the folder of a model in few bits holds, by name, and the ``quantization_config`` that says so.

    Where experts are packed all scales are written in fp32: transformers multiplies experts out in the dtype of their
    scales, so that in bf16 they would come out rounded.

    Args:
        lm: the model.
        names: how the folder names its tensors.
        others: further ways to name them, by which modules that are whole are told too.
    """
    whole, held = held_slots(lm, names)
    packed = {name: one.packed for name, one in held.items()}
    if lm.config.quantized is not None and lm.config.quantized.codes == mxfp4.METHOD:
        bytes_of = {
            f"{name}{end}": Slot(part) for name, one in packed.items() for end, part in mxfp4.stored(one).items()
        }
        return whole | bytes_of, mxfp4.SETTINGS
    if lm.config.packs("experts") is not None:
        packed = {name: dataclasses.replace(one, scale=one.scale.float()) for name, one in packed.items()}
    found = dict(whole)
    for name, one in packed.items():
        found |= {f"{name.removesuffix('.weight')}{end}": Slot(part) for end, part in pack(one).items()}
    modules = {"lm_head"} if not any(name.startswith("lm_head.") for name in packed) else set()
    for each in (names, *others):
        kept = whole if each is names else held_slots(lm, each)[0]
        modules |= {name.removesuffix(".weight") for name, slot in kept.items() if slot.view.ndim == 2}
    modules = {name for name in modules if not name.endswith(("embed_tokens", ".experts.gate_up_proj"))}
    return found, settings(packed, modules)


def held_config(path: Path, found: Survey) -> LMConfig:
    """The configuration of the model in a folder, held in few bits as it is stored.

    Args:
        path: the folder.
        found: what it holds.

    Raises:
        CheckpointError: nothing there is packed, or not all of a kind in the same way.
    """

    def refuse(problem: str) -> CheckpointError:
        fix = "read it with packed=False, as the numbers that its weights stand for"
        allowed = "be packed by compressed-tensors or in MXFP4, all of a kind in the same way"
        return CheckpointError(word("the weights", got=problem, allowed=allowed, where=str(path), fix=fix))

    return quantized_as(found.config, found.packed.kinds, found.names, refuse)


def quantized_as(config: LMConfig, kinds: Mapping[str, Kind], names: Names, refuse: Refuse) -> LMConfig:
    """The configuration of a model that holds the packed matrices of a folder as they are stored.

    Args:
        config: of the model, all whole.
        kinds: of each matrix that is packed, by name.
        names: how the folder names its tensors.
        refuse: words what is wrong.

    Raises:
        TurnoutError: a kind of maps of which some are packed and others not, or in other ways: what ``refuse`` words.
    """
    if not kinds:
        raise refuse("none that are packed")
    by_row = all(kind.group == kind.inner and kind.codes == "int" for kind in kinds.values())
    ways = {(kind.bits, None if by_row else kind.group, kind.scale, kind.codes) for kind in kinds.values()}
    if len(ways) != 1:
        raise refuse(f"matrices packed in {len(ways)} ways, of which a model holds one")
    ((bits, group, scale, codes),) = ways
    said: dict[str, Any] = {"bits": bits, "group": group, "scale": scale, "codes": codes}
    parts = []
    for part in config.map_inputs():
        try:
            one = dataclasses.replace(config, quantized=QuantizedConfig(**said, parts=(part,)))
        except TurnoutError:  # its inputs are no multiple of the group: it cannot be packed
            continue
        wanted = set(held_slots(outline(one), names)[1])
        if missing := sorted(wanted - set(kinds)):
            if len(missing) < len(wanted):
                raise refuse(f"{missing[0]} whole, and others of its kind packed")
            continue
        parts.append(part)
    return dataclasses.replace(config, quantized=QuantizedConfig(**said, parts=tuple(parts)))
