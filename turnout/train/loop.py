"""The training loop: steps, lines of metrics, evaluations and checkpoints, so that no crash costs more than a little.

What a resumed run needs is small on purpose. The learning rate and the batches are functions of the step, and every
random number of a step is drawn from generators seeded with (seed, step, micro-batch); what is left is the model
(router biases are its buffers), the optimizer's state and the sums of the unfinished log window. On a CPU with the same
number of threads, a resumed run writes the losses that the uninterrupted one would have written, bit for bit. On CUDA,
where sums have no fixed order, and from one device to another they agree to rounding; a run that goes on says so.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from turnout.errors import Interrupted, StorageError, TrainingError
from turnout.expects import PATH, expects
from turnout.fields import plain
from turnout.measure import bits_per_byte, max_vio
from turnout.measure.memory import peak_memory
from turnout.storage import write_whole
from turnout.train import state as checkpoints
from turnout.train.allocator import keep_freed_memory
from turnout.train.config import TrainConfig, TrainResult
from turnout.train.data import Batch, Stream, TokenSet, windows
from turnout.train.folder import locked, read_run_json, refuse_missing_run, refuse_other_run, write_failure
from turnout.train.frozen import training
from turnout.train.metrics import Metrics, need_tensorboard, rewind
from turnout.train.place import crossing, settle
from turnout.train.progress import Progress, progress_for
from turnout.train.resumed import FREE, PLACE, check_same
from turnout.train.room import check_room, out_of_memory
from turnout.train.signals import Stop, listening
from turnout.train.step import Step
from turnout.train.team import ALONE, Team
from turnout.types.device import shown
from turnout.wrappers import unwrapped

__all__ = ["TrainConfig", "TrainResult", "train"]


@expects(model=nn.Module, config=TrainConfig, out=PATH)
def train(
    model: nn.Module,
    tokens: TokenSet,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool | str | None = False,
    run_json: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    tensorboard: bool = False,
    quiet: bool = False,
    team: Team = ALONE,
    teacher: nn.Module | None = None,
) -> TrainResult:
    """Trains ``model`` in place and leaves run.json, metrics.jsonl and checkpoints in ``out``.

    The objective of a step is the mean of -ln p(target) over its tokens + aux_weight · (mean over layers of the
    load-balance loss) + z_weight · (of the z-loss) + penalty_weight · (of ``Routing.penalty``). Routers with
    ``after_step`` get the load of the whole step once. Ctrl-C and SIGTERM save first; a second one does not.

    Args:
        model: ``model(id_BS)`` gives ``logits_BSV`` and ``routings``, of ``model.routers`` in order. It stays on its
            device, unless ``config.device`` names another. If it takes a ``generator``, it is given one seeded from
            (seed, step, micro-batch); if it takes an ``attention_mask``, one for batches with padding. All this is
            found in what is wrapped too (compiled, DistributedDataParallel); checkpoints have the names inside.
        tokens: a TokenSet.
        config: the optimisation.
        out: a folder that holds no run; or, with ``resume``, the one that holds this run.
        resume: True or "latest" goes on from the last checkpoint, or from the beginning while there is none; a name
            ("step-00000100") from that one, setting later ones aside. A damaged one is an error, never skipped.
        run_json: what goes into run.json beside the optimisation.
        progress: who is told; default a bar on a terminal, plain lines elsewhere, nobody when ``quiet``.
        tensorboard: also write TensorBoard events (an extra).
        quiet: see ``progress``.
        team: the processes that train one model together, each of which calls this; ``turnout.train.sharded``.
        teacher: with ``config.kd_weight``: a model of the same vocabulary, from whose probabilities it learns too.

    Returns:
        The result; evaluations and seconds count what came before a resume.

    Raises:
        UsageError: the folder holds another run, is in use, or is of a run on other data; the batch does not fit into
            memory; or the model has routers that learn from the load, but nothing names its ``routers``.
        CheckpointError: the checkpoint is missing, damaged (names the last whole one) or of another model.
        TrainingError: a loss or gradient is not finite.
        StorageError: the disk is full; nothing saved is lost.
        Interrupted: the user stopped the run, after everything was saved.

    >>> train(nn.Linear(1, 1), None, TrainConfig(steps=1, batch=1, seq=1), "no/run", resume=True)
    Traceback (most recent call last):
    turnout.errors.UsageError: resume must name a folder that holds a run in turnout.train; got no/run. Nearest fix: ...

    Source: Loshchilov & Hutter, 2019, in the usual loop; Rajbhandari et al., 2022, "DeepSpeed-MoE" (``teacher``).
    """
    wanted = "latest" if resume is True else (resume or None)
    team.lead(lambda: refuse_missing_run(Path(out), wanted))
    teller = progress or progress_for(quiet=quiet or not team.first)
    run = _Run(model, tokens, config, Path(out), teller, team, teacher)
    return run.whole(wanted, dict(run_json or {}), tensorboard=tensorboard)


class _Run:
    """One run while it is going."""

    def __init__(
        self, model: nn.Module, tokens: TokenSet, config: TrainConfig, out: Path, teller: Progress, team: Team,
        teacher: nn.Module | None,
    ) -> None:  # fmt: skip
        self.team, self.teacher = team, teacher
        self.place = settle(model, config)
        # As it was asked for, which run.json holds, and with what "auto" became.
        self.asked, self.config = config, dataclasses.replace(config, dtype=self.place.dtype)
        self.model, self.tokens, self.out, self.teller = model, tokens, out, teller
        self.step = 0  # optimizer steps done
        self.folder = out / "checkpoints"
        self.metrics: Metrics | None = None
        self.signal: str | None = None  # the signal after which all stop
        self.evaluations: list[Mapping[str, Any]] = []
        self.loss = float("nan")
        self.before_s = 0.0  # seconds that earlier processes worked on this run
        self.before_bytes = 0  # the most memory that one of them took
        self.train_s, self.trained = 0.0, 0  # seconds and steps of training alone, in this process

    def whole(self, wanted: str | None, run_json: dict[str, Any], *, tensorboard: bool) -> TrainResult:
        """From the lock on the folder to the result; the caller's random numbers and training mode stay as they are."""
        devices = [p.device for p in self.model.parameters() if p.device.type == "cuda"][:1]
        if not devices:
            keep_freed_memory()
        lock = locked(self.out) if self.team.first else contextlib.nullcontext()
        with lock, torch.random.fork_rng(devices=devices), training(self.model, self.config.only):
            if wanted is None:
                self.team.lead(lambda: refuse_other_run(self.out, run_json))
            mode = self.model.training
            try:
                self.open(wanted, run_json, tensorboard=tensorboard)
                with listening(self.teller.say) as stop:
                    return self.go(stop)
            except (Interrupted, KeyboardInterrupt):
                raise
            except BaseException as error:
                if self.team.first:
                    write_failure(self.out, error, self.step, run_json)
                raise
            finally:
                self.close()
                self.model.train(mode)

    # ---- beginning

    def open(self, wanted: str | None, run_json: dict[str, Any], *, tensorboard: bool) -> None:
        """Makes or reopens the folder, and puts everything where the last checkpoint has it."""
        config = self.config
        # What can be wrong with the input is found before anything is written.
        if tensorboard:
            need_tensorboard()
        path = self._found(wanted)
        stream = Stream(self.tokens.train, batch=config.batch, seq=config.seq, seed=config.seed)
        if self.team is ALONE:  # of many, each has a share, which their caller knows
            check_room(
                self.model, Stream(self.tokens.train, batch=1, seq=config.seq, seed=config.seed).batch(0), config
            )
        next(self._held_out())
        self.work, changed = Step(self.model, config, stream, self.team, self.teacher), dict[str, Any]()
        if path is not None:
            changed = self._load(path)
        elif wanted is not None:
            self.teller.say(f"{self.out} has no checkpoint yet: starting from the beginning.")
        kept = self.team.lead(lambda: self._begin(wanted, run_json, changed))
        self.evaluations = [record for record in kept if record["kind"] == "eval"]
        self.before_bytes = max((record.get("peak_memory_bytes") or 0 for record in kept), default=0)
        self.loss = next((r["loss"] for r in reversed(kept) if r["kind"] == "train"), self.loss)
        if self.team.first:
            events = self.out / "tensorboard" if tensorboard else None
            self.metrics = Metrics(self.out / "metrics.jsonl", tensorboard=events, step=self.step)

    def _found(self, wanted: str | None) -> Path | None:
        """The checkpoint to go on from, looked at by the first process."""

        def choose() -> str | None:
            checkpoints.clean(self.folder)
            path = None if wanted is None else checkpoints.choose(self.folder, wanted)
            return None if path is None else path.name

        name = self.team.lead(choose)
        return None if name is None else self.folder / name

    def _begin(self, wanted: str | None, run_json: dict[str, Any], changed: dict[str, Any]) -> list[dict[str, Any]]:
        """Writes what is there before the first step; the lines of metrics.jsonl that stay."""
        body = read_run_json(self.out) if wanted is not None else {}
        self._write_run_json(body, run_json, changed)
        if getattr(self.tokens, "tokenizer", None) is not None:
            write_whole(self.out / "tokenizer.json", self.tokens.tokenizer.to_str(pretty=True))
        (self.out / "error.txt").unlink(missing_ok=True)
        return rewind(self.out / "metrics.jsonl", self.step)

    def _load(self, path: Path) -> dict[str, Any]:
        now = plain(self.asked)
        digest = getattr(self.tokens, "digest", None)
        body = self.team.load(
            path, self.model, self.work.optimizer, check=lambda body: check_same(body, self.config, digest, self.out)
        )
        self.step, self.before_s = body["step"], body["seconds"]
        self.work.window.restore(body["window"])
        for name in self.team.lead(lambda: list(checkpoints.set_aside_after(self.folder, self.step))):
            self.teller.say(f"a later checkpoint is kept as {name}; delete it when it is of no use.")
        self.teller.say(f"resuming {self.out} from {path.name}.")
        for line in crossing(body, self.place, self._arithmetic()):
            self.teller.say(line)
        changed = {k: [v, now.get(k)] for k, v in body["config"].items() if k not in FREE and v != now.get(k)}
        for name, (old, new) in changed.items():
            if name not in PLACE:
                self.teller.say(f"{name} changes from {old!r} to {new!r}: from here on this is not the run that began.")
        return changed

    def _arithmetic(self) -> str:
        """What the last bits of a sum depend on."""
        inside = unwrapped(self.model)
        around = "" if inside is self.model else f", in {type(self.model).__name__}"
        on = shown(self.work.device).replace(str(self.work.device), self.work.device.type)
        return f"{on}, {torch.get_num_threads()} threads, torch {torch.__version__}{around}"

    def _write_run_json(self, body: dict[str, Any], given: dict[str, Any], changed: dict[str, Any]) -> None:
        """The run as it began; a resumed one adds how it was resumed, and takes over what was changed."""
        fresh = {"train": plain(self.asked), **given, "place": self.place.to_json_dict()}
        if body:
            entry = {"step": self.step, "command": given.get("command"), "changed": changed, "place": fresh["place"]}
            fresh = {**body, **(fresh if changed else {}), "resumed": [*body.get("resumed", []), entry]}
        write_whole(self.out / "run.json", json.dumps(fresh, indent=2) + "\n")

    # ---- going

    def go(self, stop: Stop) -> TrainResult:
        """All steps that are left."""
        config = self.config
        self.began_s = time.monotonic()
        self.lap_s, self.lap_steps = 0.0, 0
        self.model.train()
        self.teller.say(f"training on {shown(self.place.device)}, in {self.place.dtype}.")
        self.teller.start(self.step, config.steps)
        if config.eval_first and self.step == 0 and not self.evaluations:
            self._guard(self._evaluate)
        while self.step < config.steps:
            started = time.monotonic()
            lr = config.lr_at(self.step)
            self._guard(lambda lr=lr: self.work.run(self.step, lr))
            self.step += 1
            last = self.step == config.steps
            self._guard(lambda: self._hear(stop))
            logs = last or self.step == 1 or self.step % config.log_every == 0
            evaluates = last or self.step % config.eval_every == 0
            saves = last or self.step % config.checkpoint_every == 0 or self.signal is not None
            if logs or evaluates or saves:
                self._guard(self.work.check)
            self.lap_s, self.lap_steps = self.lap_s + time.monotonic() - started, self.lap_steps + 1
            self.teller.advance(self.step)
            if logs:
                self._guard(lambda lr=lr: self._log(lr))
            if evaluates:
                self._guard(self._evaluate)
            if saves:
                self._guard(self._save)
            if self.signal is not None and not last:
                raise Interrupted(
                    f"stopped by {self.signal} after step {self.step} of {config.steps}; everything is saved in "
                    f"{self.out}. To go on: turnout train --resume --out {quote(str(self.out))} (resume=True)."
                )
        return self._result()

    def _hear(self, stop: Stop) -> None:
        """A signal that some process was sent is for all: they stop after the same step."""
        self.signal = self.team.heard(stop.asked)

    def _at(self) -> str:
        return f"step {self.step + 1} of {self.config.steps}"

    def _guard(self, action: Any) -> None:
        """Does it, and adds to an expected error what is saved and how to go on."""
        try:
            with self.team.together(self._at):
                action()
        except (StorageError, TrainingError, torch.OutOfMemoryError) as raised:
            error = raised
            if isinstance(raised, torch.OutOfMemoryError):
                error = out_of_memory(raised, self.config, self.place.device)
            known = checkpoints.find(self.folder)
            saved = f"{known[-1].name} is saved" if known else "no checkpoint was saved yet"
            out = quote(str(self.out))
            how = f"; to go on from it: turnout train --resume --out {out} (resume=True)" if known else ""
            raise type(error)(f"{error} Stopped at step {self.step} of {self.config.steps}; {saved}{how}.") from error

    def _log(self, lr: float) -> None:
        window, config = self.work.window, self.config
        (loss, aux, z, penalty), routed = window.means(), bool(window.load_L)
        vio = [max_vio(load_E) for load_E in window.load_L]
        record = {
            **self._line("train"),
            "loss": loss,
            "lr": lr,
            "grad_norm": float(self.work.grad_norm),
            "tokens_per_s": self.lap_steps * config.tokens_per_step / max(self.lap_s, 1e-9),
            "aux_loss": aux if routed else None,
            "z_loss": z if routed else None,
            "penalty": penalty if routed else None,
            "max_vio": sum(vio) / len(vio) if vio else None,
            **self.team.pace(),
        }
        self._lap()
        window.clear()
        self.loss = loss
        self._write(record)
        self.teller.train(record)

    def _line(self, kind: str) -> dict[str, Any]:
        """How far the run is, what it took so far in time and in memory: what every line of metrics.jsonl says."""
        return {
            "kind": kind,
            "step": self.step,
            "tokens": self.step * self.config.tokens_per_step,
            "seconds": round(self._seconds(), 3),
            "peak_memory_bytes": self._peak_bytes(),
        }

    def _lap(self) -> None:
        self.train_s, self.trained = self.train_s + self.lap_s, self.trained + self.lap_steps
        self.lap_s, self.lap_steps = 0.0, 0

    def _evaluate(self) -> None:
        line = self._line("eval")  # the model stands as it did before it was measured
        self.model.eval()
        try:
            record = line | self.team.measured(self.model, self._measured)
        finally:
            self.model.train()
        self._write(record)
        self.evaluations.append(record)
        self.teller.evaluated(record)

    def _measured(self, model: nn.Module) -> dict[str, Any]:
        length_V, domains = torch.as_tensor(self.tokens.byte_length_V), self.tokens.domains
        with torch.autocast(self.work.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bf16"):
            return bits_per_byte(model, self._held_out(), length_V, domains=domains).to_json_dict()

    def _held_out(self) -> Iterator[Batch]:
        config = self.config
        return windows(self.tokens.held_out, batch=config.batch, seq=config.seq, limit=config.eval_tokens)

    def _save(self) -> None:
        if self.metrics is not None:
            self.metrics.sync()
        body = {
            "tokens": self.step * self.config.tokens_per_step,
            "seconds": self._seconds(),
            "window": self.work.window.to_json_dict(),
            "config": plain(self.asked),
            "place": self.place.to_json_dict(),
            "tokens_digest": getattr(self.tokens, "digest", None),
            "arithmetic": self._arithmetic(),
        }
        keep = self.config.keep_checkpoints
        self.team.save(self.folder, self.step, self.model, self.work.optimizer, body, keep=keep)

    # ---- ending

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def _seconds(self) -> float:
        return self.before_s + time.monotonic() - self.began_s

    def _peak_bytes(self) -> int:
        return max(self.before_bytes, peak_memory(self.place.device) or 0)

    def _result(self) -> TrainResult:
        self._lap()
        return TrainResult(
            steps=self.step,
            loss=self.loss,
            evaluations=tuple(self.evaluations),
            tokens_per_s=self.trained * self.config.tokens_per_step / self.train_s if self.trained else 0.0,
            seconds=self._seconds(),
            peak_memory_bytes=self._peak_bytes(),
        )

    def close(self) -> None:
        """Ends the progress and closes the files."""
        with contextlib.suppress(OSError):
            self.teller.stop()
        if self.metrics is not None:
            self.metrics.close()
