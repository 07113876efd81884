"""What README and guide say about whole adopted models: the range over all processors that have a page.

    python -m benchmarks.hf_claims        writes both anew from benchmarks/results/hf_models*.json

Of each processor and case the newest page counts. A number is how many times as fast turnout is as the fastest of
transformers' own in that case.
"""

import json
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.hf_models import DTYPES, JOBS, best, over

__all__ = ["BEGIN", "END", "found", "into", "main", "sentence", "table"]

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "docs/guides/transformers.md"
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- adopted models: written by benchmarks.hf_claims -->", "<!-- adopted models: end -->"
# Parts of what ``turnout.types.processor`` calls them; and pages from before they said so.
NAMES = {"AuthenticAMD 25 AVX512": "AMD Zen 4", "AuthenticAMD 26 AVX512": "AMD Zen 5"}
EARLIER = {"hf_models-2026-11-21": "AMD Zen 5", "hf_models-decoding-2026-11-21": "AMD Zen 5"}
SAID = {"forward+backward": "training", "forward": "reading", "decoding": "decoding"}
Found = dict[tuple[str, str, str, str], tuple[float, str]]


def processor(stem: str, about: dict[str, Any]) -> str:
    """As people call it."""
    full = str(about.get("processor") or EARLIER[stem])
    return next((name for part, name in NAMES.items() if part in full), full)


def found(folder: Path = RESULTS) -> Found:
    """(processor, dtype, job, model) -> times the fastest of transformers' own, and the page."""
    newest: Found = {}
    for path in sorted(folder.glob("hf_models*.json"), key=lambda path: (path.stem[-10:], "decoding" in path.stem)):
        record = json.loads(path.read_text(encoding="utf-8"))
        for case in record["cases"]:
            key = processor(path.stem, record["about"]), case["dtype"], case["job"], case["model"]
            newest[key] = statistics.median(over(case["seconds"], "turnout", best(case["seconds"]))), path.stem
    return newest


def _ranges(all_of: Found) -> dict[tuple[str, str, str], list[float]]:
    ranges = dict[tuple[str, str, str], list[float]]()
    for (name, dtype, job, _), (value, _) in all_of.items():
        ranges.setdefault((name, dtype, job), []).append(value)
    return ranges


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def sentence(all_of: Found) -> str:
    """For the README: over all processors and models."""
    ranges, said = _ranges(all_of), list[str]()
    for name in sorted({name for name, _, _ in ranges}):
        parts = []
        for dtype in DTYPES:
            jobs = [f"{SAID[job]} {_range(ranges[name, dtype, job])}" for job in JOBS if (name, dtype, job) in ranges]
            parts += [f"{dtype} {', '.join(jobs)}"] if jobs else []
        said.append(f"- {name}: {'; '.join(parts)}")
    link = "docs/guides/transformers.md#how-much-faster"
    lines = [
        "One CPU thread, small models of three families, times the speed of the fastest of transformers' own experts"
    ]
    lines += [f"([measured]({link})); `python -m benchmarks.hf_models` measures yours:", "", *said]
    return "\n".join(lines)


def table(all_of: Found, near: Path = GUIDE.parent) -> str:
    """For the guide: every model, and the pages."""
    lines = ["| processor | | job | " + " | ".join(models := sorted({key[3] for key in all_of})) + " |"]
    lines.append("|---|---|---|" + "---|" * len(models))
    for name, dtype, job in sorted(
        _ranges(all_of), key=lambda key: (key[0], [*DTYPES].index(key[1]), JOBS.index(key[2]))
    ):
        cells = [all_of.get((name, dtype, job, model)) for model in models]
        lines.append(f"| {name} | {dtype} | {job} | " + " | ".join(f"{c[0]:.2f}" if c else "" for c in cells) + " |")
    pages = sorted({(name, stem) for (name, *_), (_, stem) in all_of.items()})
    place = Path(os.path.relpath(RESULTS, near)).as_posix()
    said = ", ".join(f"[{name}, {stem[-10:]}]({place}/{stem}.md)" for name, stem in pages)
    return "\n".join([*lines, "", f"Pages with versions, spread and every contestant: {said}."])


def into(document: str, new: str) -> str:
    """The document with that section in place of the one it has."""
    before, begun, rest = document.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise SystemExit(f"no section between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main() -> None:
    all_of = found()
    for path, new in ((README, sentence(all_of)), (GUIDE, table(all_of))):
        path.write_text(into(path.read_text(encoding="utf-8"), new), encoding="utf-8")


if __name__ == "__main__":
    main()
