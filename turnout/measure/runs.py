"""What is known about training runs, read from their folders: the plain data that tables and the page are made of."""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from turnout.errors import CheckpointError, word
from turnout.expects import PATH, expects
from turnout.measure.passage import Passage
from turnout.reading import check_fields, open_regular, parse_json, read_json
from turnout.types import Cost, Trace

__all__ = ["ReportData", "RunData", "read_run"]

# Keys of run.json that say where and how it ran, not what it is.
_BESIDE = ("hardware", "command", "tokens_digest", "held_out_text", "versions", "commit", "cost")
_MEASURED: dict[str, Any] = {"load": list[list[float]] | None, "by_domain": dict[str, Any] | None}
_LINE = {"step": int, "kind": str | None, **_MEASURED}
# What a run of before this has in its result.json, one passage among it, is now in routes.json: it is for machines.
_RESULT = {"load_by_domain": dict[str, list[list[float]]] | None, "passage": dict | None, **_MEASURED}
_ROUTES = {
    "load": list[list[float]] | None,
    "load_by_domain": dict[str, list[list[float]]] | None,
    "passages": list[dict] | None,
}
_LATER = {"result": _RESULT, "routes": _ROUTES}
Shares = Sequence[Sequence[float]]


@dataclasses.dataclass(frozen=True)
class RunData:
    """One training run as plain data: what it was asked, what it logged, what was measured at its end.

    Args:
        name: what to call it.
        config: the resolved configuration, nested.
        metrics: the lines of metrics.jsonl: ``kind`` "train" or "eval".
        result: the measurement at the end: ``bits_per_byte``, ``by_domain``, ``max_vio``, ``entropy``, ``dropped``;
            empty while the run goes on.
        cost: parameters, active parameters, and FLOPs of one token's forward pass.
        tokens_per_s: of training.
        load: per routed layer, the share of each expert on held-out text.
        load_by_domain: domain -> the same for its text.
        passages: held-out passages with their routes, one of each domain.
        hardware: of the machine it ran on.
        command: the command line that started it.
        error: what it stopped with.
        notes: what is missing from it, in sentences.
        texts: names of the text that it was measured on: digests of the held-out text, and of the tokens made of it.
            Runs are ranked only where they share one.

    >>> RunData("x", metrics=({"kind": "eval", "step": 1, "bits_per_byte": 2.5},)).bits_per_byte
    2.5

    Source: none; plain bookkeeping.
    """

    name: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cost: Cost = dataclasses.field(default_factory=Cost)
    tokens_per_s: float | None = None
    load: Shares = ()
    load_by_domain: Mapping[str, Shares] = dataclasses.field(default_factory=dict)
    passages: tuple[Passage, ...] = ()
    hardware: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    command: str = ""
    error: str = ""
    notes: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def lines(self, kind: str) -> list[Mapping[str, Any]]:
        """The metrics of one kind ("train" or "eval"), in order."""
        return [line for line in self.metrics if line.get("kind") == kind]

    @property
    def measured(self) -> Mapping[str, Any]:
        """The result, or the last evaluation while there is none; empty when there is neither."""
        return self.result or next(iter(self.lines("eval")[::-1]), {})

    @property
    def bits_per_byte(self) -> float | None:
        """Held-out bits per byte, the latest that is known."""
        return number(self.measured.get("bits_per_byte"))

    @property
    def before(self) -> Mapping[str, Any]:
        """The evaluation before the first step, of a run that began with a model; else empty."""
        return next((line for line in self.lines("eval") if line["step"] == 0), {})

    @property
    def after(self) -> Mapping[str, Any]:
        """The last evaluation on the same text as ``before``, where the result is of more text; else empty."""
        last, size = self.lines("eval")[-1:], self.before.get("bytes")
        same = bool(last) and last[0]["step"] > 0 and size is not None and last[0].get("bytes") == size
        return last[0] if same and self.result.get("bytes") != size else {}

    @property
    def by_domain(self) -> dict[str, float | None]:
        """Held-out bits per byte of each domain."""
        return {str(name): number(value) for name, value in (self.measured.get("by_domain") or {}).items()}

    @property
    def num_experts(self) -> int:
        """Experts in the widest routed layer; 0 for a dense model."""
        loads = [self.load, *(line.get("load") or () for line in self.lines("eval"))]
        return max((len(load_E) for load in loads for load_E in load), default=0)

    @property
    def tokens(self) -> int | None:
        """Training tokens seen, as the last line that says so."""
        seen = [line["tokens"] for line in self.metrics if isinstance(line.get("tokens"), int)]
        return seen[-1] if seen else None

    @property
    def seconds(self) -> float | None:
        """What training took so far, with its evaluations and checkpoints and without pauses; None of old runs."""
        return self._latest("seconds")

    @property
    def peak_memory_bytes(self) -> float | None:
        """The most memory that training took, of the accelerator or of the process; None of old runs."""
        return self._latest("peak_memory_bytes")

    def _latest(self, name: str) -> float | None:
        said = [number(line.get(name)) for line in (*self.metrics, self.result)]
        return next((value for value in reversed(said) if value), None)

    @property
    def step(self) -> int | None:
        """The last step that was logged."""
        seen = [line["step"] for line in self.metrics if isinstance(line.get("step"), int)]
        return seen[-1] if seen else None


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything that the page shows.

    Args:
        title: the heading.
        runs: in the order of their columns.
        passages: default those of the first run that has some.
        hardware: default that of the first run that has it.
        command: the command that makes this page's numbers again; default the runs' own.
        notes: sentences that a reader must know.

    >>> ReportData("demo", (RunData("dense"), RunData("moe"))).runs[1].name
    'moe'

    Source: none; plain bookkeeping.
    """

    title: str
    runs: Sequence[RunData]
    passages: tuple[Passage, ...] = ()
    hardware: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    command: str = ""
    notes: tuple[str, ...] = ()


def number(value: object) -> float | None:
    """The value as a finite float, or None when it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@expects(folder=PATH)
def read_run(folder: str | Path, *, name: str | None = None) -> RunData:
    """What is in a run folder, whether the run is finished, going on, or was killed while writing a line.

    Reads ``run.json``, ``metrics.jsonl``, ``result.json`` (``Evaluation.to_json_dict`` with ``cost``, ``seconds`` and
    ``peak_memory_bytes``), ``routes.json`` (``load``, ``load_by_domain`` and ``passages``), ``trace/`` and
    ``error.txt``; all but the first may be missing, and ``notes`` says what is.

    Args:
        folder: an output folder of a training run.
        name: what to call the run; default the folder's name.

    Returns:
        The run's data.

    Raises:
        CheckpointError: there is no readable run.json.

    >>> import tempfile
    >>> _ = Path(folder := tempfile.mkdtemp(), "run.json").write_text('{"recipe": "tiny"}')
    >>> (run := read_run(folder, name="x")).config["recipe"], run.notes
    ('tiny', ('no metrics.jsonl: the run has not logged anything yet',))

    Source: none; plain bookkeeping.
    """
    folder = Path(folder)
    run, problem = _json(folder / "run.json", {"hardware": dict | None, "command": str | None})
    if problem:
        raise CheckpointError(
            word(
                "the run",
                got=f"{folder} ({problem})",
                allowed="be an output folder with a run.json",
                where="read_run",
                fix="name a folder that turnout train wrote",
            )
        )
    metrics = tuple(_lines(folder / "metrics.jsonl"))
    notes = [] if metrics else ["no metrics.jsonl: the run has not logged anything yet"]
    result, routes = (_beside(folder / f"{name}.json", kinds, notes) for name, kinds in _LATER.items())
    load, by_domain = _loads(folder, metrics, result | routes, notes)
    return RunData(
        name=name or folder.resolve().name,
        config={key: run[key] for key in run if key not in _BESIDE},
        metrics=metrics,
        result={key: result[key] for key in result if key != "passage"},
        cost=_cost(result.get("cost") or run.get("cost")),
        tokens_per_s=number(result.get("tokens_per_s")) or _speed(metrics),
        load=load,
        load_by_domain=by_domain,
        passages=_passages(routes.get("passages") or [result.get("passage")], notes),
        hardware=run.get("hardware") or {},
        command=str(run.get("command") or ""),
        error=_text(folder / "error.txt"),
        notes=tuple(notes),
        texts=_texts(run),
    )


def _cost(found: object) -> Cost:
    known = found if isinstance(found, dict) else {}
    return Cost(**{key: known.get(key) for key in ("params", "params_active", "flops")})


def _texts(run: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key} {run[key]}" for key in ("held_out_text", "tokens_digest") if isinstance(run.get(key), str))


def _loads(
    folder: Path, metrics: Sequence[Mapping[str, Any]], result: Mapping[str, Any], notes: list[str]
) -> tuple[Shares, Mapping[str, Shares]]:
    """Shares of experts, overall and by domain: from the result, else the trace, else the last evaluation."""
    if result.get("load_by_domain"):
        return result.get("load") or (), result["load_by_domain"]
    if (folder / "trace" / "trace.json").exists():
        try:
            return _trace_loads(Trace.open(folder / "trace"))
        except CheckpointError as error:
            notes.append(str(error))
    evaluations = [line for line in metrics if line.get("kind") == "eval"]
    return result.get("load") or (evaluations[-1] if evaluations else {}).get("load") or (), {}


def _passages(found: Sequence[Mapping[str, Any] | None], notes: list[str]) -> tuple[Passage, ...]:
    try:
        return tuple(Passage.from_json_dict(body) for body in found if body)
    except CheckpointError as error:
        notes.append(str(error))
        return ()


def _trace_loads(trace: Trace) -> tuple[Shares, dict[str, Shares]]:
    def shares(domain: str | None) -> list[list[float]]:
        loads = [trace.load(layer, domain=domain).double() for layer in range(trace.num_layers)]
        return [(load_E / load_E.sum().clamp(min=1)).tolist() for load_E in loads]

    return shares(None), {domain: shares(domain) for domain in trace.domains}


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The whole lines; of several for one kind and step (a run that went on from a checkpoint), the last."""
    found = {}
    for text in _text(path).splitlines():
        with contextlib.suppress(CheckpointError):
            line = parse_json(text, CheckpointError, finite=False)
            _check(line, _LINE)
            found[line.get("kind"), line["step"]] = line
    yield from sorted(found.values(), key=lambda line: line["step"])


def _speed(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """The median over the logged steps, but for the first, which warms up."""
    speeds = [number(line.get("tokens_per_s")) for line in metrics if line.get("kind") == "train"]
    known = [speed for speed in speeds if speed]
    return statistics.median(known[1:] or known) if known else None


def _beside(path: Path, kinds: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """What a file holds that a finished run has; empty where it is not there, or with a note where it is broken."""
    found, problem = _json(path, kinds)
    if problem and path.exists():
        notes.append(f"{path.name} cannot be read ({problem})")
    return found


def _json(path: Path, kinds: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    try:
        body = read_json(path, refuse=CheckpointError, finite=False, any_link=True)
        _check(body, kinds)
        return body, ""
    except (OSError, CheckpointError) as error:
        return {}, getattr(error, "strerror", None) or str(error)


def _check(body: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    check_fields(body, kinds, CheckpointError)
    loads = [body.get("load") if "load" in kinds else None, *(body.get("load_by_domain") or {}).values()]
    shares = [share for load in loads for share_E in load or () for share in share_E]
    if shares and not 0 <= min(shares) <= max(shares) <= 1.001:
        raise CheckpointError(f"a load of {max(shares, key=abs):.3g}, which is no share")


def _text(path: Path) -> str:
    try:
        with open_regular(path, any_link=True) as file:
            return file.read().decode(errors="replace")
    except (OSError, CheckpointError):
        return ""
