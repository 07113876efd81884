"""What a conversion would do, from config.json and the headers of the weights alone."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch

from turnout.errors import CheckpointError, UsageError, word
from turnout.fields import plain
from turnout.hub import Located, located
from turnout.models import LMConfig, checkpoint
from turnout.models.checkpoint.own import ORIGIN, outline, read_json
from turnout.models.families.express import architecture_of
from turnout.models.families.family import Family
from turnout.recipes.calibration import find_tokenizer
from turnout.recipes.room import check_room
from turnout.recipes.run import Run
from turnout.recipes.steps import Densify, Drop, Merge, Quantize, Step, Upcycle

__all__ = ["Format", "Plan", "Row", "make_plan"]

Format = Literal["transformers", "model"]
_WHERE = "turnout convert"
# FLOPs are told for this much context, or for as much as the model takes.
_SEQ = 2048
# The most that one file of transformers weights holds.
_SHARD = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Row:
    """The model before the first step, or after one.

    Args:
        name: "input", or the step's name.
        config: of the model.
        params: parameters.
        params_active: those that one token uses.
        memory_bytes: of the weights.
        flops: of one token's forward pass.

    Source: none; plain bookkeeping.
    """

    name: str
    config: LMConfig
    params: int
    params_active: int
    memory_bytes: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion, not done yet.

    Args:
        found: what was given, and the folder that it is.
        folder: where the model itself is.
        source: what kind of folder was given.
        target: what kind of folder will be written.
        architecture: the class in transformers of what will be written; "LM" in our own format.
        steps: what will be done.
        rows: the model before, and after each step.
        dtype: that the weights are read in; None for the one they are stored in.
        seq: tokens of context that ``flops`` is for.
        wider_bytes: what tensors of wider dtypes than the model's take more, on the disk.
        notes: what else is to be known of the result.
        held: whether weights that the folder has in few bits are held so.

    Source: none; plain bookkeeping.
    """

    found: Located
    folder: Path
    source: Literal["transformers", "model", "run"]
    target: Literal["transformers", "model", "run"]
    architecture: str
    steps: tuple[Step, ...]
    rows: tuple[Row, ...]
    dtype: torch.dtype | None
    seq: int
    wider_bytes: int = 0
    notes: tuple[str, ...] = ()
    held: bool = False

    @property
    def path(self) -> Path:
        """The folder that was given, or found in the cache of the hub."""
        return self.found.folder

    @property
    def config(self) -> LMConfig:
        """Of the input."""
        return self.rows[0].config

    @property
    def peak_bytes(self) -> int:
        """The most that weights take at once: a step's input and output, what was read and what was written, or what is
        written and the copy of it, or of a shard of it, that goes into the file.
        """
        sizes = [row.memory_bytes for row in self.rows]
        copy = min(sizes[-1], _SHARD) if self.target == "transformers" else sizes[-1]
        return max([a + b for a, b in itertools.pairwise(sizes)] + [sizes[0] + sizes[-1], sizes[-1] + copy])

    def check_room(self, out: Path) -> None:
        """Refuses a disk or a memory that is too small, before anything is read.

        Raises:
            StorageError: the disk of ``out``.
            UsageError: the memory that is free now.
        """
        check_room(out, disk_bytes=self.rows[-1].memory_bytes + self.wider_bytes, memory_bytes=self.peak_bytes)

    def to_json_dict(self) -> list[dict[str, Any]]:
        """The rows as plain JSON values."""
        return [plain(row) for row in self.rows]

    def __str__(self) -> str:
        table = [("", "parameters", "active", "memory", "FLOPs/token", "")]
        for row in self.rows:
            numbers = (_short(row.params), _short(row.params_active), _bytes(row.memory_bytes), _short(row.flops))
            table.append((row.name, *numbers, _shape(row.config)))
        wide = [max(len(line[column]) for line in table) for column in range(5)]
        lines = [
            "  ".join([line[0].ljust(wide[0]), *(line[n].rjust(wide[n]) for n in range(1, 5)), line[5]]).rstrip()
            for line in table
        ]
        lines.append(f"FLOPs with {self.seq} tokens of context; up to {_bytes(self.peak_bytes)} of memory on the way")
        lines.append(f"writes {self.architecture}" + (" (transformers)" if self.target == "transformers" else ""))
        lines += self.notes
        if any(isinstance(step, Merge) for step in self.steps):
            lines.append("how many experts each layer keeps depends on the text; the table takes equally many")
        return "\n".join(lines)


def make_plan(
    path: str | Path,
    steps: Sequence[Step],
    *,
    as_format: Format | None = None,
    text: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """The plan; whatever can be known to be wrong is refused here, before a weight is read or a file is written.

    Raises:
        TurnoutError: a folder that holds no model or a damaged one, steps that do not fit the model or each other, text
            that a step needs, weights that would be rounded a second time, or a result that the format cannot hold.
    """
    found = located(path, where=_WHERE)
    source, folder = _find(found.folder)
    target = as_format or source
    seen = checkpoint.peek(folder, dtype=dtype)
    if not steps and target == source:
        raise _no_steps(seen.stored_as)
    # Few bits stay so where nothing reshapes them: what reshapes works on the numbers that they stand for.
    held = seen.held is not None and (not steps or isinstance(steps[0], Densify))
    config = seen.held if held and seen.held is not None else seen.config
    seq = min(_SEQ, seen.config.max_seq)
    rows = [_row("input", config, seen.dtype, seq)]
    few = config.quantized is not None or seen.stored_as is not None
    for number, step in enumerate(steps, 1):
        before = rows[-1].config
        if (few and isinstance(step, Quantize)) or (before.quantized is not None and not isinstance(step, Densify)):
            raise _after_quantize(step, seen.stored_as)
        _check_text(step, before, text)
        planned = step.planned(before)
        if planned == before and not (few and isinstance(step, Densify)):
            raise _nothing(step, planned)
        few = isinstance(step, Quantize) or (few and not isinstance(step, Densify))
        rows.append(_row(f"{number} {step.name}", planned, seen.dtype, seq))
    if text is not None:
        if not Path(text).exists():
            got, fix = f"{text}, which does not exist", "check the spelling of the path"
            raise UsageError(word("--calibration", got=got, allowed="be a file or folder", where=_WHERE, fix=fix))
        find_tokenizer(folder)
    architecture, notes, wider = "LM", list(seen.notes), 0
    if held and not steps:
        notes[0] = f"weights stay in few bits, as they are stored ({seen.stored_as})"
    if target == "transformers":
        family, written = _family(rows[-1].config, folder)
        architecture, wider = family.architecture, seen.wider_bytes
        notes += _notes(family, written, rows[-1].config, steps, seen.dtype)
    about = (tuple(steps), tuple(rows), dtype, seq, wider, tuple(notes))
    return Plan(found, folder, source, target, architecture, *about, held)


def _no_steps(stored_as: str | None) -> UsageError:
    fix = "add one, such as --to moe --experts 8 --top-k 2 or --bits 4, or another format: --as or --gguf"
    if stored_as is not None:
        fix = f"add --densify to write its weights ({stored_as}) out whole, --as model to keep their bits, or steps"
    return UsageError(word("the steps", got="none", allowed="be at least one", where=_WHERE, fix=fix))


def _nothing(step: Step, config: LMConfig) -> UsageError:
    """A step that would be reported as done and has done nothing."""
    shape = _shape(config)
    got, fix = f"{step.name}, which would leave the model as it is: {shape}", "leave it out"
    if isinstance(step, Drop):
        fix = "leave it out, or ask for more"
    return UsageError(word("a step", got=got, allowed="change the model", where=_WHERE, fix=fix))


def _after_quantize(step: Step, stored_as: str | None) -> UsageError:
    of = "in few bits" if stored_as is None else f"whose weights are stored in few bits ({stored_as})"
    got, allowed = f"{step.name} of a model {of}", "come before its weights are rounded"
    fix = "put --bits behind it, or --densify before it"
    if isinstance(step, Quantize):
        fix = "start from the model that it was made from, or put --densify before it to round a second time"
    return UsageError(word("a step", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _find(path: Path) -> tuple[Literal["transformers", "model", "run"], Path]:
    """What kind of folder this is, and where its model is."""
    if (path / "config.json").is_file():
        keys = read_json(path / "config.json", _WHERE)
        return ("transformers" if "model_type" in keys or "architectures" in keys else "model"), path
    if (path / "run.json").is_file():
        Run.open(path)
        if (path / "model" / "config.json").is_file():
            return "run", path / "model"
        fix = f"finish it with: turnout train --resume --out {quote(str(path))}"
        raise CheckpointError(
            word("the run", got=f"{path}, which has no model", allowed="be finished", where=_WHERE, fix=fix)
        )
    there = "which does not exist" if not path.exists() else "which holds neither config.json nor run.json"
    fix = "name a folder that transformers, checkpoint.save or turnout train wrote"
    raise CheckpointError(word("the model", got=f"{path}, {there}", allowed="be a folder", where=_WHERE, fix=fix))


def _check_text(step: Step, config: LMConfig, text: str | Path | None) -> None:
    why = step.why_text(config)
    if why is None or text is not None:
        return
    fix = "add --calibration FILE_OR_FOLDER with a few thousand tokens of text like the model's own"
    if step.name in ("drop_experts", "split"):
        fix += f", or --by {'random' if step.name == 'drop_experts' else 'cluster'}, which needs none"
    if step.name == "quantize":
        fix += ", or --method nearest, which needs none"
    allowed = f"be given for {step.name}: {why}; random tokens would not do,"
    raise UsageError(word("--calibration", got="nothing", allowed=allowed, where=_WHERE, fix=fix))


def _family(config: LMConfig, folder: Path) -> tuple[Family, LMConfig]:
    if config.moe is not None and config.moe.distinct is not None:
        got = "merged experts, several of which share their weights"
        fix = "add --as model to write a folder of turnout's own, --densify to write them out, or use --drop-experts"
        allowed = "be what an architecture of transformers can hold"
        raise UsageError(word("the result", got=got, allowed=allowed, where=_WHERE, fix=fix))
    like = folder / ORIGIN if (folder / ORIGIN).is_dir() else folder
    keys = read_json(like / "config.json", _WHERE) if (like / "config.json").is_file() else {}
    return architecture_of(config, prefer=keys.get("model_type"))


def _notes(family: Family, written: LMConfig, config: LMConfig, steps: Sequence[Step], dtype: torch.dtype) -> list[str]:
    """What is to be known of a folder of transformers; refuses what only its dtype makes wrong."""
    notes, moe = [], config.moe
    if written.moe is not None and written != config:
        width = written.moe.shared_hidden
        notes.append(
            f"{family.architecture} cannot be without a shared expert: one of width {width} that makes nothing"
        )
    shards = max((step.granularity for step in steps if isinstance(step, Upcycle)), default=1)
    if shards == 1 or moe is None or moe.top_k == moe.num_experts or family.exact_gate:
        return notes
    if dtype in (torch.bfloat16, torch.float16):
        got, allowed = f"granularity={shards} in {str(dtype).removeprefix('torch.')}", "be 1 there"
        why = f"{family.architecture} rounds the scores of its router to that dtype, and experts that tie tear groups"
        fix = "--granularity 1, or --dtype float32 and load it in float32, or --as model"
        raise UsageError(word("--granularity", got=f"{got}: {why}", allowed=allowed, where=_WHERE, fix=fix))
    return [
        *notes,
        f"load it in float32: in bfloat16 {family.architecture} rounds its router's scores and tears groups",
    ]


def _row(name: str, config: LMConfig, dtype: torch.dtype, seq: int) -> Row:
    lm = outline(config).to(dtype)
    cost = lm.cost(seq=seq)
    size = sum(tensor.numel() * tensor.element_size() for tensor in lm.state_dict().values())
    assert cost.params is not None and cost.params_active is not None and cost.flops is not None
    return Row(name, config, cost.params, cost.params_active, size, cost.flops)


def _shape(config: LMConfig) -> str:
    moe, few = config.moe, config.quantized
    rounded = "" if few is None else f", {few.bits} bits in {'rows' if few.group is None else f'groups of {few.group}'}"
    if moe is None:
        return f"dense, hidden {config.dense_hidden}{rounded}"
    held = "" if moe.distinct is None else f", about {sum(moe.distinct) / len(moe.distinct):g} of them different"
    ranks = moe.factored and f", rank {moe.factored.up_rank}" + (" shared" if moe.factored.share > 1 else "")
    counts = moe.num_experts if moe.per_layer is None else f"{min(moe.per_layer)} to {moe.num_experts}"
    return f"{counts} experts, hidden {moe.hidden}, top {moe.top_k}{held}{ranks or ''}{rounded}"


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    return f"{_short(value)}B" if value >= 1e3 else f"{value:g} B"
