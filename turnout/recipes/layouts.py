"""How a model would be trained on a cluster: the layouts that fit, the fastest first, with what is foreseen of each."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from turnout import recipes
from turnout.decide.device import Choice, layouts, refined
from turnout.decide.device.pace import degrees
from turnout.decide.device.refined import played_by
from turnout.errors import UsageError, word
from turnout.measure import quantity
from turnout.models.checkpoint.own import outline
from turnout.recipes.overlaps import Overlap, overlapped
from turnout.recipes.run import Run
from turnout.recipes.workload import as_text, config_of, workload_of
from turnout.show.plan import plan_html
from turnout.storage import write_whole
from turnout.types import Cluster, Workload

__all__ = ["Planned", "plan_model", "run_of"]

_EVERY = 1_000_000


@dataclasses.dataclass(frozen=True)
class Planned:
    """The best layouts of a run over a cluster.

    Args:
        model: what the user called it.
        run: the model and its training.
        workload: its step in numbers.
        cluster: the devices.
        choices: the fastest first.
        overrides: fields of the run that the user set.
        overlap: the choice with a block schedule, which is among the choices; None where none was asked for.

    Source: none; plain bookkeeping.
    """

    model: str
    run: Run
    workload: Workload
    cluster: Cluster
    choices: tuple[Choice, ...]
    overrides: tuple[str, ...] = ()
    overlap: Overlap | None = None

    def table(self) -> str:
        """A line for each choice, and under it what its step waits for."""
        name = f" ({self.cluster.name})" if self.cluster.name else ""
        used = self.choices[0].plan.layout.world
        lines = [
            f"{self.model}: {as_text(self.workload)}",
            f"{used} of {self.cluster.devices} devices of {quantity(self.cluster.memory_bytes)}B{name}",
            "",
            f"     {'layout':<44} {'schedule':<22} {'step':>9} {'bubble':>7} {'memory':>9}  binds",
        ]
        for number, choice in enumerate(self.choices, 1):
            plan, taken, step = choice.plan, choice.held, choice.pace
            piped = f"{plan.schedule}, {plan.microbatches} parts" if plan.layout.pp > 1 else _parts(plan.microbatches)
            piped += ", recompute" if plan.recompute else ""
            mark = "" if choice.runs else "  (foreseen only)"
            mark += "  (with the block schedule)" if plan.overlap else ""
            memory = f"{quantity(taken.total)}B"
            lines.append(
                f"{number:>3}. {degrees(plan.layout) or 'one device':<44} {piped:<22} {seconds(step.step_s):>9} "
                f"{step.bubble:>6.1%} {memory:>9}  {step.binds}{mark}"
            )
        if self.overlap is not None:
            number = self.choices.index(self.overlap.choice) + 1
            lines += ["", f"the block schedule of {number}.:", *(f"  {line}" for line in self.overlap.lines())]
        return "\n".join([*lines, "", *self._best()])

    def _best(self) -> list[str]:
        """What is foreseen of the first choice, in full."""
        best = self.choices[0]
        step, taken = best.pace, best.held
        tokens = self.workload.tokens / step.step_s
        times = ", ".join(f"{name} {seconds(value)}" for name, value in step.seconds.items() if value > 0)
        memory = ", ".join(f"{name} {quantity(value)}B" for name, value in taken.by_kind.items() if value > 0)
        where = f" (pipeline device {taken.stage})" if best.plan.layout.pp > 1 else ""
        lines = [
            f"the first, {quantity(tokens)} tokens a second:",
            f"  step    {times}",
            f"  memory  {memory}; on the fullest device{where}",
        ]
        for name, size in step.link_bytes.items():
            between = "between nodes too" if name in step.crossing else "inside a node"
            lines.append(f"  wire    {name}: {quantity(size)}B a device and step, {between}")
        if best.price:
            each = best.price / self.workload.tokens * 1e9
            lines.append(f"  price   {best.price:.3g} a step, {each:.4g} for 1e9 tokens")
        return lines

    def command(self, number: int = 0, *, plan: str | Path = "plan.json") -> str:
        """The line that trains by a choice, on each node: as many processes as the layout has, and its step."""
        layout = self.choices[number].plan.layout
        each = min(self.cluster.devices_per_node, layout.world)
        nodes = -(-layout.world // self.cluster.devices_per_node)
        left = layout.world - each * (nodes - 1)  # on the last node
        count = str(each) if left == each else f"$([ $RANK = {nodes - 1} ] && echo {left} || echo {each})"
        launch = f"torchrun --nproc-per-node {count}"
        if nodes > 1:
            launch += f" --nnodes {nodes} --node-rank $RANK --master-addr $HOST"
        named = self.model in recipes.__all__
        what = self.model if named else f"--from {shlex.quote(_folder(self.model))}"
        fields = "".join(f"{shlex.quote(field)} " for field in self._fields(number, named=named))
        return f"{launch} -m turnout train {what} {fields}--plan {shlex.quote(str(plan))} --data DATA --out OUT"

    def _fields(self, number: int, *, named: bool) -> list[str]:
        """The run's fields that make its step the one that was planned: the user's, and what they leave open."""
        plan, train = self.choices[number].plan, self.run.train
        # A pipeline cuts the batch by itself; without one the parts of a step are those that add up gradients.
        parts = plan.microbatches if plan.layout.pp == 1 else 1
        exact: dict[str, object] = {"batch": train.batch * train.accumulate // parts, "accumulate": parts}
        if named and exact == {"batch": train.batch, "accumulate": train.accumulate}:
            return list(self.overrides)
        if not named:  # a model that exists is trained with other fields than a recipe's
            exact |= {"seq": train.seq, "dtype": train.dtype}
        kept = [text for text in self.overrides if text.partition("=")[0].removeprefix("train.") not in exact]
        return [*kept, *(f"{name}={value}" for name, value in exact.items())]

    def page(self) -> str:
        """A page with the numbers of the first choice, and a picture of its pipeline where it has one."""
        best = self.choices[0]
        played = played_by(self.workload, best)
        return plan_html(self.model, self.table(), best.pace.seconds, played)

    def to_json(self) -> str:
        """Every choice with what is foreseen, as JSON."""
        rows = [
            {"plan": choice.plan.to_json_dict(), "step_s": choice.pace.step_s, "seconds": dict(choice.pace.seconds)}
            | {"bubble": choice.pace.bubble, "binds": choice.pace.binds, "link_bytes": dict(choice.pace.link_bytes)}
            | {"memory_bytes": dict(choice.held.by_kind), "stage": choice.held.stage, "price": choice.price}
            | {"runs": choice.runs, "overlapped": choice.plan.overlap is not None}
            for choice in self.choices
        ]
        body = {"model": self.model, "params": self.workload.params, "tokens": self.workload.tokens}
        body |= {} if self.overlap is None else {"makespans": dict(self.overlap.makespans)}
        return json.dumps(body | {"cluster": dataclasses.asdict(self.cluster), "choices": rows}, indent=2)

    def save(self, path: str | Path, number: int = 0) -> None:
        """Writes the plan of a choice, for ``turnout train --plan`` and ``turnout parity``."""
        write_whole(path, json.dumps(self.choices[number].plan.to_json_dict(), indent=2) + "\n")


def seconds(value: float) -> str:
    """A time in words: ms below a second."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.4g} s"


def _parts(microbatches: int) -> str:
    return "whole batch" if microbatches == 1 else f"in {microbatches} parts"


def _folder(model: str) -> str:
    """What ``turnout train --from`` takes of a model, which may have been named by its config.json."""
    return str(Path(model).parent) if Path(model).is_file() else model


def run_of(model: str, overrides: Sequence[str] = ()) -> Run:
    """The run that is planned: a recipe's, or ``tiny``'s training of a model that exists, with fields overridden.

    Args:
        model: a recipe, or a folder with a config.json.
        overrides: as ``turnout train`` takes them, ``batch=64``.

    Raises:
        TurnoutError: no such recipe or model, no such field.

    Source: none; plain bookkeeping.
    """
    if model in recipes.__all__:
        run = recipes.find(model)
    else:
        tiny, config = recipes.find("tiny"), config_of(model)
        train = dataclasses.replace(tiny.train, seq=min(config.max_seq, 4096), dtype="bf16")
        run = dataclasses.replace(tiny, recipe="plan", model=config, train=train)
    return run.override(list(overrides)) if overrides else run


def plan_model(
    model: str,
    cluster: Cluster,
    *,
    overrides: Sequence[str] = (),
    devices: int | None = None,
    foreign: bool = False,
    overlap: bool = False,
    top: int = 5,
) -> Planned:
    """The fastest layouts of a model's training that fit a cluster.

    Args:
        model: a recipe, or a folder with a config.json; weights need not be there.
        cluster: what there is.
        overrides: fields of the run, as ``turnout train`` takes them.
        devices: how many to use; None for all.
        foreign: whether to look at tensor and context parallelism too, which turnout foresees and does not run.
        overlap: whether to make a block schedule for the layout that gains most by one; it is kept whatever its rank.
        top: how many to keep.

    Raises:
        TurnoutError: no such model; one that many devices do not train as one does; nothing fits, with what is too
            large and the smallest change that fits; or a model whose blocks no schedule is played for.

    >>> found = plan_model("tiny", Cluster(devices_per_node=4, memory_bytes=4e9), top=2)
    >>> found.choices[0].plan.layout.world
    4

    Source: none; ``turnout.decide.device.layouts``.
    """
    run = run_of(model, overrides)
    workload = workload_of(run)
    if (cluster.devices if devices is None else devices) > 1:
        _check_shared(run)
    # More than are shown are played by the simulator: it may order them otherwise than arithmetic does.
    found = layouts(workload, cluster, devices=devices, foreign=foreign, top=2 * top)
    played = sorted((refined(workload, choice) for choice in found), key=lambda choice: choice.pace.step_s)
    if not overlap:
        return Planned(model, run, workload, cluster, tuple(played[:top]), tuple(overrides))
    every = layouts(workload, cluster, devices=devices, top=_EVERY)
    found_one = overlapped(run, workload, every)
    kept = [choice for choice in played if choice.plan.layout != found_one.choice.plan.layout][: top - 1]
    kept = sorted([*kept, found_one.choice], key=lambda choice: choice.pace.step_s)
    return Planned(model, run, workload, cluster, tuple(kept), tuple(overrides), found_one)


def _check_shared(run: Run) -> None:
    """Refuses what ``turnout train`` does not do on many processes, before it is planned."""

    def refuse(what: str, got: object, allowed: str, fix: str) -> UsageError:
        return UsageError(word(what, got=got, allowed=allowed, where="turnout plan", fix=fix))

    if run.train.only != "all":
        raise refuse("only", run.train.only, "be all where many devices train", "pass only=all, or --devices 1")
    for router in outline(run.model).routers:
        if getattr(router, "capacity_factor", None) is not None:
            got = f"{type(router).__name__}, which chooses among the tokens of its batch"
            fix = "pass router=TopK, or --devices 1"
            raise refuse("router", got, "route each token by itself where many devices train", fix)
