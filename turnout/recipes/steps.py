"""The steps of a conversion: what each makes of a configuration, what it needs, and the deed."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from turnout.errors import CheckpointError, UsageError, nearest, word
from turnout.fields import build, plain
from turnout.models import LM, LMConfig
from turnout.reshape import (
    compress_experts,
    densify,
    drop_experts,
    latent_experts,
    merge_experts,
    quantize,
    split,
    upcycle,
)
from turnout.reshape.quantize.quantize import PARTS
from turnout.reshape.quantize.quantize import planned as quantized
from turnout.reshape.to_smaller.compress_experts import planned as compressed
from turnout.reshape.to_smaller.densify import planned as written_out
from turnout.reshape.to_smaller.drop_experts import needed
from turnout.reshape.to_smaller.drop_experts import planned as dropped
from turnout.reshape.to_smaller.latent_experts import planned as shared
from turnout.reshape.to_smaller.merge_experts import planned as merged
from turnout.reshape.to_sparse.split import planned as cut
from turnout.reshape.to_sparse.upcycle import planned as upcycled
from turnout.types import Report

__all__ = [
    "Compress",
    "Densify",
    "Drop",
    "Latent",
    "Merge",
    "Quantize",
    "Split",
    "Step",
    "Upcycle",
    "step_from_json",
    "step_json",
]

Batches = Sequence[Tensor] | None


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Dense to sparse by copies; fields as in ``turnout.reshape.upcycle``.

    Source: see ``turnout.reshape.upcycle``.
    """

    num_experts: int
    top_k: int
    granularity: int = 1
    name: ClassVar[str] = "upcycle"

    def planned(self, config: LMConfig) -> LMConfig:
        """The configuration afterwards."""
        return upcycled(config, num_experts=self.num_experts, top_k=self.top_k, granularity=self.granularity)

    def why_text(self, config: LMConfig) -> str | None:
        """What it would look at text for; None."""
        return None

    def run(self, lm: LM, batches: Batches, seed: int) -> tuple[LM, Report]:
        """The model afterwards, and what changed."""
        sizes = {"num_experts": self.num_experts, "top_k": self.top_k, "granularity": self.granularity}
        return upcycle(lm, **sizes, batches=batches, seed=seed)


@dataclasses.dataclass(frozen=True)
class Split:
    """Dense to sparse by dealing out neurons; fields as in ``turnout.reshape.split``.

    Source: see ``turnout.reshape.split``.
    """

    num_experts: int
    top_k: int
    by: Literal["cluster", "coactivation", "gradient", "random"] = "cluster"
    name: ClassVar[str] = "split"

    def __post_init__(self) -> None:
        _check_by(self.by, Split)

    def planned(self, config: LMConfig) -> LMConfig:
        """The configuration afterwards."""
        return cut(config, num_experts=self.num_experts, top_k=self.top_k)

    def why_text(self, config: LMConfig) -> str | None:
        """What it looks at text for."""
        return f"{self.by!r} looks at the neurons on it" if self.by in ("coactivation", "gradient") else None

    def run(self, lm: LM, batches: Batches, seed: int) -> tuple[LM, Report]:
        """The model afterwards, and what changed."""
        return split(lm, num_experts=self.num_experts, top_k=self.top_k, by=self.by, batches=batches, seed=seed)


@dataclasses.dataclass(frozen=True)
class Drop:
    """Fewer experts: ``share`` of each layer's, in [0, 1), or ``count`` of them go.

    Source: see ``turnout.reshape.drop_experts``.
    """

    share: float | None = None
    count: int | None = None
    by: Literal["reap", "frequency", "random"] = "reap"
    name: ClassVar[str] = "drop_experts"

    def __post_init__(self) -> None:
        _check_by(self.by, Drop)

    def planned(self, config: LMConfig) -> LMConfig:
        """The configuration afterwards."""
        whole = self.count is not None and self.count >= 0 and self.share is None
        part = self.share is not None and 0 <= self.share < 1 and self.count is None
        if not whole and not part:
            got = self.count if self.share is None else f"{100 * self.share:g}%"
            allowed = "be a whole number of at least 1, or a share above 0 and below 100%,"
            raise _no_drop("count", got, allowed, "pass count=1, or a quarter: 25%")
        if config.moe is not None:
            groups, least = needed(config.moe)
            experts, most = config.moe.num_experts, (config.moe.num_experts - least) // groups * groups
            if (self.count or 0) > most or (self.share or 0) * experts >= most + groups:
                allowed = f"leave the top_k={config.moe.top_k} of {experts} experts that a token takes"
                if groups > 1:
                    allowed = f"leave {least} of {experts} experts, in {groups} groups, for a token to choose from"
                got = self.count if self.share is None else f"{100 * self.share:g}%"
                raise _no_drop("count", got, allowed, f"pass count={most}" if most else "leave it out: none can go")
            if (self.count or 0) % groups:
                near = -(-(self.count or 0) // groups) * groups
                allowed = f"be a multiple of {groups}: as many from each of the {groups} groups of experts,"
                raise _no_drop("count", self.count, allowed, f"pass count={near}")
        return dropped(config, keep=self._keep(config), share=self.share)

    def why_text(self, config: LMConfig) -> str | None:
        """What it looks at text for."""
        return None if self.by == "random" else f"{self.by!r} scores experts on it"

    def run(self, lm: LM, batches: Batches, seed: int) -> tuple[LM, Report]:
        """The model afterwards, and what changed."""
        return drop_experts(lm, keep=self._keep(lm.config), share=self.share, by=self.by, batches=batches, seed=seed)

    def _keep(self, config: LMConfig) -> int | None:
        if self.count is None or config.moe is None:
            return self.count
        return config.moe.num_experts - self.count


@dataclasses.dataclass(frozen=True)
class Merge:
    """Experts that share weights: ``keep`` different ones are left in each layer, on average.

    Source: see ``turnout.reshape.merge_experts``.
    """

    keep: int
    name: ClassVar[str] = "merge_experts"

    def planned(self, config: LMConfig) -> LMConfig:
        """The configuration afterwards, if every layer keeps as many."""
        return merged(config, keep=self.keep)

    def why_text(self, config: LMConfig) -> str | None:
        """What it looks at text for."""
        return "frequencies and similarities of experts are measured on it"

    def run(self, lm: LM, batches: Batches, seed: int) -> tuple[LM, Report]:
        """The model afterwards, and what changed."""
        return merge_experts(lm, keep=self.keep, batches=batches)


@dataclasses.dataclass(frozen=True)
class Compress:
    """Experts as low rank plus a few rows; fields as in ``turnout.reshape.compress_experts``.

    Source: see ``turnout.reshape.compress_experts``.
    """

    rank: int
    rows: float = 0.1
    by: Literal["sensitivity", "magnitude", "random"] = "sensitivity"
    name: ClassVar[str] = "compress_experts"

    def __post_init__(self) -> None:
        _check_by(self.by, Compress)

    def planned(self, config: LMConfig) -> LMConfig:
        """The configuration afterwards, if rows lie evenly on the layers."""
        return compressed(config, rank=self.rank, rows=self.rows)

    def why_text(self, config: LMConfig) -> str | None:
        """What it would look at text for."""
        scored = self.by == "sensitivity" and self.rows not in (0, 1)
        return "the loss is differentiated on it" if scored else None

    def run(self, lm: LM, batches: Batches, seed: int) -> tuple[LM, Report]:
        """The model afterwards, and what changed."""
        return compress_experts(lm, rank=self.rank, rows=self.rows, by=self.by, batches=batches, seed=seed)


@dataclasses.dataclass(frozen=True)
class Latent:
    """Experts in a narrow space that they share; fields as in ``turnout.reshape.latent_experts``.

    Source: see ``turnout.reshape.latent_experts``.
    """

    rank: int
    share: int | None = None
    name: ClassVar[str] = "latent_experts"

    def planned(self, config: LMConfig) -> LMConfig:
        """The configuration afterwards."""
        return shared(config, rank=self.rank, share=self.share)

    def why_text(self, config: LMConfig) -> str | None:
        """What it would look at text for; None."""
        return None

    def run(self, lm: LM, batches: Batches, seed: int) -> tuple[LM, Report]:
        """The model afterwards, and what changed."""
        return latent_experts(lm, rank=self.rank, share=self.share, batches=batches, seed=seed)


@dataclasses.dataclass(frozen=True)
class Densify:
    """Factored and merged experts written out.

    Source: see ``turnout.reshape.densify``.
    """

    name: ClassVar[str] = "densify"

    def planned(self, config: LMConfig) -> LMConfig:
        """The configuration afterwards."""
        return written_out(config)

    def why_text(self, config: LMConfig) -> str | None:
        """What it would look at text for; None."""
        return None

    def run(self, lm: LM, batches: Batches, seed: int) -> tuple[LM, Report]:
        """The model afterwards, and what changed."""
        return densify(lm, batches=batches, seed=seed)


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Maps in few bits; fields as in ``turnout.reshape.quantize``, ``head`` for the output layer too.

    Source: see ``turnout.reshape.quantize``.
    """

    bits: int
    group: int | None = 64
    codes: Literal["int", "float", "nf4", "quantile"] = "int"
    method: Literal["nearest", "gptq"] = "nearest"
    act_order: bool = False
    head: bool = False
    name: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        for option in ("codes", "method"):
            known = typing.get_args(typing.get_type_hints(Quantize)[option])
            if getattr(self, option) not in known:
                raise nearest(getattr(self, option), known, kind=f"--{option}", where="turnout convert")
        if self.act_order and self.method != "gptq":
            allowed, fix = "go with --method gptq, which rounds one input after the other,", "add --method gptq"
            got = f"--method {self.method}"
            raise UsageError(word("--act-order", got=got, allowed=allowed, where="turnout convert", fix=fix))

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of maps."""
        return (*PARTS, "head") if self.head else PARTS

    def planned(self, config: LMConfig) -> LMConfig:
        """The configuration afterwards."""
        return quantized(config, bits=self.bits, group=self.group, codes=self.codes, parts=self.parts)

    def why_text(self, config: LMConfig) -> str | None:
        """What it would look at text for."""
        return "'gptq' rounds so that what maps make of it changes little" if self.method == "gptq" else None

    def run(self, lm: LM, batches: Batches, seed: int) -> tuple[LM, Report]:
        """The model afterwards, and what changed."""
        how = {"bits": self.bits, "group": self.group, "codes": self.codes, "method": self.method}
        return quantize(lm, **how, parts=self.parts, act_order=self.act_order, batches=batches, seed=seed)


Step = Upcycle | Split | Drop | Merge | Compress | Latent | Densify | Quantize
_KINDS: dict[str, type[Step]] = {
    kind.name: kind for kind in (Upcycle, Split, Drop, Merge, Compress, Latent, Densify, Quantize)
}


def _no_drop(what: str, got: object, allowed: str, fix: str) -> UsageError:
    """What to say of a number of experts that cannot go."""
    return UsageError(word(what, got=got, allowed=allowed, where="turnout.recipes.steps.Drop", fix=fix))


def _check_by(by: str, kind: type[Step]) -> None:
    known = typing.get_args(typing.get_type_hints(kind)["by"])
    if by not in known:
        raise nearest(by, known, kind=f"--by of {kind.name}", where="turnout convert")


def step_json(step: Step) -> dict[str, object]:
    """The step as plain JSON values."""
    return {"step": step.name, **plain(step)}


def step_from_json(body: Mapping[str, object]) -> Step:
    """The step that ``step_json`` gave; other keys beside its own are passed over.

    Raises:
        CheckpointError: no such step, or fields that do not fit.
    """
    kind = _KINDS.get(str(body.get("step")))
    if kind is None:
        got, allowed, fix = repr(body.get("step")), f"be one of {', '.join(_KINDS)}", "restore run.json from a copy"
        raise CheckpointError(word("a step", got=got, allowed=allowed, where="run.json", fix=fix))
    names = {field.name for field in dataclasses.fields(kind)}
    try:
        return build(kind, {name: value for name, value in body.items() if name in names}, f"the step {kind.name}")
    except (UsageError, TypeError) as error:
        raise CheckpointError(f"run.json: {error}") from error
