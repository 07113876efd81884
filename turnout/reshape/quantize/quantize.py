"""Quantizing: a model whose maps are held in few bits, rounded to nearest or with their errors made good."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from turnout.errors import UsageError, nearest, word
from turnout.expects import expects
from turnout.measure.gap import logit_gap
from turnout.models import LM, LMConfig, QuantizedConfig
from turnout.models.checkpoint.own import stored
from turnout.models.part_configs import MAPS
from turnout.reshape.calibrate import checked, difference, evaluating, probe, refuse_no_text
from turnout.reshape.quantize.codebooks import Codebook, Codes, codebook
from turnout.reshape.quantize.gptq import gptq
from turnout.reshape.quantize.maps import Map, maps, planned_parts, work_layers
from turnout.reshape.quantize.moments import Stream
from turnout.reshape.quantize.nearest import Coded
from turnout.reshape.quantize.nearest import nearest as to_nearest
from turnout.reshape.rebuild import bill, rebuild
from turnout.reshape.resumable import by_layer
from turnout.types import Packed, Report

__all__ = ["PARTS", "quantize"]

_WHERE = "turnout.reshape.quantize"
PARTS = ("experts", "shared", "dense", "attention")
_METHODS = ("nearest", "gptq")
# Numbers of second moments that are factored at once, weights that are rounded to nearest at once; tokens that the
# change is measured on.
_ONCE, _PIECE, _MEASURED = 1 << 24, 1 << 20, 8192


@expects(lm=LM)
def quantize(
    lm: LM,
    *,
    bits: int = 4,
    group: int | None = 64,
    codes: Codes = "int",
    method: Literal["nearest", "gptq"] = "nearest",
    parts: Sequence[str] = PARTS,
    scale: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    packed: bool = True,
    damping: float = 0.01,
    act_order: bool = False,
    batches: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> tuple[LM, Report]:
    """The model with its maps in few bits: each weight a level of [-1, 1] times the scale of its group of inputs.

    Norms, routers, biases and embeddings stay; the output layer does unless "head" is a part. What comes out is run
    and saved as any model, not trained; ``densify`` writes its weights out again.

    Args:
        lm: a model with whole weights, left as it is.
        bits: 4 or 8; with ``packed`` off 3 to 8.
        group: how many neighbouring inputs share a scale; None for one scale a row.
        codes: what the codes stand for: "int", "float", "nf4" or "quantile"; 8 bits are held packed as "int" alone.
        method: "nearest", or "gptq", which looks at text and lets later inputs make good what rounding lost.
        parts: kinds of maps, of "experts", "shared", "dense", "attention" and "head"; those not there are passed over.
        scale: the dtype of scales.
        packed: whether the weights are held in few bits; else they are rounded, and held as before.
        damping: of GPTQ; see ``gptq`` in ``turnout.reshape.quantize.gptq``.
        act_order: of GPTQ too.
        batches: (B, S) token ids, for "gptq", and to compare on; random tokens when None.
        seed: of those tokens.

    Returns:
        The model; ``bits_per_weight`` of the maps with scales, each layer's |W' - W| / |W|, ``kl_nats`` (mean
        KL(before || after) a token), ``top1`` (how often the likeliest token is the same), the bill, bytes too.

    Raises:
        UsageError: bits that are not stored, a group that does not divide, unknown words, no text for "gptq".

    >>> from turnout.models import MoEConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, moe=MoEConfig(4, 2, hidden=8)))
    >>> small, report = quantize(lm, bits=4, group=8)
    >>> small.blocks[0].ff.bank.up.packed, report["bits_per_weight"]
    (Packed(4x16x8, bits=4, group=8), 6.0)

    Source: Dettmers and Zettlemoyer, 2023, "The case for 4-bit precision: k-bit Inference Scaling Laws"; Frantar et
    al., 2022, "GPTQ"; Dettmers et al., 2023, "QLoRA", for NF4. See each method's own file for where we differ.
    """
    text = checked(batches, lm, _WHERE)
    config = planned(lm.config, bits=bits, group=group, codes=codes, parts=parts, scale=scale, packed=packed)
    _check_method(method, text)
    held = planned_parts(config, parts)
    work = _Work(lm, bits, group, codes, held, getattr(torch, scale), packed, damping, act_order, text)
    new, told = _made(work, method, config)
    told |= {"method": method, "parts": list(held)} | bill(lm, new)
    return new, Report("quantize", told | _moved(lm, new, text or probe(lm, seed)))


def _check_method(method: str, text: tuple[Tensor, ...]) -> None:
    if method not in _METHODS:
        raise nearest(method, _METHODS, kind="method", where=_WHERE)
    if method == "gptq":
        refuse_no_text(text, "it rounds so that what maps make of it changes little", _WHERE)


def _made(work: "_Work", method: str, config: LMConfig) -> tuple[LM, dict[str, Any]]:
    """The model in few bits, and what its weights take and lost."""
    found = _rounded(work, method)
    told: dict[str, Any] = {"bits": work.bits, "group": work.group, "codes": work.codes, "packed": work.packed}
    told |= _sizes(work.lm, work.parts if work.packed else (), found)
    tensors = {name: part for piece in found.values() for name, part in piece.items() if "|" not in name}
    found.clear()  # each tensor is let go when the new model has it
    new = rebuild(work.lm, config, tensors)
    return new, told | {"weight_bytes_before": _bytes(work.lm), "weight_bytes_after": _bytes(new)}


def _rounded(work: "_Work", method: str) -> dict[int, Mapping[str, Tensor]]:
    """What becomes of each layer, the text going through those before it as they have become."""
    stream = Stream(work.lm, work.text) if method == "gptq" else None
    return by_layer(
        f"rounding to {work.bits} bits",
        work_layers(work.lm, work.parts),
        lambda layer: work.layer(layer, stream),
        then=lambda layer, piece: work.advance(layer, piece, stream),
    )


def planned(
    config: LMConfig,
    *,
    bits: int,
    group: int | None,
    codes: str = "int",
    parts: Sequence[str] = PARTS,
    scale: str = "bfloat16",
    packed: bool = True,
) -> LMConfig:
    """The configuration that ``quantize`` makes of this one.

    Raises:
        UsageError: as ``quantize``.
    """
    of = config.map_inputs()
    if isinstance(parts, str):
        fix = f"pass parts=({parts!r},)"
        raise UsageError(word("parts", got=repr(parts), allowed="be several words", where=_WHERE, fix=fix))
    for part in parts:
        if part not in MAPS:
            raise nearest(str(part), MAPS, kind="part", where=_WHERE)
    if config.moe is not None and config.moe.factored is not None and "experts" in parts:
        got, fix = "one with factored experts", "densify it first, or leave 'experts' out of the parts"
        raise UsageError(word("the model", got=got, allowed="have whole matrices", where=_WHERE, fix=fix))
    codebook("int" if codes == "quantile" else codes, bits)
    if packed and bits not in (4, 8):
        near = 8 if bits > 4 else 4
        fix = f"pass bits={near}, or packed=False to round the weights and hold them as before"
        raise UsageError(word("bits", got=bits, allowed="be 4 or 8, which are stored", where=_WHERE, fix=fix))
    chosen = planned_parts(config, parts)
    if not chosen or ("head" in parts and "head" not in chosen):
        tied = "head" in parts and config.tie_embeddings
        got = "'head', of a model whose output layer is the embedding" if tied else f"{tuple(parts)}"
        raise UsageError(
            word("parts", got=got, allowed=f"be of {', '.join(of)}", where=_WHERE, fix=f"pass parts={tuple(of)}")
        )
    quantized = QuantizedConfig(
        bits if packed else 8,  # pyrefly: ignore[bad-argument-type] - said above
        group,
        codes if packed else "int",  # pyrefly: ignore[bad-argument-type] - said above
        scale,  # pyrefly: ignore[bad-argument-type] - checked there
        chosen,
    )
    new = dataclasses.replace(config, quantized=quantized)  # groups are checked there
    return new if packed else config


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    """What is done to each layer."""

    lm: LM
    bits: int
    group: int | None
    codes: Codes
    parts: tuple[str, ...]
    scale: torch.dtype
    packed: bool
    damping: float
    act_order: bool
    text: tuple[Tensor, ...]

    @torch.no_grad()
    def layer(self, layer: int, stream: Stream | None) -> dict[str, Tensor]:
        """The layer's tensors by name; with "|" in it, the squares of what each map lost and had."""
        moments = {} if stream is None else stream.moments(layer, self.parts)
        found = dict[str, Tensor]()
        for one in maps(self.lm, layer, self.parts):
            found |= self._map(one, moments.pop(one.name, None))
        return {name: part.cpu() for name, part in found.items()}

    def _map(self, one: Map, moment_NII: Tensor | None) -> dict[str, Tensor]:
        """As ``layer``, of one map, a piece at a time: what takes eight bytes a weight stays small."""
        weight = one.weight
        group = weight.shape[-1] if self.group is None else self.group
        book = codebook(self.codes, self.bits, weight=weight, group=group)
        lost, had = torch.zeros(2, dtype=torch.float64, device=weight.device)
        parts, done = list[Tensor](), 0
        for piece, coded in self._coded(weight, moment_NII, book, group):
            real = coded.written_out()
            lost += (real - piece.float()).double().square().sum()
            had += piece.double().square().sum()
            held = coded.packed(self.scale) if self.packed else None
            made = (real.to(weight.dtype),) if held is None else (held.code, held.scale)
            shapes = [(*weight.shape[:-1], part.shape[-1]) for part in made]
            parts = parts or [
                weight.new_empty(shape, dtype=part.dtype) for part, shape in zip(made, shapes, strict=True)
            ]
            rows = len(made[0].flatten(0, -2))
            for part, some in zip(parts, made, strict=True):
                part.flatten(0, -2)[done : done + rows] = some.flatten(0, -2)
            done += rows
        found = {f"{one.name}|lost": lost, f"{one.name}|size": had}
        if not self.packed:
            return found | {one.name: (parts[0].transpose(1, 2) if one.is_stack else parts[0]).contiguous()}
        levels = {} if book.one_sided else {f"{one.name}.levels": book.level_N}
        return (
            found | {f"{one.name}.{name}": part for name, part in zip(("code", "scale"), parts, strict=True)} | levels
        )

    def _coded(
        self, weight: Tensor, moment_NII: Tensor | None, book: Codebook, group: int
    ) -> Iterator[tuple[Tensor, Coded]]:
        """Pieces of the weight, rows or matrices in their order, and what each becomes."""
        if moment_NII is None:
            for piece in weight.flatten(0, -2).split(max(1, _PIECE // weight.shape[-1])):
                yield piece, to_nearest(piece, book, group, dtype=self.scale)
            return
        once = max(1, _ONCE // weight.shape[-1] ** 2)
        how = {"damping": self.damping, "act_order": self.act_order, "dtype": self.scale}
        pieces = weight.view(-1, *weight.shape[-2:]).split(once), moment_NII.split(once)
        for piece, moment in zip(*pieces, strict=True):
            yield piece, gptq(piece, moment, book, group, **how)

    def advance(self, layer: int, piece: Mapping[str, Tensor], stream: Stream | None) -> None:
        """Lets the text go on behind the layer as it is now."""
        if stream is not None:
            stream.advance(layer, {one.name: self._real(one, piece) for one in maps(self.lm, layer, self.parts)})

    def _real(self, one: Map, piece: Mapping[str, Tensor]) -> Tensor:
        """A map's weights as they are now."""
        if not self.packed:
            return piece[one.name].transpose(1, 2) if one.is_stack else piece[one.name]
        group = one.weight.shape[-1] if self.group is None else self.group
        code, scale, levels = (piece.get(f"{one.name}.{name}") for name in ("code", "scale", "levels"))
        assert code is not None and scale is not None
        return Packed(code, scale, group, self.bits, levels).dequantised(one.weight.dtype)


def _sizes(before: LM, parts: tuple[str, ...], found: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What a weight of the maps takes, and each layer's error."""
    weights = sum(module.weight.numel() for layer in found for module in maps(before, layer, parts))
    held = [part for piece in found.values() for name, part in piece.items() if name.endswith((".code", ".scale"))]
    size = 8 * sum(part.nbytes for part in held) / max(weights, 1)
    layers = {}
    for layer, piece in found.items():
        lost, had = (sum(float(p) for name, p in piece.items() if name.endswith(end)) for end in ("|lost", "|size"))
        layers["head" if layer == len(before.blocks) else str(layer)] = math.sqrt(lost / max(had, 1e-300))
    return {
        "bits_per_weight": size if held else None,
        "relative_error": layers,
    }


def _bytes(lm: LM) -> int:
    return sum(tensor.nbytes for tensor in stored(lm).values())


@torch.no_grad()
def _moved(before: LM, after: LM, text: tuple[Tensor, ...]) -> dict[str, Any]:
    """How far the outputs moved, on all of the text; in nats and likeliest tokens on its beginning."""
    nats, same, seen = 0.0, 0, 0
    with evaluating(before, after):
        for row_1S in (row for id_BS in text for row in id_BS.split(1)):
            if seen >= _MEASURED:
                break
            gap = logit_gap(before(row_1S).logits_BSV, after(row_1S).logits_BSV)
            nats, same, seen = nats + float(gap.kl_N.sum()), same + int(gap.same_N.sum()), seen + len(gap.kl_N)
    return {"kl_nats": nats / seen, "top1": same / seen, "kl_tokens": seen} | difference(before, after, text)
