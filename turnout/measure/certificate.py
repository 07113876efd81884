"""What was found when two models were compared, with what it takes to check it again: hashes, versions, numbers."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from turnout.errors import CheckpointError, TurnoutError, UsageError, word
from turnout.expects import expects
from turnout.fields import build, plain
from turnout.reading import check_fields, parse_json
from turnout.storage import check_seal, sealed, write_whole

__all__ = [
    "Certificate",
    "Gap",
    "Inputs",
    "Parting",
    "RoutingGap",
    "Side",
    "Verdict",
    "inputs_digest",
    "weights_digest",
]

Verdict = Literal["bit-equal", "within bound", "different"]
_FORMAT = "turnout.certificate/1"


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two models.

    Args:
        name: a path, or "A" and "B".
        kind: the class.
        weights_sha256: of its tensors, see ``weights_digest``; None for a function, which has none.
        config_sha256: of its configuration, where whoever loaded the model knows it.
        dtype: of its parameters.
        params: how many.
    """

    name: str
    kind: str
    weights_sha256: str | None
    config_sha256: str | None
    dtype: str
    params: int


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the two were run on: the hash tells whether it is the same again; the text itself is not kept."""

    sha256: str
    prompts: int
    tokens: int
    source: str


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far the logits are apart. None stands for a number that is not finite.

    Args:
        relative: the largest over positions of |b - a| / |a - mean(a)|, Euclidean over the vocabulary.
        max_abs: of any one logit.
        kl_mean: KL(A || B) in nats, the mean over positions.
        kl_max: the largest.
        top1: the share of positions where both have the same most likely token.
        prompt: the row, counted from 0, where ``relative`` is largest.
        position: the token in it.
        lost_a: positions where A's logits are no numbers (nan, +inf, or only -inf): they never count as equal.
        lost_b: the same of B.
    """

    relative: float | None
    max_abs: float | None
    kl_mean: float | None
    kl_max: float | None
    top1: float
    prompt: int
    position: int
    lost_a: int = 0
    lost_b: int = 0


@dataclasses.dataclass(frozen=True)
class RoutingGap:
    """One routed layer.

    Args:
        module: the router, by its name in A.
        experts: how many there are.
        tokens: how many tokens were routed.
        changed: how many of them have other experts in B.
        first: up to eight of those, as (prompt, position).
        margin: the largest lead, in A's scores, that an expert lost by a change had over one won; small ones are ties
            that rounding decides. None where no score is known or nothing changed.
        renamed: pairs (number in A, number in B) of the experts that B numbers otherwise; counted as no change.
        unused: experts of A that no token took: of them nothing is said.
    """

    module: str
    experts: int
    tokens: int
    changed: int
    first: tuple[tuple[int, int], ...]
    margin: float | None
    renamed: tuple[tuple[int, int], ...]
    unused: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where two models first part, in the order in which A runs.

    Args:
        layer: the block ("blocks.1"), or what lies outside the blocks: "embedding", "norm", "head".
        part: router, experts, shared expert, feed-forward, attention, norm, embedding, head, or residual.
        module: the innermost module whose inputs agree and whose outputs do not, by its name in A.
        relative: how far it is apart at the worst position; None where that is not finite.
        prompt: the row of that position.
        position: the token in it; None where rows of the tensor are no positions.
        experts: those that explain it, where ``part`` is "experts".
        changed: tokens that have other experts in that layer.
    """

    layer: str
    part: str
    module: str
    relative: float | None
    prompt: int
    position: int | None
    experts: tuple[int, ...] = ()
    changed: int = 0


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Whether B computes what A does, on these inputs, and where not.

    Args:
        verdict: "bit-equal", "within bound" or "different"; always the last where logits are no numbers, whatever their
            bits: ``logits.lost_a`` and ``lost_b`` count those positions.
        bound: the largest ``logits.relative`` that counts as equal.
        a: the first model.
        b: the second.
        inputs: what they ran on.
        logits: how far their outputs are apart.
        parted: where they first part; None unless the verdict is "different" and both are modules.
        layers: how far the output of each module is apart, in the order in which A runs; empty when bit-equal.
        routings: the routed layers that both have.
        names: the map from names in A to names in B that was asked for.
        notes: sentences that a reader must know.
        context: hardware, threads and versions.

    >>> from turnout.measure import certify
    >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    >>> certificate = certify(model, model, torch.arange(8)[None])
    >>> text = certificate.to_json()
    >>> certificate.verdict, Certificate.from_json(text).to_json() == text
    ('bit-equal', True)

    Source: none; what a comparison must say to be repeated.
    """

    verdict: Verdict
    bound: float
    a: Side
    b: Side
    inputs: Inputs
    logits: Gap
    parted: Parting | None
    layers: Mapping[str, float | None]
    routings: tuple[RoutingGap, ...]
    names: Mapping[str, str | None]
    notes: tuple[str, ...]
    context: Mapping[str, object]

    @property
    def equal(self) -> bool:
        """Whether B computes what A does, to the bound."""
        return self.verdict != "different"

    @property
    def lost(self) -> str:
        """Where logits are no numbers, so that nothing can be said of them; empty where all are."""
        counts = [("A", self.logits.lost_a), ("B", self.logits.lost_b)]
        found = [f"those of {letter} at {lost} of {self.inputs.tokens} positions" for letter, lost in counts if lost]
        return f"logits are not finite: {' and '.join(found)}" if found else ""

    def broken(self, a: Side, b: Side, inputs: Inputs) -> tuple[str, ...]:
        """What is no longer what was certified, a sentence each; empty when these are the same models and inputs."""
        found = []
        for letter, old, new in (("A", self.a, a), ("B", self.b, b)):
            for what, field in (("weights", "weights_sha256"), ("configuration", "config_sha256")):
                was, now = getattr(old, field), getattr(new, field)
                if was != now:
                    found.append(f"the {what} of {letter} ({new.name}) changed: certified {_short(was)}, {_short(now)}")
        if self.inputs.sha256 != inputs.sha256:
            was, now = _short(self.inputs.sha256), _short(inputs.sha256)
            found.append(f"the inputs are others: certified {was} ({self.inputs.source}), {now}")
        return tuple(found)

    def to_json(self) -> str:
        """The certificate as JSON text, sealed with the SHA-256 of its content. That is no signature."""
        body = {"format": _FORMAT, **plain(self)}
        return json.dumps(sealed(body), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The certificate that ``to_json`` wrote.

        Raises:
            CheckpointError: not a certificate, or altered since.
        """
        body = parse_json(text, _refuse)
        check_fields(body, {"format": Literal[_FORMAT], "sha256": str}, _refuse)
        check_seal(body, _refuse)
        fields = {name: item for name, item in body.items() if name not in ("format", "sha256")}
        try:
            return build(cls, fields, "the certificate")
        except (KeyError, TypeError, TurnoutError) as error:
            raise _refuse(str(error)) from error

    def save(self, path: str | Path) -> None:
        """Writes the JSON, aside first and then renamed."""
        write_whole(path, self.to_json() + "\n")

    def __str__(self) -> str:
        size = f"{self.inputs.prompts} prompts, {self.inputs.tokens} tokens ({self.inputs.source})"
        lines = [f"{self.verdict}: {self._sentence()}", f"  A              {_about(self.a)}"]
        lines += [f"  B              {_about(self.b)}", f"  inputs         {size}"]
        if self.verdict != "bit-equal":
            gap = self.logits
            where = f"worst at prompt {gap.prompt}, position {gap.position}"
            lines += [
                f"  relative       {_number(gap.relative)} (bound {_number(self.bound)}), {where}",
                f"  max abs        {_number(gap.max_abs)}",
                f"  KL per token   {_number(gap.kl_mean)} nats, at most {_number(gap.kl_max)}",
                f"  top-1          agrees on {100 * gap.top1:.6g} % of tokens",
            ]
        lines += [line for routing in self.routings if (line := _routing_line(routing))]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _sentence(self) -> str:
        if self.verdict == "bit-equal":
            return "B gives the very bits that A gives"
        if self.verdict == "within bound":
            return f"B computes what A does, to a relative {_number(self.bound)}"
        if self.lost and (self.parted is None or self.logits.lost_a):
            return f"nothing is certified, {self.lost}"
        if self.parted is None:
            return "B does not compute what A does"
        part = self.parted
        which = f" {', '.join(map(str, part.experts))}" if part.experts else ""
        where = part.layer if part.layer == part.part else f"{part.layer}, {part.part}"
        moved = f"; {part.changed} tokens have other experts there" if part.changed else ""
        return f"they part in {where}{which} ({part.module}, by {_number(part.relative)}{moved})"


@expects(model=nn.Module)
def weights_digest(model: nn.Module) -> str:
    """The SHA-256 of a model's tensors, as 64 hexadecimal digits, whatever their order and device.

    For each name of the state dict, sorted: the name, dtype and shape, then the bytes. One tensor at a time is copied,
    and only where it does not lie in one piece of CPU memory.

    Raises:
        UsageError: a tensor without data (on the meta device).

    >>> with torch.no_grad():
    ...     one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    ...     same = two.load_state_dict(one.state_dict())
    >>> weights_digest(one) == weights_digest(two)
    True

    Source: none; plain bookkeeping.
    """
    return _digest(model.state_dict().items())


def inputs_digest(items: Iterable[Tensor]) -> str:
    """The SHA-256 of tensors in their order."""
    return _digest((str(number), item) for number, item in enumerate(items))


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        if tensor.is_meta:
            fix = "load the weights first"
            raise UsageError(
                word(name, got="a tensor without data", allowed="have data", where="weights_digest", fix=fix)
            )
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _refuse(problem: str) -> CheckpointError:
    allowed, fix = f"be {_FORMAT} JSON, as it was written", "certify the two models again"
    return CheckpointError(
        word("the certificate", got=problem, allowed=allowed, where="Certificate.from_json", fix=fix)
    )


def _short(sha256: str | None) -> str:
    return "no hash" if sha256 is None else f"sha256 {sha256[:12]}..."


def _about(side: Side) -> str:
    return f"{side.name}: {side.kind}, {side.params:,} parameters, {side.dtype}, {_short(side.weights_sha256)}"


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _routing_line(routing: RoutingGap) -> str:
    parts = []
    if routing.changed:
        parts.append(f"{routing.changed} of {routing.tokens} tokens changed experts, first {_places(routing.first)}")
        if routing.margin is not None:
            parts.append(f"by a lead of at most {_number(routing.margin)}")
    if routing.renamed:
        pairs = ", ".join(f"{a}->{b}" for a, b in routing.renamed[:8])
        parts.append(f"B numbers {len(routing.renamed)} experts otherwise ({pairs})")
    if routing.unused:
        shown = ", ".join(map(str, routing.unused[:16]))
        parts.append(f"nothing is said of {len(routing.unused)} experts that no token took ({shown})")
    return f"  {routing.module}: {'; '.join(parts)}" if parts else ""


def _places(first: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{prompt}:{position}" for prompt, position in first[:3])
