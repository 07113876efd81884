"""One schedule for a whole sparse block against no overlap, Tutel, FSMoE and FlowMoE on random profiles, simulated.

    python -m benchmarks.block_schedule --profiles 1000 --jobs 2 --out records.jsonl

It takes about a second of processor time a profile; what is in the file already is not done again.

The profiles are those that the method was designed on (attention and experts 0.3-2, all-to-alls 0.2-2, reductions
0.1-2, 0.01-0.08 more for each task), and for three in ten others: wider ranges, a gate, a second wire, chip and wire
that slow each other down, a reduction of experts, other numbers of blocks. Nothing is timed, so the numbers are the
same on every machine.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from turnout.decide.device import block_schedule
from turnout.measure import simulate_block
from turnout.types import BlockCosts

METHODS = ("none", "tutel", "fsmoe", "flowmoe", "turnout")
LEFT_OUT = ("turn", "halves", "unequal")
Record = dict[str, float]


def of_the_card(seed: int) -> tuple[BlockCosts, int]:
    """A profile as the card draws them, and four blocks."""
    chance = random.Random(seed)
    even = {name: chance.uniform(0.3, 2) for name in ("attention", "experts")}
    even |= {"dispatch": chance.uniform(0.2, 2), "reduce": chance.uniform(0.1, 2), "start": chance.uniform(0.01, 0.08)}
    return BlockCosts.even(**even), 4


def beyond(seed: int) -> tuple[BlockCosts, int]:
    """A profile of wider ranges, with what the card's leave out."""
    chance = random.Random(seed)
    wide = {name: 2 ** chance.uniform(-3, 2) for name in ("attention", "experts", "dispatch", "reduce")}
    wide["start"] = 2 ** chance.uniform(-10, -3)
    wide["gate"] = chance.choice((0.0, 2 ** chance.uniform(-5, -2)))
    wide["inner"] = chance.choice((0.0, 2 ** chance.uniform(-4, 0)))
    wide["expert_reduce"] = chance.choice((0.0, 2 ** chance.uniform(-3, 1)))
    slowed = chance.choice((0.0, chance.uniform(0, 0.3)))
    costs = BlockCosts.even(**wide, most_chunks=chance.choice((2, 4, 8, 16)))
    costs = dataclasses.replace(costs, compute_slowed=slowed, wire_slowed=slowed / 2, sums=chance.random() < 0.7)
    return dataclasses.replace(costs, cut=chance.choice(("batch", "sequence"))), chance.randint(1, 5)


def profile(seed: int) -> tuple[BlockCosts, int]:
    """Seven of ten as the card has them."""
    return beyond(seed) if seed % 10 >= 7 else of_the_card(seed)


def one(seed: int, *, methods: Sequence[str] = METHODS, left_out: bool = False) -> Record:
    """The makespan of each method on a profile, over the bound; and ours without each of its choices."""
    costs, blocks = profile(seed)
    bound = costs.bound_s(blocks)
    made = {method: block_schedule(costs, blocks=blocks, method=method) for method in methods}
    record = {method: simulate_block(schedule, costs).makespan_s / bound for method, schedule in made.items()}
    for choice in LEFT_OUT if left_out else ():
        schedule = block_schedule(costs, blocks=blocks, without=(choice,))
        record[f"without {choice}"] = simulate_block(schedule, costs).makespan_s / bound
    backward = costs.attention_back(costs.rows) + costs.gate_back(costs.rows)
    dense = costs.attention(costs.rows) + costs.gate(costs.rows) + backward
    reduced = sum(costs.reduce(size) for size in (costs.dense_bytes, costs.expert_bytes) if size)
    whole = costs.compute_s() + costs.wire_s() + costs.inner_s()
    return record | {"seed": seed, "share": (dense + reduced) / whole}


def quantiles(values: Sequence[float]) -> str:
    """Median (10 %, 90 %)."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return f"{statistics.median(values):.3f} ({tenths[0]:.3f}, {tenths[-1]:.3f})"


def gap_closed(records: Sequence[Record]) -> float:
    """The share of FlowMoE's median distance to the bound that ours does not have."""
    flow, ours = (statistics.median(one[name] for one in records) - 1 for name in ("flowmoe", "turnout"))
    return 1 - ours / flow


def table(records: Sequence[Record]) -> list[str]:
    """What the profiles say, as lines of Markdown."""
    card = [one for one in records if one["seed"] % 10 < 7]
    rest = [one for one in records if one["seed"] % 10 >= 7]
    lines = ["| makespan, median (10 %, 90 %) | the card's profiles | others |", "|---|---|---|"]

    def line(what: str, value: Callable[[Record], float]) -> None:
        cells = [quantiles([value(one) for one in part]) if len(part) > 1 else "-" for part in (card, rest)]
        lines.append(f"| {what} | {cells[0]} | {cells[1]} |")

    line("Tutel over no overlap", lambda one: one["tutel"] / one["none"])
    line("FSMoE over Tutel", lambda one: one["fsmoe"] / one["tutel"])
    line("FlowMoE over Tutel", lambda one: one["flowmoe"] / one["tutel"])
    line("ours over FlowMoE", lambda one: one["turnout"] / one["flowmoe"])
    line("ours over the best of the four", lambda one: one["turnout"] / min(one[name] for name in METHODS[:-1]))
    line("FlowMoE over the bound", lambda one: one["flowmoe"])
    line("ours over the bound", lambda one: one["turnout"])
    full = [one for one in card if "without turn" in one]
    for choice in LEFT_OUT if full else ():
        ratios = [one[f"without {choice}"] / one["turnout"] for one in full]
        lines.append(f"| ours without {choice} over ours ({len(full)} profiles) | {quantiles(ratios)} | |")
    dense = [one["flowmoe"] / one["tutel"] for one in records if 0.33 <= one["share"] <= 0.36]
    if len(dense) > 1:
        what = f"FlowMoE over Tutel where attention, gate and reductions are 33-36 % ({len(dense)} profiles)"
        lines.append(f"| {what} | {quantiles(dense)} | |")
    longer = sum(one["turnout"] > min(one[name] for name in METHODS[:-1]) * (1 + 1e-9) for one in records)
    lines.append(f"\nLonger than the best of the four on {longer} of {len(records)} profiles; of FlowMoE's median ")
    lines[-1] += f"distance to the bound {gap_closed(card):.0%} is gone on the card's profiles."
    return lines


def _left_out(seed: int) -> Record:
    return one(seed, left_out=seed % 10 < 7 and seed // 10 % 20 == 0)


def main() -> None:
    """Prints the table and keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profiles", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    records = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    known = {record["seed"] for record in records}
    left = [seed for seed in range(1000, 1000 + given.profiles) if seed not in known]
    with concurrent.futures.ProcessPoolExecutor(given.jobs) as pool, given.out.open("a") as out:
        for record in pool.map(_left_out, left, chunksize=1):
            records.append({name: round(value, 6) for name, value in record.items()})
            out.write(json.dumps(records[-1]) + "\n")
            out.flush()
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
