"""What is known about training runs, read from their folders: the plain data that tables and the page are made of."""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from turnout.errors import CheckpointError, ShapeError, word
from turnout.expects import PATH, expects
from turnout.reading import check_fields, open_regular, parse_json, read_json
from turnout.types import Cost, Routing, Trace

__all__ = ["Passage", "ReportData", "RunData", "read_run"]

# Keys of run.json that say where and how it ran, not what it is.
_BESIDE = ("hardware", "command", "tokens_digest", "held_out_text", "versions", "commit", "cost")
_MEASURED: dict[str, Any] = {"load": list[list[float]] | None, "by_domain": dict[str, Any] | None}
_LINE = {"step": int, "kind": str | None, **_MEASURED}
_RESULT = {"load_by_domain": dict[str, list[list[float]]] | None, "passage": dict | None, **_MEASURED}
Route = tuple[int, float, float | None]
Shares = Sequence[Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Passage:
    """A held-out passage, token by token, with the experts that each layer sent each token to.

    Args:
        tokens: the text of each token.
        routes: per routed layer, per token, its (expert, weight, score) entries, the heaviest first; score may be None.
        layers: the name of each routed layer.
        num_experts: experts in each layer (the largest).
        domain: the domain of the document.
        source: the name of the document.

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
    >>> Passage.from_routings(["a", " b"], [routing]).routes
    ((((1, 1.0, None),), ((0, 1.0, None),)),)

    Source: none; plain bookkeeping.
    """

    tokens: tuple[str, ...]
    routes: tuple[tuple[tuple[Route, ...], ...], ...]
    layers: tuple[str, ...]
    num_experts: int
    domain: str = ""
    source: str = ""

    @classmethod
    def from_routings(
        cls,
        tokens: Sequence[str],
        routings: Sequence[Routing],
        *,
        layers: Sequence[str] = (),
        domain: str = "",
        source: str = "",
    ) -> Self:
        """The passage whose tokens these routings sent on, one routing per layer.

        Raises:
            ShapeError: a routing is not over exactly these tokens.
        """
        if any(routing.num_tokens != len(tokens) for routing in routings):
            raise ShapeError(
                word(
                    "the routings",
                    got=f"over {[routing.num_tokens for routing in routings]} tokens",
                    allowed=f"be over the {len(tokens)} tokens of the passage",
                    where="Passage.from_routings",
                    fix="pass the text of every token of the forward pass",
                )
            )
        names = tuple(layers) or tuple(str(layer) for layer in range(len(routings)))
        experts = max((routing.num_experts for routing in routings), default=0)
        routes = tuple(tuple(_routes(routing)) for routing in routings)
        return cls(tuple(tokens), routes, names, experts, domain, source)

    def to_json_dict(self) -> dict[str, object]:
        """The passage as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json_dict(cls, body: Mapping[str, Any]) -> Self:
        """The passage that ``to_json_dict`` wrote.

        Raises:
            CheckpointError: the values are not a passage.
        """
        try:
            tokens = tuple(str(token) for token in body["tokens"])
            routes = tuple(
                tuple(
                    tuple((int(e), float(w), None if s is None else float(s)) for e, w, s in token) for token in layer
                )
                for layer in body["routes"]
            )
            if any(len(layer) != len(tokens) for layer in routes):
                raise ValueError("layers of other lengths than the tokens")
            layers = tuple(map(str, body["layers"]))
            return cls(tokens, routes, layers, int(body["num_experts"]), str(body["domain"]), str(body["source"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                word(
                    "the passage",
                    got=f"{type(error).__name__}: {error}",
                    allowed="hold tokens, routes, layers and num_experts",
                    where="Passage.from_json_dict",
                    fix="write it with Passage.to_json_dict",
                )
            ) from error


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
        passage: a held-out passage with its routes.
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
    passage: Passage | None = None
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
        passage: default the passage of the first run that has one.
        hardware: default that of the first run that has it.
        command: the command that makes this page's numbers again; default the runs' own.
        notes: sentences that a reader must know.

    >>> ReportData("demo", (RunData("dense"), RunData("moe"))).runs[1].name
    'moe'

    Source: none; plain bookkeeping.
    """

    title: str
    runs: Sequence[RunData]
    passage: Passage | None = None
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

    Reads ``run.json``, ``metrics.jsonl``, ``result.json`` (``Evaluation.to_json_dict`` with ``cost``, ``tokens_per_s``
    and ``passage``), ``trace/`` and ``error.txt``; all but the first may be missing, and ``notes`` says what is.

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
    notes: list[str] = []
    metrics = tuple(_lines(folder / "metrics.jsonl"))
    result, problem = _json(folder / "result.json", _RESULT)
    if not metrics:
        notes.append("no metrics.jsonl: the run has not logged anything yet")
    if problem and (folder / "result.json").exists():
        notes.append(f"result.json cannot be read ({problem})")
    load, by_domain = _loads(folder, metrics, result, notes)
    return RunData(
        name=name or folder.resolve().name,
        config={key: run[key] for key in run if key not in _BESIDE},
        metrics=metrics,
        result={key: result[key] for key in result if key != "passage"},
        cost=_cost(result.get("cost") or run.get("cost")),
        tokens_per_s=number(result.get("tokens_per_s")) or _speed(metrics),
        load=load,
        load_by_domain=by_domain,
        passage=_passage(result, notes),
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
    return (result or (evaluations[-1] if evaluations else {})).get("load") or (), {}


def _passage(result: Mapping[str, Any], notes: list[str]) -> Passage | None:
    try:
        return Passage.from_json_dict(result["passage"]) if result.get("passage") else None
    except CheckpointError as error:
        notes.append(str(error))
        return None


def _routes(routing: Routing) -> Iterator[tuple[Route, ...]]:
    order_R, start_T = (tensor.tolist() for tensor in routing.by_token)
    expert_R, weight_R = routing.expert_R.tolist(), routing.weight_R.detach().float().tolist()
    score_TE = None if routing.score_TE is None else routing.score_TE.detach().float().cpu()
    for t in range(routing.num_tokens):
        entries = [(expert_R[r], weight_R[r]) for r in order_R[start_T[t] : start_T[t + 1]]]
        entries.sort(key=lambda entry: -entry[1])
        yield tuple((e, round(w, 4), None if score_TE is None else round(float(score_TE[t, e]), 4)) for e, w in entries)


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
