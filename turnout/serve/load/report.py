"""What a server did under load, in numbers: waits, gaps, throughput, and what of it was worth something."""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from turnout.serve.load.answer import Answer
from turnout.serve.load.drive import Driven
from turnout.serve.load.slo import Slo

__all__ = ["LoadPoint", "LoadReport", "Spread", "point"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How some values are distributed; all 0 without any.

    Args:
        count: how many there are.
        mean: of them.
        median: the same.
        p90: nine of ten are at most this.
        p99: ninety-nine of a hundred.
        most: the largest.

    >>> Spread.of([1.0, 2.0, 6.0]).median
    2.0

    Source: none; numpy's linear percentiles.
    """

    count: int = 0
    mean: float = 0.0
    median: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    most: float = 0.0

    @staticmethod
    def of(values: Iterable[float]) -> "Spread":
        """The spread of these.

        Args:
            values: any number of them.
        """
        found = np.asarray(list(values), float)
        if not len(found):
            return Spread()
        median, p90, p99 = (float(value) for value in np.percentile(found, (50, 90, 99)))
        return Spread(len(found), float(found.mean()), median, p90, p99, float(found.max()))


@dataclasses.dataclass(frozen=True)
class LoadPoint:
    """One load and what came of it; times are of answers that are whole, rates of what they hold.

    Args:
        load: ``"rate 2/s"`` (open loop) or ``"4 streams"`` (closed loop).
        level: the number in it.
        is_open: whether requests came whether or not there was an answer to those before.
        seconds: from the first request to the last answer.
        sent: requests.
        done: answers that are whole.
        errors: kind of failure -> how many.
        examples: kind of failure -> what was said of one.
        prompt_tokens: of whole answers, as the server counted them; 0 where it does not.
        cached_tokens: of these, what it need not read.
        output_tokens: of whole answers.
        ttft_s: from when a request was due to its first text.
        itl_s: between two pieces of text, over all answers.
        tpot_s: an answer's time for each token after the first.
        e2e_s: from when a request was due to its end.
        requests_per_s: whole answers.
        tokens_per_s: of the answers: while all streams had work in a closed loop, of all the time in an open one.
        goodput_per_s: whole answers that kept to the objectives; None without any.
        tokens_per_piece: 1 where each token came by itself.
        counted: whether the server said how many tokens it made; else they are pieces.
        late_s: how late requests were sent.
        client_share: the client's processor time, in cores.
        client_lag_s: how late the client's event loop was; no time above is surer than this.

    >>> "goodput_per_s" in LoadPoint.__dataclass_fields__
    True

    Source: none; plain bookkeeping.
    """

    load: str
    level: float
    is_open: bool
    seconds: float
    sent: int
    done: int
    errors: Mapping[str, int]
    examples: Mapping[str, str]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: Spread
    itl_s: Spread
    tpot_s: Spread
    e2e_s: Spread
    requests_per_s: float
    tokens_per_s: float
    goodput_per_s: float | None
    tokens_per_piece: float
    counted: bool
    late_s: Spread
    client_share: float
    client_lag_s: Spread


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """A server under several loads.

    Args:
        url: of the server.
        model: the name that was asked for.
        about: what was asked, as name -> text.
        points: one for each load.
        notes: what the reader must know.

    >>> LoadReport("http://127.0.0.1:8000", "moe", {}, (), ()).table().splitlines()[0]
    'moe at http://127.0.0.1:8000'

    Source: none; plain bookkeeping.
    """

    url: str
    model: str
    about: Mapping[str, str]
    points: Sequence[LoadPoint]
    notes: Sequence[str]

    def to_json(self) -> str:
        """Everything, for another program."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def table(self) -> str:
        """Everything that a reader needs, as lines."""
        lines = [f"{self.model} at {self.url}"]
        lines += [f"  {name}: {value}" for name, value in self.about.items()]
        lines += [
            "",
            _ROW.format("load", "done", "TTFT median", "p99", "ITL median", "p99", "tokens/s", "req/s", "good/s"),
        ]
        for one in self.points:
            good = "" if one.goodput_per_s is None else f"{one.goodput_per_s:.2f}"
            row = (
                one.load, f"{one.done}/{one.sent}",
                _ms(one.ttft_s.median, one.ttft_s), _ms(one.ttft_s.p99, one.ttft_s),
                _ms(one.itl_s.median, one.itl_s), _ms(one.itl_s.p99, one.itl_s),
                f"{one.tokens_per_s:.1f}", f"{one.requests_per_s:.2f}", good,
            )  # fmt: skip
            lines.append(_ROW.format(*row).rstrip())
        for one in self.points:
            for kind, count in one.errors.items():
                lines.append(f"{one.load}: {count} of {one.sent} failed: {kind}: {one.examples[kind]}")
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


_ROW = "{:<12}{:>10}{:>13}{:>10}{:>12}{:>10}{:>10}{:>8}{:>8}"


def point(driven: Driven, *, level: float, is_open: bool, slo: Slo | None) -> LoadPoint:
    """The numbers of one load.

    Args:
        driven: what came of it.
        level: requests a second, or streams.
        is_open: which of the two.
        slo: what an answer must keep to; None where nobody asked.
    """
    answers = driven.answers
    whole = [answer for answer in answers if not answer.error]
    seconds = max(max(answer.ended_s for answer in answers) - driven.begun_s, 1e-9)
    errors = collections.Counter(answer.error for answer in answers if answer.error)
    tokens = sum(answer.tokens for answer in whole)
    pieces = sum(len(answer.piece_s) for answer in whole)
    return LoadPoint(
        load=f"rate {level:g}/s" if is_open else f"{level:g} stream{'s' * (level != 1)}",
        level=level,
        is_open=is_open,
        seconds=seconds,
        sent=len(answers),
        done=len(whole),
        errors=dict(errors.most_common()),
        examples={kind: next(one.message for one in answers if one.error == kind) for kind in errors},
        prompt_tokens=sum(answer.prompt_tokens or 0 for answer in whole),
        cached_tokens=sum(answer.cached_tokens or 0 for answer in whole),
        output_tokens=tokens,
        ttft_s=Spread.of(answer.ttft_s for answer in whole),
        itl_s=Spread.of(gap for answer in whole for gap in answer.gap_s),
        tpot_s=Spread.of(answer.tpot_s for answer in whole if answer.tokens > 1),
        e2e_s=Spread.of(answer.e2e_s for answer in whole),
        requests_per_s=len(whole) / seconds,
        tokens_per_s=tokens / seconds if is_open else _busy_rate(driven, whole),
        goodput_per_s=None if slo is None else sum(map(_keeper(slo), whole)) / seconds,
        tokens_per_piece=tokens / pieces if pieces else 0.0,
        counted=all(answer.output_tokens is not None for answer in whole),
        late_s=Spread.of(answer.sent_s - answer.due_s for answer in answers),
        client_share=driven.client_cpu_s / seconds,
        client_lag_s=Spread.of(driven.lag_s),
    )


def _busy_rate(driven: Driven, whole: Sequence[Answer]) -> float:
    """Tokens a second while every stream had work; an answer's tokens are spread evenly over its pieces."""
    found = 0.0
    for answer in whole:
        if answer.piece_s:
            each = answer.tokens / len(answer.piece_s)
            found += each * sum(at <= driven.busy_s for at in answer.piece_s)
    return found / max(driven.busy_s - driven.begun_s, 1e-9)


def _keeper(slo: Slo) -> Callable[[Answer], bool]:
    def keeps(answer: Answer) -> bool:
        longest = max(answer.gap_s, default=0.0)
        return slo.keeps(ttft_s=answer.ttft_s, tpot_s=answer.tpot_s, itl_s=longest, e2e_s=answer.e2e_s)

    return keeps


def _ms(seconds: float, spread: Spread) -> str:
    return f"{1000 * seconds:.1f} ms" if spread.count else "-"
