"""Run: everything that one training run is, frozen, named and repeatable from its run.json."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from turnout.errors import CheckpointError, UsageError, nearest, word
from turnout.fields import build, fit, plain
from turnout.models.lm import LMConfig
from turnout.reading import read_json
from turnout.storage import write_whole
from turnout.train.loop import TrainConfig

_FORMAT = "turnout.run/1"
# Said of files of llama.cpp, wherever a model's folder is asked for.
NO_GGUF = "GGUF is written here, not read"
# What else writes a run.json -> what its folder is, and what can be done with it.
_OTHERS = {
    "turnout.conversion": (
        ", a converted model, which this did not train",
        "train it on with turnout train --from FOLDER --data TEXT --out NEW, or use it with eval, sample and certify",
    ),
    "turnout.adaptation": (
        ", adapters and a router without their model",
        "load the model that they are for, and call turnout.reshape.attach_folder(model, FOLDER)",
    ),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run learns from.

    Args:
        domains: name -> sources (files, folders, ``hf:`` names). Empty: the text that this Python carries, as
            three domains (library, manual, headers).
        held_out: share of the documents, chosen by content hash, that is never trained on.
        limit_mb: at most this many megabytes (10^6 bytes) of each domain; None takes all.
        part_bytes: cut documents into parts of about this size, each held out or not by itself: for a single long file.
        field: the field of jsonl, parquet and data set rows that holds the text.
        bad: rows that cannot be read as text: "refuse" the data, or "skip" them and say how many.

    >>> DataConfig(limit_mb=3.0).held_out
    0.05

    Source: none; plain configuration.
    """

    domains: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    held_out: float = 0.05
    limit_mb: float | None = None
    part_bytes: int | None = None
    field: str = "text"
    bad: typing.Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise UsageError(
                word(
                    "held_out",
                    got=self.held_out,
                    allowed="be between 0 and 1, both excluded: training and measuring need text",
                    where="DataConfig",
                    fix="pass held_out=0.05",
                )
            )


@dataclasses.dataclass(frozen=True)
class Start:
    """The model that a run goes on from; ``turnout.recipes.tune`` fills it in.

    Args:
        path: its folder, absolute: of transformers, or of turnout's own; or its name and commit on the hub.
        weights: SHA-256 over its configuration and its weights.
        tokenizer: SHA-256 of its tokenizer.json.

    >>> Start("/models/base", "ab12", "cd34").path
    '/models/base'

    Source: none; plain configuration.
    """

    path: str
    weights: str
    tokenizer: str


@dataclasses.dataclass(frozen=True)
class Run:
    """One complete run: a recipe's result after the overrides, and what run.json holds.

    Args:
        recipe: the name of the recipe it came from.
        data: what it learns from.
        model: the network; with ``start`` that of the model there, and no other.
        train: the optimisation.
        start: the model whose weights and tokenizer it begins with; None begins with random weights and a tokenizer of
            its own text.
        teacher: the model that it is taught by too (``train.kd_weight``), whose tokenizer it takes.

    Source: none; plain configuration.
    """

    recipe: str
    data: DataConfig
    model: LMConfig
    train: TrainConfig
    start: Start | None = None
    teacher: Start | None = None

    def __post_init__(self) -> None:
        self._check_only()
        if self.start is not None and self.teacher is not None:
            got, fix = "both", "begin the student anew, or train it on without a teacher"
            where, allowed = f"recipe {self.recipe!r}", "be one of the two"
            raise UsageError(word("start and teacher", got=got, allowed=allowed, where=where, fix=fix))
        if self.train.seq > self.model.max_seq:
            longer = "" if self.start else f", or max_seq={self.train.seq}"
            raise UsageError(
                word(
                    "seq",
                    got=self.train.seq,
                    allowed=f"be at most max_seq={self.model.max_seq}{', which the model has' if self.start else ''}",
                    where=f"recipe {self.recipe!r}",
                    fix=f"pass seq={self.model.max_seq}{longer}",
                )
            )

    def _check_only(self) -> None:
        only, got, fix = self.train.only, "", ""
        if only == "router" and self.model.moe is None:
            got, fix = "it of a dense model, which has no router", "make it sparse first: turnout convert --to moe"
        elif only == "adapters" and self.start is None:
            got, fix = "it of weights that begin at random", "start from a model: turnout train --from MODEL"
        if got:
            fix += ", or leave it out"
            allowed = "be asked of a model that has what is to be trained, and is worth keeping"
            raise UsageError(word(f"only={only}", got=got, allowed=allowed, where=f"recipe {self.recipe!r}", fix=fix))

    def override(self, assignments: Sequence[str]) -> Self:
        """This run with fields replaced by ``name=value`` texts.

        A name is a field of data, model, model.moe or train, dotted (``model.moe.hidden``), or as much of its end
        (``moe.hidden``, ``width``) as only one of them has; of several, a bare name means the model's own
        (``layers`` is ``model.layers``, not ``model.moe.layers``). Values are JSON, or plain text for text fields.

        Raises:
            UsageError: an assignment without ``=``, a value of the wrong type, or a bare name that several have.
            UnknownNameError: no such field.
        """
        changes: dict[str, tuple[str, str]] = {}
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals:
                raise UsageError(
                    word(
                        "an override",
                        got=assignment,
                        allowed="read field=value",
                        where="the command line",
                        fix=f"write {name}=VALUE, or give a path with --data or --out",
                    )
                )
            changes[self._free(self._locate(name))] = text, assignment
        # All at once: width=96 heads=4 may fit together where neither fits alone.
        return _replace(self, changes)

    def scaled(self, assignments: Sequence[str]) -> Self:
        """``override`` of a run that has not begun: with other ``steps`` the warm-up keeps its share, unless it is set.

        >>> from turnout.recipes import tiny
        >>> tiny().scaled(["steps=60"]).train.warmup, tiny().scaled(["steps=60", "warmup=20"]).train.warmup
        (6, 20)
        """
        named = {text.partition("=")[0].rpartition(".")[2]: text.partition("=")[2] for text in assignments}
        steps = _parse(named.get("steps", ""))
        if "warmup" in named or type(steps) is not int or steps < 1:
            return self.override(assignments)
        share = self.train.warmup / self.train.steps
        warmup = max(min(1, self.train.warmup, steps), round(share * steps))
        return self.override([*assignments, f"train.warmup={warmup}"])

    def with_domains(self, domains: Mapping[str, tuple[str, ...]]) -> Self:
        """This run on other text; all of it, since a limit suits only the text it was chosen for.

        Paths become absolute, so that run.json can be repeated from any folder.
        """
        domains = {
            name: tuple(path if path.startswith("hf:") else str(Path(path).absolute()) for path in paths)
            for name, paths in domains.items()
        }
        return dataclasses.replace(self, data=dataclasses.replace(self.data, domains=dict(domains), limit_mb=None))

    def fields(self) -> dict[str, object]:
        """Every field by its dotted name, with its value."""
        return dict(_leaves(self, ""))

    def _free(self, dotted: str) -> str:
        """The field, if it may be another: what the model is that a run goes on from is not the run's to say."""
        if self.teacher is not None and (dotted.startswith("teacher.") or dotted == "model.vocab_size"):
            got, fix = "another value", "name the model with turnout train --teacher"
            where, allowed = "turnout train --teacher", f"stay {self.fields()[dotted]!r}, as the teacher has it"
            raise UsageError(word(dotted, got=got, allowed=allowed, where=where, fix=fix))
        if self.start is None or not dotted.startswith(("model.", "start.")):
            return dotted
        allowed = (
            f"stay {self.fields()[dotted]!r}, as in {self.start.path}: what can be set are fields of train and data"
        )
        fix = "leave it out; turnout convert makes another model of it first, such as one with experts"
        if dotted.startswith("start."):
            fix = "name the model with turnout train --from"
        raise UsageError(word(dotted, got="another value", allowed=allowed, where="turnout train --from", fix=fix))

    def _locate(self, name: str) -> str:
        known = self.fields()
        if name in known:
            return name
        hits = [dotted for dotted in known if dotted.endswith(f".{name}")]
        if len(hits) == 1 or f"model.{name}" in hits:
            return hits[0] if len(hits) == 1 else f"model.{name}"
        if hits:
            raise UsageError(
                word(
                    "the field",
                    got=name,
                    allowed=f"be unambiguous; {', '.join(hits)} share that name",
                    where="the command line",
                    fix=f"write {hits[0]}=VALUE",
                )
            )
        bare = {dotted.rpartition(".")[2] for dotted in known}
        raise nearest(name, set(known) if "." in name else bare, kind="field", where=f"recipe {self.recipe!r}")

    def to_json_dict(self) -> dict[str, object]:
        """The run as plain JSON values."""
        return {"format": _FORMAT, **plain(self)}

    @classmethod
    def from_json_dict(cls, body: Mapping[str, object]) -> Self:
        """The run that ``to_json_dict`` wrote; unknown keys beside the run itself are ignored.

        Raises:
            CheckpointError: the values are not a run.
        """
        if body.get("format") != _FORMAT:
            other = _OTHERS.get(
                str(body.get("format")).partition("/")[0], ("", "name the run.json of an output folder")
            )
            raise CheckpointError(
                word(
                    "run.json",
                    got=f"format {body.get('format')!r}{other[0]}",
                    allowed=f"have format {_FORMAT!r}, that of a run of turnout train,",
                    where="Run.from_json_dict",
                    fix=other[1],
                )
            )
        fields = {field.name: body[field.name] for field in dataclasses.fields(cls) if field.name in body}
        return build(cls, fields, "run.json")

    def save(self, path: str | Path, **beside: object) -> None:
        """Writes run.json; ``beside`` holds what is worth knowing but is not part of the run (versions, hardware)."""
        write_whole(path, json.dumps(self.to_json_dict() | beside, indent=2) + "\n")

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run in a run.json, or in the output folder that holds one.

        Raises:
            CheckpointError: there is none, or it is not readable JSON.
        """
        path = Path(path)
        path = path / "run.json" if path.is_dir() else path

        def refuse(problem: str) -> CheckpointError:
            got, allowed = f"{path} ({problem})", "be a run.json or an output folder that holds one"
            fix = "name a folder that turnout train wrote"
            return CheckpointError(word("the run", got=got, allowed=allowed, where="Run.open", fix=fix))

        if path.suffix == ".gguf" and path.is_file():  # bytes that are no text: say what it is, not that
            raise refuse(f"a file of llama.cpp: {NO_GGUF}")
        try:
            body = read_json(path, refuse=refuse, any_link=True)
        except FileNotFoundError as error:
            raise refuse("which is not there") from error
        except OSError as error:
            raise refuse(str(error)) from error
        return cls.from_json_dict(body)


def _leaves(value: object, prefix: str) -> list[tuple[str, object]]:
    found = []
    for field in dataclasses.fields(value):  # pyrefly: ignore[bad-argument-type]
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            found += _leaves(item, f"{prefix}{field.name}.")
        elif prefix:
            found.append((prefix + field.name, item))
    return found


def _replace(value: typing.Any, changes: Mapping[str, tuple[str, str]]) -> typing.Any:
    """The dataclass with the changes, dotted name -> (text, whole assignment), made in one step on every level."""
    hints, made, below = typing.get_type_hints(type(value)), {}, {}
    for dotted, change in changes.items():
        head, _, rest = dotted.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = change
        else:
            made[head] = fit(_parse(change[0]), hints[head], change[1])
    made |= {head: _replace(getattr(value, head), inner) for head, inner in below.items()}
    return dataclasses.replace(value, **made)


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


def named_domains(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The domains that ``--data [NAME=]PATH`` texts name; without a name, the path's last part is the name.

    >>> named_domains(["code=src", "code=lib", "docs/prose"])
    {'code': ('src', 'lib'), 'prose': ('docs/prose',)}

    Source: none; plain configuration.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, path = Path(text.removeprefix("hf:")).name or "text", text
        found[name] = (*found.get(name, ()), path)
    return found
