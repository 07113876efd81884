"""A language model in the stages of a pipeline, each spread over processes: what one process holds of it, and plays."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from turnout.decide.device import schedule_of
from turnout.errors import UsageError, word
from turnout.models.lm import LM
from turnout.models.stages import LMStage, cut, even_stages, shared_parameters
from turnout.run.ranks.pipeline import Pipeline
from turnout.run.ranks.shard import Meshes, shard
from turnout.types.plan import Plan

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

__all__ = ["Piped"]

_WHERE = "turnout.models.piped"


class Piped(nn.Module):
    """This process's stages of a model, and the schedule that all processes of the pipeline play.

    Args:
        lm: the whole model, the same on every process; used up.
        plan: with the schedule, the microbatches, and how many blocks each stage has.
        meshes: of the plan's layout.
        travel: as for ``turnout.run.ranks.shard``.

    Attributes:
        stages: by their number, as text.
        again: the names, here, of the parameters that an earlier stage holds too: a copy counts once.

    Raises:
        UsageError: a schedule that is not for this plan or this model, or a router that chooses among the tokens of a
            batch, which comes in parts here.

    Source: Huang et al., 2019, "GPipe", over stages that are spread by ``turnout.run.ranks.shard``.
    """

    def __init__(
        self, lm: LM, plan: Plan, meshes: Meshes, *, travel: Callable[["FSDPModule"], None] | None = None
    ) -> None:
        super().__init__()
        self.plan, self.config = plan, lm.config
        schedule, group = schedule_of(plan), meshes.dense["pp"].get_group()
        sizes = even_stages(lm.config.layers, schedule.stages) if plan.stages is None else plan.stages
        _refuse(lm, plan)
        mine = [stage for stage, holder in enumerate(schedule.rank_of_stage) if holder == group.rank()]
        shared = shared_parameters(lm, sizes)
        made = cut(lm, sizes, only=mine)
        for stage in made.values():
            shard(stage, plan.layout, meshes, plan=plan, travel=travel)
        self.stages = nn.ModuleDict({str(number): stage for number, stage in made.items()})
        device = lm.embedding.device
        self.pipeline = Pipeline(made, schedule, device=device, group=group, shared=shared)
        self.again = {
            f"stages.{number}.{name}" for name, held in shared.items() for number in held[1:] if number in made
        }

    @property
    def numbered(self) -> Mapping[int, LMStage]:
        """This process's stages by their number."""
        return {int(number): stage for number, stage in self.stages.items()}  # pyrefly: ignore[bad-return]

    @property
    def routers(self) -> list[nn.Module]:
        """Those of this process's routed layers, in layer order."""
        return [router for stage in self.numbered.values() for router in stage.routers]

    def step(self, microbatches: Sequence[Mapping[str, Any]]) -> dict[int, Tensor]:
        """As ``Pipeline.step``."""
        return self.pipeline.step(microbatches)


def _refuse(lm: LM, plan: Plan) -> None:
    for name, module in lm.named_modules() if plan.microbatches > 1 else ():
        if getattr(module, "capacity_factor", None) is not None:
            got = f"{name} ({type(module).__name__}, capacity_factor={module.capacity_factor})"
            allowed = "route each token by itself: it chooses among the tokens of its batch, which comes in parts"
            fix = "build it with capacity_factor=None, or with a router that knows none (TopK, LossFree)"
            raise UsageError(word("a router", got=got, allowed=allowed, where=_WHERE, fix=fix))
