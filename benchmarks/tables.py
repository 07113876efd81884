"""What every dated table says about itself, and where it goes."""

import datetime
import importlib.metadata
import json
import statistics
from pathlib import Path

from turnout.measure import hardware
from turnout.run.compiled import why_not_compiled
from turnout.run.tuned import tuning
from turnout.types.processor import processor

LIBRARIES = ("torch", "transformers", "accelerate")
# Said only where they are installed.
PEERS = ("deepspeed", "tutel", "st-moe-pytorch")


def provenance() -> dict[str, object]:
    """Hardware, versions and commit."""
    versions = {}
    for name in (*LIBRARIES, *PEERS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in LIBRARIES:
                versions[name] = "not installed"
    return hardware() | {"processor": str(processor()), "executors": str(tuning()), **versions}


def heading(title: str, about: dict[str, object]) -> list[str]:
    """The first lines of a page: title, date, and what the numbers must be read with."""
    features = "/".join(str(feature) for feature in about["cpu_features"])  # type: ignore[attr-defined]
    said = [f"{about['processor']}; {features}; {about['cores']} cores, {about['threads']} torch thread(s)"]
    said += [f"{name} {about[name]}" for name in ("system", "python", *LIBRARIES, *PEERS, "turnout") if name in about]
    kernels = f"Kernels: {about['executors']}; {why_not_compiled() or 'compiled by numba'}."
    return [f"# {title}", "", f"{datetime.date.today()}; {', '.join(said)}; commit {about['commit']}.", "", kernels, ""]


def spread(values: list[float], form: str = ".2f") -> str:
    """The median with the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def write(folder: Path | None, name: str, lines: list[str], record: object) -> None:
    """The page and its raw numbers, dated; nothing without a folder."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{name}-{datetime.date.today()}"
        stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
