"""The page of benchmarks.decoding, and the section of docs/performance.md that it writes."""

import statistics
from typing import Any

from benchmarks import decoding_bars
from benchmarks.decoding_piece import LIMIT
from benchmarks.tables import heading, spread

__all__ = ["BEGIN", "END", "UNMEASURED", "into", "page", "rows", "section"]

UNMEASURED = "\nNot measured yet.\n"
BEGIN, END = "<!-- decoding: written by benchmarks.decoding --docs -->", "<!-- decoding: end -->"


def page(record: dict[str, Any]) -> list[str]:
    """All of it."""
    about = record["about"]
    lines = heading("Decoding on the CPU: turnout, transformers and llama.cpp", about)
    lines += [f"Medians of {about['rounds']} interleaved rounds; CPU time of the process with all its threads, "
              "ratios of the same round (least-most); `OMP_WAIT_POLICY=PASSIVE` for all. llama.cpp is b11739, with its "
              "default cache in fp16; q8_0 and q4_0 stand in the columns of int8 and int4, ours in the same groups of "
              "32.",
              "",
              "The limit takes turns with them: of a step a sweep, by as many threads, over the bytes that it must "
              "read of our model (weights of all but experts and embedding, of the experts that so many streams take "
              "by the loads measured in the model, keys and values); of a prompt torch's products of its shapes, each "
              "by the fastest of torch's ways in this process, and torch's attention."]  # fmt: skip
    for part in record["pieces"]:
        lines += rows(part)
    for one in record["failed"]:
        lines += ["", f"**Not measured: {one['piece']}**, {one['why']}"]
    return [*lines, "", "## bars", "", *decoding_bars.table(decoding_bars.judge(record))]


def rows(part: dict[str, Any]) -> list[str]:
    """The section of a piece."""
    threads, names = part["threads"], list(part["errors"])
    others = [name for name in (*names, LIMIT) if name != "turnout"] if "turnout" in names else []
    lines = ["", f"## {part['shape']}, {part['kind']}, {threads} thread{'s' * (threads > 1)}", ""]
    lines += ["Logits are off by " + ", ".join(f"{error:.0e} ({name})" for name, error in part["errors"].items()) + "."]
    for name, why in part["absent"].items():
        lines.append(f"Without {name}: {why}.")
    shown = [*names, *([LIMIT] if others else [])]
    columns = [*(f"{name}, ms" for name in shown), "MB to read", *(f"turnout over {name}" for name in others)]
    lines += ["", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for case in part["cases"]:
        for wall in (False, True)[: 1 + (threads > 1)]:
            lines.append(f"| {case['says']}{', wall' * wall} | {' | '.join(_fields(case, shown, others, wall))} |")
    lines += ["", "Memory over weights and cache, resident (at most): "]
    lines[-1] += ", ".join(
        f"{decoding_bars.resident(one):.2f} ({decoding_bars.resident(one, peak=True):.2f}) of "
        f"{one['weights_bytes'] / 1e6:.0f} MB {one['peer']}"
        for one in part["memory"]
    )
    return [*lines[:-1], lines[-1] + "."]


def _fields(case: dict[str, Any], shown: list[str], others: list[str], wall: bool) -> list[str]:
    """Of one line: milliseconds, the bytes of a step, ratios."""
    times = case["times"]
    fields = [f"{statistics.median([one[wall] for one in times[name]]):.2f}" if name in times else "" for name in shown]
    fields.append(f"{case['read_bytes'] / 1e6:.0f}" if case["read_bytes"] else "")
    return fields + [spread(decoding_bars.ratios(times, name, wall=wall)) if name in times else "" for name in others]


def section(record: dict[str, Any], page: str) -> str:
    """What docs/performance.md says of a record: where and when it was measured, and the bars."""
    about = record["about"]
    quick = ", a quick run of few rounds" if about["quick"] else ""
    said = [f"[The page]({page}){quick}: {about['processor']}, {about['cores']} cores, torch {about['torch']}, commit "
            f"{about['commit']}."]  # fmt: skip
    return "\n".join([BEGIN, *said, "", *decoding_bars.table(decoding_bars.judge(record)), END])


def into(document: str, new: str) -> str:
    """The document with that section in place of the one it has."""
    before, found, rest = document.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"no section between {BEGIN} and {END}")
    return before + new + after
