"""Steps of sparse transformer blocks on gloo ranks with a slowed wire: no overlap, Tutel, FSMoE, FlowMoE and turnout's.

    python -m benchmarks.block_overlap [--ranks 4] [--rounds 15] [--slower 1.0] [--out benchmarks/results]

Gradients are real, and so are collectives; on top of what they take, wire and chip sleep alpha + beta n, so that four
ranks on fewer cores take turns as four devices would. Costs are profiled by turnout on these ranks, every method's
schedule is planned from them, and the schedules are played in turn, in another order each round. What the simulator
says of the same costs stands beside the median.
"""

import argparse
import dataclasses
import json
import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.tables import heading, provenance, write
from turnout.decide.device import block_schedule
from turnout.decide.device.block_schedule import METHODS
from turnout.measure import fit_block_costs, fit_slowed, simulate_block
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.block_tasks import BlockTasks
from turnout.models.overlapped import Overlapped, own_experts
from turnout.run.blocks.block import Played
from turnout.run.blocks.block_profile import profile_blocks
from turnout.run.blocks.wire import Slow
from turnout.run.ranks import processes
from turnout.types import BlockCosts, BlockSchedule

NAMES = {"none": "no overlap", "tutel": "Tutel, best r", "fsmoe": "FSMoE", "flowmoe": "FlowMoE", "turnout": "turnout"}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is played: blocks, each rank's sequences, and how long things take at the least, in milliseconds a batch."""

    blocks: int = 2
    sequences: int = 8
    seq: int = 16
    width: int = 32
    experts: int = 8
    attention_ms: float = 24.0
    gate_ms: float = 4.0
    experts_ms: float = 32.0
    wire_ms: float = 36.0  # a dispatch
    start_ms: float = 1.5  # each task on the chip
    wire_start_ms: float = 3.0  # each on the wire

    @property
    def tokens(self) -> int:
        """Of a rank."""
        return self.sequences * self.seq

    def slow(self) -> dict[str, Slow]:
        """What each kind of task sleeps."""
        start, wire = self.start_ms / 1e3, self.wire_start_ms / 1e3
        a, g, e = (ms / 1e3 / self.tokens for ms in (self.attention_ms, self.gate_ms, self.experts_ms))
        lines = {"A": a, "G": g, "E": e, "Ax": a, "Aw": a, "A'": 2 * a, "G'": g, "Ex": e, "Ew": e, "E'": 2 * e}
        bytes_of = self.tokens * 2 * self.width * 4  # two experts a token
        return {kind: Slow(start, each) for kind, each in lines.items()} | {
            "wire": Slow(wire, self.wire_ms / 1e3 / bytes_of)
        }


class Rank:
    """One rank's model, and steps of it."""

    def __init__(self, ranks: processes.Ranks, trial: Trial) -> None:
        moe = MoEConfig(num_experts=trial.experts, top_k=2, hidden=trial.width)
        config = LMConfig(
            vocab_size=64, width=trial.width, layers=trial.blocks, heads=2, max_seq=trial.seq, init_std=0.2, moe=moe
        )
        self.trial = trial
        self.lm = own_experts(LM(config, seed=0), rank=ranks.rank, ranks=ranks.world)
        generator = torch.Generator().manual_seed(ranks.rank)
        self.id_BS = torch.randint(0, 64, (trial.sequences, trial.seq), generator=generator)
        self.target_BS, self.total = self.id_BS.roll(-1, 1), trial.tokens * ranks.world
        self.dense_bytes = 4 * sum(p.numel() for p in BlockTasks(self.lm.blocks[0], 0).dense)

    def player(self, schedule: BlockSchedule) -> Overlapped:
        """Of a schedule, on the slowed wire."""
        world = dist.group.WORLD
        assert world is not None
        return Overlapped(self.lm, schedule, group=world, data=world, slow=self.trial.slow())

    def play(self, player: Overlapped) -> Played:
        """A step, begun by all at once."""
        self.lm.zero_grad()
        dist.barrier()
        return player.step(self.id_BS, self.target_BS, tokens=self.total)


def compare(
    ranks: processes.Ranks,
    trial: Trial,
    *,
    rounds: int,
    methods: Sequence[str] = METHODS,
    degrees: Sequence[int] = (1, 2, 4),
    repeats: int = 2,
) -> dict[str, dict]:
    """Costs, schedules, and each one's predicted and measured seconds; the same on every rank.

    Args:
        ranks: this one, and the others, which call it too.
        trial: what is played.
        rounds: how often each schedule is.
        methods: of ``block_schedule``.
        degrees: numbers of chunks that are profiled.
        repeats: steps of each profile.
    """
    rank = Rank(ranks, trial)
    about = {"blocks": trial.blocks, "dense_bytes": rank.dense_bytes}
    steps = profile_blocks(rank.player, rank.play, **about, degrees=degrees, repeats=repeats)
    costs = fit_block_costs(
        steps, rows=trial.tokens, dense_bytes=rank.dense_bytes, most_chunks=trial.sequences, sums=True
    )  # fmt: skip
    costs = _with_slowed(rank, ranks, costs)
    schedules = _planned(ranks, costs, trial.blocks, methods)
    players = {method: rank.player(schedule) for method, schedule in schedules.items()}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(-1, rounds):
        for at in range(len(methods)):
            method = methods[(at + number) % len(methods)]
            seconds = torch.tensor(rank.play(players[method]).seconds, dtype=torch.float64)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            times[method] += [seconds.item()] if number >= 0 else []  # a first round warms up
    for player in players.values():
        player.close()
    return {
        "costs": costs.to_json_dict(),
        "bound_s": {"bound": costs.bound_s(trial.blocks)},
        "chunks": {m: (s.attention_chunks, s.expert_chunks, len(s.dense_bytes)) for m, s in schedules.items()},
        "predicted_s": {m: simulate_block(s, costs).makespan_s for m, s in schedules.items()},
        "measured_s": times,
    }


def _with_slowed(rank: Rank, ranks: processes.Ranks, costs: BlockCosts) -> BlockCosts:
    """The costs with how much chip and wire slow each other down, from steps that overlap."""
    schedule = _planned(ranks, costs, rank.trial.blocks, ["flowmoe"])["flowmoe"]
    player = rank.player(schedule)
    played = [rank.play(player) for _ in range(4)][1:]
    player.close()
    found = torch.tensor(fit_slowed([(schedule, each.times) for each in played], costs), dtype=torch.float64)
    dist.all_reduce(found)
    chip, wire = (found / ranks.world).tolist()
    return dataclasses.replace(costs, compute_slowed=round(chip, 4), wire_slowed=round(wire, 4))


_COUNT = iter(range(1 << 30))


def _planned(
    ranks: processes.Ranks, costs: BlockCosts, blocks: int, methods: Sequence[str]
) -> dict[str, BlockSchedule]:
    """Each method's schedule, planned by the first rank and read by the others."""
    assert ranks.store is not None
    key = f"plans/{next(_COUNT)}"
    if ranks.is_first:
        made = {method: block_schedule(costs, blocks=blocks, method=method).to_json_dict() for method in methods}
        ranks.store.set(key, json.dumps(made))
    text: Mapping[str, dict[str, object]] = json.loads(ranks.store.get(key))
    return {method: BlockSchedule.from_json_dict(body) for method, body in text.items()}


def _rank(rank: int, world: int, port: int, trial: Trial, rounds: int, path: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = processes.start(device="cpu")
    found = compare(ranks, trial, rounds=rounds)
    if ranks.is_first:
        Path(path).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    processes.end()


def lines(found: Mapping[str, dict], about: dict[str, object], load: float) -> list[str]:
    """The page."""
    measured, predicted = found["measured_s"], found["predicted_s"]
    middle = {method: statistics.median(each) for method, each in measured.items()}
    page = heading("One schedule for whole blocks, on a slowed wire", about)
    page += [f"Load of the machine {load:.1f}. Every row: the median of {len(measured['none'])} interleaved steps.", ""]
    page += ["| schedule | parts (attention, experts, sums) | predicted ms | measured ms | error | of none |"]
    page += ["|---|---|---|---|---|---|"]
    for method, seconds in middle.items():
        parts = ", ".join(map(str, found["chunks"][method]))
        error, span = predicted[method] / seconds - 1, [1e3 * each for each in measured[method]]
        page.append(
            f"| {NAMES[method]} | {parts} | {1e3 * predicted[method]:.0f} | {1e3 * seconds:.0f} ({min(span):.0f}-"
            f"{max(span):.0f}) | {error:+.1%} | {seconds / middle['none']:.3f} |"
        )
    return [*page, "", f"Bound (the busier of chip and wire): {1e3 * found['bound_s']['bound']:.0f} ms."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slower", type=float, default=1.0, help="all sleeps times this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    trial = Trial()
    times = {f.name: getattr(trial, f.name) * options.slower for f in dataclasses.fields(Trial) if "_ms" in f.name}
    trial = dataclasses.replace(trial, **times)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"block_overlap-{port}.json"
    began = time.time()
    arguments = (options.ranks, port, trial, options.rounds, str(path))
    torch.multiprocessing.spawn(_rank, arguments, nprocs=options.ranks)
    found = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    load = os.getloadavg()[0]
    page = lines(found, provenance(), load)
    print("\n".join(page), f"\n\n{time.time() - began:.0f} s in all")
    record = {"trial": dataclasses.asdict(trial), "load": load, "about": provenance()} | found
    write(options.out, "block_overlap", page, record)


if __name__ == "__main__":
    main()
