"""Whether one model computes what another does: to the bit, within a bound, or not, and where they part.

First both run on all inputs, and their logits are compared. Where those have other bits, both run again with every
module watched; the first thing that a module takes, or is routed by, or gives, that is further apart than the bound is
where they part. The distance of two rows is |b - a| / |a|, where |a| is never less than its median over the rows, and
for logits is taken without its mean, which softmax does not see.

Modules are matched as the caller says, else by name, else by their place in the block of the same index, whatever its
parts are called there. Modules that only one has (a dense layer against experts) are passed over: what they do shows in
what contains them. Experts that B numbers otherwise, router and weights alike, are the same experts.

Rounding decides ties: a token whose experts lead by less than the bound may take others in B, and then its output is
another. That counts in the verdict. To find where else the two part, such a token and those after it are left out.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from turnout.errors import DataError, ShapeError, UsageError, word
from turnout.expects import CALLED, expects
from turnout.measure.certificate import (
    Certificate,
    Gap,
    Inputs,
    Parting,
    RoutingGap,
    Side,
    Verdict,
    inputs_digest,
    weights_digest,
)
from turnout.measure.gap import LogitGap, RouteGap, logit_gap, rename, route_gap, row_gap, same_bits
from turnout.measure.hardware import hardware
from turnout.measure.locate import Apart, Place, locate
from turnout.measure.observe import Key, Model, Record, evaluating, match, observe
from turnout.types import Packed, Routing

__all__ = ["certify", "describe", "measured"]

_WHERE = "turnout.measure.certify"
# What counts as equal when nothing is said, by the narrowest dtype of parameters and logits: some 500 roundings of
# fp32, 10 of bf16, whose errors grow with depth.
_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@expects(a=CALLED, b=CALLED)
def certify(
    a: Model,
    b: Model,
    inputs: Tensor | Iterable[Tensor],
    *,
    bound: float | None = None,
    names: Mapping[str, str | None] | None = None,
    labels: tuple[str, str] = ("A", "B"),
    source: str = "given",
) -> Certificate:
    """Whether B computes what A does on these inputs, how far apart they are, and in which layer they first part.

    "bit-equal": all logits have the same bits; "within bound": at every position |b - a| / |a| is at most ``bound``;
    "different" otherwise, and always where logits are no numbers. The top of the file says how modules are matched.

    Args:
        a: a module or function from ids (B, S) to logits (B, S, V), or to something with ``logits``.
        b: the other.
        inputs: (B, S) token ids, or several such, which are run one after the other.
        bound: what counts as equal, above 0; None for 1e-4, 1e-2 in fp16, 5e-2 in bf16, 1e-9 in fp64.
        names: modules of A -> their counterparts in B, with all that is inside; None for "none".
        labels: what to call the two.
        source: where the inputs come from, in a few words.

    Returns:
        The certificate. Of experts that took no token it says nothing, and lists them.

    Raises:
        UsageError: a bound that is not above 0, or a model that gives no logits.
        ShapeError: the two have other vocabularies.
        DataError: no inputs.

    >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    >>> certify(model, lambda id_BS: 2 * model(id_BS), torch.arange(8)[None]).verdict
    'different'

    Source: none; our own. It would have caught the corrupted placements of experts in vLLM #28377 and SGLang #32962.
    """
    items, names = _items(inputs), dict(names or {})
    with evaluating(a, b):
        study = _Study(a, b, items, names)
        limit, gap = _bound(bound, a, b, study.dtypes), study.logits()
        routes, apart = study.routes(limit), study.layers(limit)
    verdict = _verdict(gap, limit, same=not study.unlike)
    return Certificate(
        verdict=verdict,
        bound=limit,
        a=describe(a, labels[0]),
        b=describe(b, labels[1]),
        inputs=measured(items, source),
        logits=gap,
        parted=_parting(a, b, study.matched, apart, limit, gap) if verdict == "different" else None,
        layers=apart.outputs(),
        routings=routes,
        names=names,
        notes=(*_notes(a, b, apart, verdict, limit), *_unshown(study, verdict, limit, routes)),
        context=hardware(),
    )


def _verdict(gap: Gap, bound: float, *, same: bool) -> Verdict:
    """What the numbers say; ``same`` bits count only where the distance is a number."""
    if gap.relative is None or not gap.relative <= bound:
        return "different"
    return "bit-equal" if same else "within bound"


def describe(model: Model, name: str, *, config_sha256: str | None = None) -> Side:
    """What identifies a model in a certificate."""
    kind = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)
    if not isinstance(model, nn.Module):
        return Side(name, kind, None, None, "unknown", 0)
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters()})
    params = sum(tensor.numel() for tensor in model.parameters())
    few = (getattr(module, "packed", None) for module in model.modules())
    params += sum(math.prod(packed.shape) for packed in few if isinstance(packed, Packed))
    return Side(name, kind, weights_digest(model), config_sha256, ", ".join(kinds) or "none", params)


def measured(items: Iterable[Tensor], source: str) -> Inputs:
    """What identifies inputs in a certificate."""
    items = tuple(items)
    return Inputs(inputs_digest(items), sum(len(item) for item in items), sum(item.numel() for item in items), source)


class _Study:
    """Two models run on the same inputs: all logits first, and the modules of those inputs where they differ."""

    def __init__(self, a: Model, b: Model, items: tuple[Tensor, ...], names: Mapping[str, str | None]) -> None:
        self.a, self.b, self.items = a, b, items
        self.matched = match(a, b, names) if isinstance(a, nn.Module) and isinstance(b, nn.Module) else {}
        self.names_a = {name: name for name in self.matched}
        self.names_b = {other: name for name, other in self.matched.items()}
        self.first_row = [sum(len(item) for item in items[:n]) for n in range(len(items))]
        self.unlike: list[int] = []
        self.gaps: list[LogitGap] = []
        self.routings: dict[Key, list[tuple[Routing, Routing, int]]] = {}
        self.renamed: dict[Key, Tensor] = {}
        self.dtypes: set[torch.dtype] = set()
        for number, item in enumerate(items):
            self._compare(number, *self._run(item, values=False))

    def _run(self, item: Tensor, *, values: bool) -> tuple[Record, Record]:
        one = observe(self.a, item, self.names_a, values=values)
        return one, observe(self.b, item, self.names_b, values=values)

    def _compare(self, number: int, one: Record, other: Record) -> None:
        if not one.logits.numel() or not other.logits.numel():
            got, fix = f"logits of shape {tuple(one.logits.shape)}", "certify models with a vocabulary"
            raise ShapeError(word("the models", got=got, allowed="score at least one token", where=_WHERE, fix=fix))
        if one.logits.shape != other.logits.shape:
            got = f"{one.logits.shape[-1]} and {other.logits.shape[-1]} logits a token"
            fix = "certify models of one vocabulary"
            raise ShapeError(word("the models", got=got, allowed="score the same tokens", where=_WHERE, fix=fix))
        self.dtypes |= {one.logits.dtype, other.logits.dtype}
        if not same_bits(one.logits, other.logits):
            self.unlike.append(number)
        self.gaps.append(logit_gap(one.logits, other.logits))
        for key in one.order:
            a, b = one.routings.get(key), other.routings.get(key)
            if a is not None and b is not None and _alike(a, b):
                self.routings.setdefault(key, []).append((a, b, number))

    def logits(self) -> Gap:
        """The numbers over all inputs."""

        def joined(field: str) -> Tensor:
            return torch.cat([getattr(gap, field) for gap in self.gaps])

        relative_N, abs_N, kl_N = joined("relative_N"), joined("abs_N"), joined("kl_N")
        prompt, position = _place(int(relative_N.argmax()), [tuple(item.shape) for item in self.items])
        return Gap(
            relative=finite(float(relative_N.max())),
            max_abs=finite(float(abs_N.max())),
            kl_mean=finite(float(kl_N.mean())),
            kl_max=finite(float(kl_N.max())),
            top1=float(joined("same_N").double().mean()),
            prompt=prompt,
            position=position,
            lost_a=int((~joined("told_a_N")).sum()),
            lost_b=int((~joined("told_b_N")).sum()),
        )

    def routes(self, bound: float) -> tuple[RoutingGap, ...]:
        """The routed layers that both have, each once: by its router where that is a module that both have."""
        found = {}
        for key, pairs in self.routings.items():
            a, b = [one for one, _, _ in pairs], [other for _, other, _ in pairs]
            self.renamed[key] = rename(a, b, bound)
            parent = key[0].rpartition(".")[0]
            if (parent, key[1]) not in found:
                found[parent, key[1]] = self._route(key)
        return tuple(found.values())

    def _route(self, key: Key) -> RoutingGap:
        pairs, name_E = self.routings[key], self.renamed[key]
        gaps = [route_gap(a, b, name_E) for a, b, _ in pairs]
        first: list[tuple[int, int]] = []
        for gap, (_, _, number) in zip(gaps, pairs, strict=True):
            shape = tuple(self.items[number].shape)
            places = (_place(int(token), [shape]) for token in gap.changed_T.nonzero()[:8])
            first += [(row + self.first_row[number], position) for row, position in places]
        margins = [gap.margin for gap in gaps if gap.margin is not None]
        load_E = torch.stack([a.load_E for a, _, _ in pairs]).sum(0)
        return RoutingGap(
            module=key[0],
            experts=len(name_E),
            tokens=sum(a.num_tokens for a, _, _ in pairs),
            changed=sum(int(gap.changed_T.sum()) for gap in gaps),
            first=tuple(first[:8]),
            margin=max(margins, default=None),
            renamed=tuple((e, int(other)) for e, other in enumerate(name_E) if e != int(other)),
            unused=tuple((load_E == 0).nonzero().flatten().tolist()),
        )

    def layers(self, bound: float) -> Apart:
        """Every matched module, on the inputs where the logits differ; nothing when they are bit-equal."""
        apart = Apart()
        for number in self.unlike:
            one, other = self._run(self.items[number], values=True)
            apart.ran |= one.ran | {self.names_b.get(name, f"B:{name}") for name in other.ran}
            apart.ran_in_both |= one.ran & {self.names_b.get(name, "") for name in other.ran}
            place = Place(tuple(self.items[number].shape), self.first_row[number])
            for key in one.order:
                if key[2] == "routes":
                    if (gap := self._route_gap(key, one, other)) is not None:
                        apart.add_routing(key, gap, place, bound)
                elif (b := other.values.get(key)) is not None and b.shape == one.values[key].shape:
                    routing = one.routings.get((key[0], key[1], "routes"))
                    apart.add(key, row_gap(one.values[key], b), routing, place, bound)
        return apart

    def _route_gap(self, key: Key, one: Record, other: Record) -> RouteGap | None:
        a, b = one.routings[key], other.routings.get(key)
        return None if b is None or not _alike(a, b) else route_gap(a, b, self.renamed[key])


def _alike(a: Routing, b: Routing) -> bool:
    return (a.num_tokens, a.num_experts) == (b.num_tokens, b.num_experts)


def _items(inputs: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    items = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    wrong = [item for item in items if not isinstance(item, Tensor) or item.ndim != 2 or item.is_floating_point()]
    if wrong or not sum(item.numel() for item in items if isinstance(item, Tensor)):
        shape = f" of shape {tuple(wrong[0].shape)}" if wrong and isinstance(wrong[0], Tensor) else ""
        got = f"a {type(wrong[0]).__name__}{shape}" if wrong else "no tokens"
        fix = "pass ids[None] for one prompt, or a list of such"
        raise DataError(word("inputs", got=got, allowed="be whole numbers (B, S), at least one", where=_WHERE, fix=fix))
    return tuple(item.detach().cpu() for item in items if item.numel())


def _bound(bound: float | None, a: Model, b: Model, dtypes: set[torch.dtype]) -> float:
    if bound is not None:
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < math.inf:
            fix = "pass bound=1e-4, or None for one that fits the dtype; bit-equal is told without any"
            raise UsageError(word("bound", got=bound, allowed="be a number above 0", where=_WHERE, fix=fix))
        return float(bound)
    modules = [model for model in (a, b) if isinstance(model, nn.Module)]
    kinds = dtypes | {tensor.dtype for model in modules for tensor in model.parameters()}
    return max(_BOUNDS.get(kind, 0.0) for kind in kinds)


def _parting(a: Model, b: Model, matched: Mapping[str, str], apart: Apart, bound: float, gap: Gap) -> Parting | None:
    modules = isinstance(a, nn.Module) and isinstance(b, nn.Module)
    return locate(a, b, matched, apart, bound, gap) if modules and matched else None


def _place(index: int, shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """The (row, position) of a position counted through the inputs."""
    row = 0
    for rows, length in shapes[:-1]:
        if index < rows * length:
            return row + index // length, index % length
        index, row = index - rows * length, row + rows
    return row + index // shapes[-1][1], index % shapes[-1][1]


def finite(value: float) -> float | None:
    """The number; None where JSON has no word for it."""
    return value if math.isfinite(value) else None


def _notes(a: Model, b: Model, apart: Apart, verdict: str, bound: float) -> tuple[str, ...]:
    if not isinstance(a, nn.Module) or not isinstance(b, nn.Module):
        return (*_weak(bound), "layers were not compared: not both are modules")
    notes = list(_weak(bound))
    lonely = [sorted(apart.lonely(side)) for side in ("A", "B")]
    for letter, names in zip("AB", lonely, strict=True):
        if names:
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            notes.append(f"{len(names)} modules ran in {letter} only and were not compared ({shown})")
    if apart.tied:
        count, first = sum(apart.tied.values()), next(iter(apart.tied))[0]
        about = f"{count} times a token changed experts that are tied to the bound, first in {first}"
        notes.append(f"{about}; it and what follows it in its prompt are left out of the distances of layers")
    worst = max(apart.worst.items(), key=lambda pair: pair[1].relative, default=None)
    if verdict == "within bound" and worst is not None and worst[1].relative > bound:
        notes.append(f"inside, {worst[0][0]} is {worst[1].relative:.3g} apart, which the logits do not show")
    return tuple(notes)


def _unshown(study: _Study, verdict: str, bound: float, routes: Iterable[RoutingGap]) -> tuple[str, ...]:
    """What holds other numbers though the two agree: the embedding of a token that is in no input, an unused expert."""
    a, b = study.a, study.b
    if verdict == "different" or not isinstance(a, nn.Module) or not isinstance(b, nn.Module):
        return ()
    renamed = tuple(f"{gap.module.rpartition('.')[0]}." for gap in routes if gap.renamed)
    found, limit = [], 0.0 if verdict == "bit-equal" else bound
    for name, other in ({"": ""} | dict(study.matched)).items():
        ours, theirs = (dict(_own(side.get_submodule(at))) for side, at in ((a, name), (b, other)))
        for key in ours:
            full = f"{name}.{key}".removeprefix(".")
            if key in theirs and not full.startswith(renamed) and _unlike(ours[key], theirs[key], limit):
                found.append(full)
    if not found:
        return ()
    shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    where = "in numbers that these inputs do not reach, or that make no difference on them"
    return (f"other in B all the same: {shown}, {where}",)


def _own(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The parameters of a module itself, and the buffers that its state dict has."""
    yield from module.named_parameters(recurse=False)
    kept = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers(recurse=False) if name in kept)


def _unlike(a: Tensor, b: Tensor, limit: float) -> bool:
    """Whether a row of two tensors of one shape is further apart than that."""
    if a.shape != b.shape or not a.is_floating_point() or not b.is_floating_point() or torch.equal(a.to(b), b):
        return False
    a, b = (tensor.detach().cpu().reshape(-1, tensor.shape[-1] if tensor.ndim else 1) for tensor in (a, b))
    return len(a) > 0 and float(row_gap(a, b).max()) > limit


def _weak(bound: float) -> tuple[str, ...]:
    about = f"a bound of {bound:.3g} also lets through logits that are all zero: it says next to nothing"
    return (about,) if bound >= 1 else ()
