"""What scaling laws are fitted to: sizes, numbers of experts and losses, from runs or from a table."""

import csv
import dataclasses
import gzip
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from turnout.errors import DataError, word
from turnout.expects import PATH, expects, several
from turnout.measure.runs import RunData, read_run

__all__ = ["ScalingPoint", "points_of_runs", "points_of_table"]

By = Literal["experts", "cost"]
_WHERE = "turnout laws"
# What a column of a table may be called.
_COLUMNS = {
    "params": ("params", "dense_parameter_count", "n", "parameters"),
    "experts": ("experts", "num_experts", "e"),
    "loss": ("loss", "loss_validation", "bits_per_byte", "validation_loss"),
}


@dataclasses.dataclass(frozen=True)
class ScalingPoint:
    """One model.

    Args:
        name: of the run, or of the line in a table.
        params: N, what a token meets without embeddings; by cost, the FLOPs of a token.
        experts: E; by cost, all parameters over those that a token meets.
        loss: what it came to.

    >>> ScalingPoint("dense", 1e6, 1, 3.2).experts
    1

    Source: none; plain bookkeeping.
    """

    name: str
    params: float
    experts: float
    loss: float


@expects(folders=several(str, Path))
def points_of_runs(folders: Iterable[str | Path], *, by: By = "experts") -> list[ScalingPoint]:
    """The point of each finished run.

    Args:
        folders: of ``turnout train``.
        by: "experts" has E and the parameters of one expert a token, as the law was found: runs of top 1, or dense.
            "cost" has in their place all parameters over those that a token meets, and the FLOPs of a token, which
            also tells K and layers without experts apart.

    Raises:
        DataError: a run that is not finished, by experts one whose tokens meet several, or runs of other numbers of
            tokens or other text than the first one.

    >>> import json, tempfile
    >>> folder, sizes = Path(tempfile.mkdtemp()), {"vocab_size": 10, "width": 8, "max_seq": 4}
    >>> body = {"recipe": "tiny", "model": sizes, "train": {"steps": 2, "batch": 1, "seq": 4}}
    >>> _ = (folder / "run.json").write_text(json.dumps(body))
    >>> cost = {"params": 1080, "params_active": 1080, "flops": 3e3}
    >>> _ = (folder / "result.json").write_text(json.dumps({"bits_per_byte": 2.5, "cost": cost}))
    >>> [(point.params, point.experts) for point in points_of_runs([folder])]
    [(1000, 1.0)]

    Source: Clark et al., 2022, "Unified Scaling Laws for Routed Language Models", sections 3 and 5.3.
    """
    runs = [(read_run(folder), Path(folder)) for folder in folders]
    for run, folder in runs:
        for what, value in _equal(run).items():
            if value != (first := _equal(runs[0][0])[what]):
                got, fix = f"{value} in {folder} and {first} in {runs[0][1]}", "fit each kind by itself"
                raise DataError(word("RUNS", got=got, allowed=f"have one {what}", where=_WHERE, fix=fix))
    return [_point(run, folder, by) for run, folder in runs]


def _equal(run: RunData) -> dict[str, Any]:
    """What must be the same in all runs."""
    train = run.config["train"]
    tokens = int(train["steps"]) * int(train["batch"]) * int(train["seq"]) * int(train.get("accumulate") or 1)
    return {"number of training tokens": tokens, "text": "; ".join(run.texts)}


def _point(run: RunData, folder: Path, by: By) -> ScalingPoint:
    bits, cost = run.result.get("bits_per_byte"), run.cost
    if (
        not isinstance(bits, int | float)
        or not math.isfinite(bits)
        or not (cost.params and cost.params_active and cost.flops)
    ):
        got, fix = f"{folder}, which has no result", "let it end: turnout train --resume --out " + str(folder)
        raise DataError(word("RUNS", got=got, allowed="be finished runs", where=_WHERE, fix=fix))
    model: Mapping[str, Any] = run.config["model"]
    moe, beside = model.get("moe") or {}, _embedding(model)
    if by == "cost":
        whole, met = cost.params - beside, cost.params_active - beside
        return ScalingPoint(run.name, cost.flops, whole / met, float(bits))
    if moe and int(moe["top_k"]) != 1:
        got, fix = f"{folder} of top {moe['top_k']}", "pass --by cost"
        allowed = "have one expert a token, or none, by experts"
        raise DataError(word("RUNS", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return ScalingPoint(run.name, cost.params_active - beside, float(moe.get("num_experts") or 1), float(bits))


def _embedding(model: Mapping[str, Any]) -> int:
    """The numbers of the tables of tokens and positions, which a token does not multiply with."""
    rows = int(model["vocab_size"]) * (1 if model.get("tie_embeddings", True) else 2)
    rows += int(model["max_seq"]) if model.get("learned_positions") else 0
    return rows * int(model["width"])


@expects(path=PATH)
def points_of_table(path: str | Path) -> list[ScalingPoint]:
    r"""The points of a CSV, also gzipped, one a line: ``params``, ``experts`` and ``loss``.

    ``dense_parameter_count``, ``num_experts`` and ``loss_validation``, as in the table that the paper published, are
    understood too; an empty number of experts is 1.

    Raises:
        DataError: a column is missing, or a cell is no number.

    >>> import tempfile
    >>> lines = ["params,experts,loss", "1e6,1,3.2", "1e6,8,3.0"]
    >>> _ = (table := Path(tempfile.mkdtemp(), "a.csv")).write_text(chr(10).join(lines))
    >>> [point.experts for point in points_of_table(table)]
    [1.0, 8.0]

    Source: none; plain bookkeeping.
    """
    path = Path(path)
    opened = (
        gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8", newline="")
    )
    try:
        with opened as file:
            rows = csv.DictReader(file)
            names = _columns([name.strip().lower() for name in rows.fieldnames or []], path)
            rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or []]
            return [_line(row, names, f"{path.name}:{number}") for number, row in enumerate(rows, 2)]
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        got, fix = f"{path} ({error})", "save it as comma-separated values in UTF-8"
        raise DataError(word("--table", got=got, allowed="be a table", where=_WHERE, fix=fix)) from error


def _columns(there: list[str], path: Path) -> dict[str, str]:
    found = {what: next((name for name in names if name in there), "") for what, names in _COLUMNS.items()}
    if missing := [what for what, name in found.items() if not name]:
        got, fix = f"{path} with {', '.join(there) or 'none'}", "name a column " + ", ".join(missing)
        raise DataError(word("--table", got=got, allowed="have params, experts and loss", where=_WHERE, fix=fix))
    return found


def _line(row: Mapping[str, str | None], names: Mapping[str, str], place: str) -> ScalingPoint:
    values = {}
    for what, name in names.items():
        text = (row.get(name) or "").strip() or ("1" if what == "experts" else "")
        try:
            values[what] = float(text)
        except ValueError:
            got, fix = f"{text!r} for {name} in {place}", "leave the line out"
            raise DataError(word("--table", got=got, allowed="hold numbers", where=_WHERE, fix=fix)) from None
    return ScalingPoint(place, values["params"], values["experts"], values["loss"])
