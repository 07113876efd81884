"""Report: named numbers with their spread and their provenance."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from turnout.errors import CheckpointError, word
from turnout.reading import check_fields, parse_json
from turnout.storage import write_whole

_FORMAT = "turnout.report/1"
Value = float | int | str | bool | None | list[Any] | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a meter or a change says: a title, named values, notes, and where it came from.

    Args:
        title: what was measured or changed.
        values: name -> value, names with their unit (``"latency_ms"``); only what JSON can hold.
        notes: sentences that a reader of the numbers must know.
        context: versions, hardware, seeds, paths.

    >>> print(Report("load", {"max_vio": 0.25, "experts": 8}))
    load
      max_vio  0.25
      experts  8
    >>> Report.from_json(Report("a", {"b": 1}).to_json()) == Report("a", {"b": 1})
    True

    Source: none; plain bookkeeping.
    """

    title: str
    values: Mapping[str, Value]
    notes: tuple[str, ...] = ()
    context: Mapping[str, Value] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:  # a Value; whoever asks for a name knows which
        return self.values[name]

    def __str__(self) -> str:
        wide = max((len(name) for name in self.values), default=0)
        rows = [f"  {name:<{wide}}  {_show(value)}" for name, value in self.values.items()]
        return "\n".join([self.title, *rows, *(f"  note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        """The report as JSON text."""
        body = {"format": _FORMAT, "title": self.title, "values": dict(self.values)}
        return json.dumps(body | {"notes": list(self.notes), "context": dict(self.context)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that ``to_json`` wrote.

        Raises:
            CheckpointError: the text is not a report.
        """
        body = parse_json(text, _refuse, finite=False)
        check_fields(
            body,
            {"format": Literal["turnout.report/1"], "title": str, "values": dict[str, Any], "notes": list[str]}
            | {"context": dict[str, Any]},
            _refuse,
        )
        return cls(body["title"], body["values"], tuple(body["notes"]), body["context"])

    def save(self, path: str | Path) -> None:
        """Writes the JSON, aside first and then renamed."""
        write_whole(path, self.to_json() + "\n")


def _refuse(problem: str) -> CheckpointError:
    allowed, fix = f"be {_FORMAT} JSON", "write it with Report.to_json"
    return CheckpointError(word("the text", got=problem, allowed=allowed, where="Report.from_json", fix=fix))


def _show(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
