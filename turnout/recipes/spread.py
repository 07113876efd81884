"""Execute a Run on many processes that share every batch: the same losses as one, under any layout."""

import contextlib
import dataclasses
import os
import sys
import warnings
from pathlib import Path

from turnout.decide.device import schedule_of
from turnout.errors import UsageError, word
from turnout.models import LM
from turnout.models.piped import Piped
from turnout.models.placed import placed
from turnout.models.stages import even_stages
from turnout.recipes.agreed import agree_on_run, agree_on_tokens, agree_on_weights
from turnout.recipes.execute import Done, begun, beside, claim, finish, resumable, tell, tokens_for
from turnout.recipes.overlaps import check_played, told
from turnout.recipes.run import Run
from turnout.recipes.size import check_size
from turnout.recipes.start import begin, kept_tokenizer
from turnout.run.ranks.processes import Ranks, end, shared, start
from turnout.run.ranks.shard import mesh, shard
from turnout.run.ranks.watch import answering, lead
from turnout.run.ranks.zero_plus_plus import travel
from turnout.train import TrainResult
from turnout.train.data import TokenSet
from turnout.train.loop import train
from turnout.train.overlapping import Overlapping
from turnout.train.piped import Pipelined
from turnout.train.sharded import Sharded
from turnout.types.device import find_device, find_precision, shown
from turnout.types.plan import Plan

__all__ = ["spread"]

_WHERE = "turnout train"
# Routers that draw while they are trained, always or with these above 0.
_DRAWING, _CHANCES = ("GShard", "NoisyTopK", "Poly"), ("dropout", "jitter", "noise")


def spread(
    run: Run,
    out: str | Path,
    *,
    plan: Plan,
    timeout_s: float = 300.0,
    resume: str | None = None,
    tokens_folder: str | Path | None = None,
    tensorboard: bool = False,
    quiet: bool = False,
) -> Done | None:
    """As ``turnout.recipes.execute``, by the processes of one ``torchrun``, each of which calls it.

    A step is that of one process with the whole batch: losses, gradients, their norm, balance losses and what routers
    learn from the load. Where ``torchrun --max-restarts`` has started the processes anew, the run goes on from its last
    checkpoint.

    Args:
        run: what is trained; its batch is that of all processes together.
        out: the output folder, which all machines share.
        plan: how the model is spread. Through a pipeline each of the ``accumulate`` batches of a step goes in
            ``microbatches`` parts of a process's rows; without one they are not cut.
        timeout_s: how long ranks wait for each other.
        resume: as for ``execute``; another number of ranks and another layout go on as well.
        tokens_folder: as for ``execute``.
        tensorboard: as for ``execute``.
        quiet: as for ``execute``.

    Returns:
        Where everything is, on the first rank; None on others.

    Raises:
        TurnoutError: as ``execute``; what stops one rank stops all, and each says which one it was.

    Source: none; torch's own engine, put together by ``turnout.run``.
    """
    out, stage = Path(out), ["the beginning"]
    check_size(run)
    _refuse(run, plan)
    _refuse_parts(run, plan)
    ranks = start(timeout_s=timeout_s, device=run.train.device)
    one = _One(run, out, plan, ranks, stage)
    with answering(ranks, lambda: stage[-1]), resumable(out), warnings.catch_warnings():
        # It is told of every view that comes out of a model; none of them is written to.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        wanted = one.wanted(resume)
        team, tokens, origin = one.prepared(wanted, tokens_folder, quiet=quiet)
        trained = one.train(team, tokens, wanted, tensorboard=tensorboard, quiet=quiet)
        if isinstance(team, Overlapping):
            team.close()
            if ranks.is_first and not quiet and team.means is not None:
                print(told(plan, *team.means), file=sys.stderr)
        whole = one.gathered(team, origin)
    end()
    if whole is None:
        return None
    with resumable(out):
        return finish(run, whole, tokens, out, trained)


@dataclasses.dataclass(frozen=True, eq=False)
class _One:
    """One run, as one of its ranks goes through it."""

    run: Run
    out: Path
    plan: Plan
    ranks: Ranks
    stage: list[str]

    def wanted(self, resume: str | None) -> str | None:
        """The checkpoint to go on from: after a restart the last one, whatever was asked for at first."""
        agree_on_run(self.run, self.plan)
        restarted = any(shared(int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0))
        go_on = lead(self.ranks, lambda: restarted and (self.out / "run.json").exists())
        return "latest" if go_on else resume

    def prepared(
        self, wanted: str | None, folder: str | Path | None, *, quiet: bool
    ) -> tuple[Sharded, TokenSet, Path | None]:
        """The ranks with the model spread over them, the tokens, which the first rank makes, and the model's origin."""
        run, out, ranks = self.run, self.out, self.ranks
        found = lead(ranks, lambda: _path(claim(run, out, wanted)))
        with begun(run, out) if ranks.is_first else contextlib.nullcontext():
            model = placed(begin(run, out, resume=wanted), ranks.device)
            if ranks.is_first:
                tell(run, model, out, quiet=quiet)
                _tell_of_draws(model, quiet=quiet)
            agree_on_weights(model)
            team = self.team(model)
            tokenizer = None if run.start is None else kept_tokenizer(out)

            def make() -> str:
                place = Path(folder or out / "tokens")
                return str(tokens_for(run, place, tokenizer=tokenizer, quiet=quiet).path)

            self.stage.append("preparing the text")
            tokens = TokenSet.open(Path(found or lead(ranks, make)))
            agree_on_tokens(tokens.digest)
        return team, tokens, model.origin

    def team(self, model: LM) -> Sharded:
        """The ranks, with the model spread over them."""
        plan, meshes = self.plan, mesh(self.plan.layout, device=self.ranks.device.type)
        ways = travel(plan, node=_node(plan))
        if plan.layout.pp > 1:
            return Pipelined(self.ranks, meshes, Piped(model, plan, meshes, travel=ways), make=self.empty)
        spread = shard(model, plan.layout, meshes, plan=plan, travel=ways)
        if plan.overlap is not None:
            return Overlapping(self.ranks, meshes, spread, plan.overlap)
        return Sharded(self.ranks, meshes, spread)

    def empty(self) -> LM:
        """A model for weights to be copied into."""
        return LM(self.run.model, seed=self.run.train.seed)

    def train(
        self, team: Sharded, tokens: TokenSet, wanted: str | None, *, tensorboard: bool, quiet: bool
    ) -> TrainResult:
        """All steps."""
        self.stage.append("training")
        spoken = {"plan": self.plan.to_json_dict(), "ranks": self.ranks.world}
        return train(
            team.model,
            tokens,
            dataclasses.replace(self.run.train, device="auto"),  # it is there already
            self.out,
            resume=wanted,
            run_json=self.run.to_json_dict() | beside(tokens) | spoken,
            tensorboard=tensorboard,
            quiet=quiet,
            team=team,
        )

    def gathered(self, team: Sharded, origin: Path | None) -> LM | None:
        """The trained model in one piece, on the first rank."""
        self.stage.append("gathering the model")
        whole = self.empty() if self.ranks.is_first else None
        team.gather(whole)
        if whole is not None:
            whole.origin = origin
            placed(whole, self.ranks.device)
        return whole


def _refuse(run: Run, plan: Plan) -> None:
    """What many processes do not train as one does, found before they meet."""

    def refuse(what: str, got: object, allowed: str, fix: str) -> UsageError:
        return UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))

    layout, batch = plan.layout, run.train.batch
    parts = layout.data_ranks * (plan.microbatches if layout.pp > 1 else 1)
    if run.train.only != "all":
        fix = "train it in one process, without torchrun and --layout"
        raise refuse("only", run.train.only, "be all where many processes train", fix)
    if run.teacher is not None or run.train.kd_weight > 0:
        fix = "train it in one process, without torchrun and --layout"
        raise refuse("a teacher", run.recipe, "be nobody's where many processes train", fix)
    if layout.pp > 1:
        schedule = schedule_of(plan)
        sizes = even_stages(run.model.layers, schedule.stages) if plan.stages is None else plan.stages
        if sum(sizes) != run.model.layers:
            allowed = f"sum to the model's {run.model.layers} blocks"
            raise refuse("the plan's stages", sizes, allowed, "leave stages out for even ones")
    if plan.placement is not None:
        raise refuse("the plan's placement", "one", "be none in turnout train", "leave it out of the plan")
    if plan.overlap is not None:
        check_played(plan)
        device = find_device(run.train.device)
        if device.type != "cpu":
            got, allowed = (
                f"{shown(device)}, with a plan that has an overlap",
                "be a cpu there: it was seen nowhere else",
            )
            raise refuse("device", got, allowed, "pass --device cpu, or leave overlap out of the plan")
        if find_precision(run.train.dtype, device) != "fp32":
            got, fix = (
                f"{run.train.dtype}, with a plan that has an overlap",
                "pass dtype=fp32, or plan without --overlap",
            )
            raise refuse("dtype", got, "be fp32 there", fix)
    if batch % parts:
        kinds = "dp_replicate x dp_shard" + (" x microbatches" if layout.pp > 1 else "")
        allowed = f"be a multiple of {kinds} = {parts}, which share it"
        raise refuse("batch", batch, allowed, f"pass batch={batch + -batch % parts}")


def _node(plan: Plan) -> int | None:
    """How many processes that share a shard are on one machine, in their order; None where they are not consecutive."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    count, shards = int(here) if here.isdigit() else 1, plan.layout.dp_shard
    return count if plan.layout.ep == 1 and 1 < count < shards and shards % count == 0 else None


def _refuse_parts(run: Run, plan: Plan) -> None:
    """Without a pipeline the parts of a step are those of ``accumulate``: a plan that fits by them needs them."""
    train, parts = run.train, plan.microbatches
    if plan.layout.pp > 1 or train.accumulate >= parts:
        return
    each = -(-train.batch * train.accumulate // parts)
    each += -each % plan.layout.data_ranks
    got, allowed = train.accumulate, f"be at least {parts}, the parts in which the plan has a step (microbatches)"
    fix = f"pass batch={each} accumulate={parts}"
    raise UsageError(word("accumulate", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _path(tokens: TokenSet | None) -> str | None:
    return None if tokens is None else str(tokens.path)


def _tell_of_draws(model: LM, *, quiet: bool) -> None:
    """Says when losses cannot be those of one process, because each rank draws for its own rows."""
    for router in model.routers:
        drawn = type(router).__name__ in _DRAWING or any(getattr(router, name, 0) for name in _CHANCES)
        if drawn and not quiet:
            what = f"note: {type(router).__name__} draws while it is trained: each rank draws for its own rows, so the"
            print(f"{what} losses are those of other draws than one process makes.", file=sys.stderr)
            return
