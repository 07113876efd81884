"""A language model cut into the stages of a pipeline, each with the names that its parameters have in the whole."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.layers import MoE
from turnout.models.block import Block
from turnout.models.carried import refuse_carry
from turnout.models.config import LMConfig
from turnout.models.fused import IGNORE, capped
from turnout.models.head import head_loss
from turnout.models.lm import LM
from turnout.models.packed import refuse_packed
from turnout.models.padding import Places, new_places, real_tokens
from turnout.run.product import linear
from turnout.run.ranks.pipeline import Carried
from turnout.types import Routing
from turnout.wrappers import unwrapped

__all__ = ["LMStage", "cut", "even_stages", "shared_parameters"]

_WHERE = "turnout.models.stages"
# So that what routers draw in one stage has nothing to do with what they draw in another.
_SEED_STEP = 0x9E3779B97F4A7C15


def even_stages(layers: int, stages: int) -> tuple[int, ...]:
    """How many blocks each stage has when all have as many, or one more at the beginning.

    Raises:
        UsageError: fewer blocks than stages.

    >>> even_stages(7, 3)
    (3, 2, 2)

    Source: none; plain division.
    """
    if not 1 <= stages <= layers:
        got, fix = f"{stages} stages of {layers} blocks", f"take at most {layers} stages (pp, times those on a device)"
        raise UsageError(word("stages", got=got, allowed="have a block each", where=_WHERE, fix=fix))
    return tuple(layers // stages + (index < layers % stages) for index in range(stages))


def shared_parameters(lm: LM, sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Name of a parameter that several stages need -> those stages: a tied embedding, a router of all layers.

    Each of them holds a copy; ``turnout.run.ranks.pipeline.Pipeline(shared=...)`` keeps the copies' gradients one.

    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, tie_embeddings=True))
    >>> shared_parameters(lm, (1, 1))
    {'embedding': (0, 1)}

    Source: none; plain bookkeeping.
    """
    found: dict[str, tuple[int, ...]] = {}
    if len(sizes) > 1 and lm.head is None:
        found["embedding"] = (0, len(sizes) - 1)
    routed = tuple(stage for stage in range(len(sizes)) if any(map(lm.config.is_routed, _blocks_of(sizes, stage))))
    if lm.pre_gate is not None and len(routed) > 1:
        found |= {f"pre_gate.{name}": routed for name, _ in lm.pre_gate.named_parameters()}
    return found


def cut(lm: LM, sizes: Sequence[int], *, only: Iterable[int] | None = None) -> dict[int, "LMStage"]:
    """The stages of a model by their number; they hold its own parameters, and copies of those that several need.

    Args:
        lm: the whole model; not to be trained beside its stages.
        sizes: how many blocks each stage has, in order; the first also embeds, the last also has the loss.
        only: which stages to make; None for all.

    Raises:
        UsageError: sizes that are not those of all blocks, or stages that there are not.

    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=3, heads=2))
    >>> stages = cut(lm, (2, 1))
    >>> sorted(name for name, _ in stages[1].named_parameters())[0]
    'blocks.2.attention.out.weight'
    >>> id_BS = torch.tensor([[3, 1, 4]])
    >>> bool(stages[1](stages[0](id_BS=id_BS), id_BS=id_BS, target_BS=id_BS) == lm.loss(id_BS, id_BS).nats)
    True

    Source: none; stages keep the names of the whole as in torchtitan.
    """
    if sum(sizes) != lm.config.layers or min(sizes, default=-1) < 0:
        got, allowed = f"{tuple(sizes)}", f"be whole numbers that sum to the model's {lm.config.layers} blocks"
        fix = f"pass stages={even_stages(lm.config.layers, max(1, min(len(sizes), lm.config.layers)))}"
        raise UsageError(word("stages", got=got, allowed=allowed, where=_WHERE, fix=fix))
    wanted = range(len(sizes)) if only is None else sorted(only)
    strange = [each for each in wanted if not 0 <= each < len(sizes)]
    if strange:
        allowed, fix = f"be below {len(sizes)}", "pass those that the schedule gives this rank"
        raise UsageError(word("a stage", got=strange[0], allowed=allowed, where=_WHERE, fix=fix))
    return {each: LMStage(lm, each, sizes) for each in wanted}


class LMStage(nn.Module):
    """Some consecutive blocks of a language model; with the embedding in the first stage, norm and head in the last.

    Args:
        lm: the whole model.
        stage: which stage this is.
        sizes: how many blocks each stage has.

    Attributes:
        side: gives a loss to add for the routings of one microbatch, such as a balance loss, or None; its gradient
            enters here, where the routings are.

    Source: none; a model cut into pieces.
    """

    side: Callable[[Sequence[Routing]], Tensor | None] | None = None
    like: Tensor

    def __init__(self, lm: LM, stage: int, sizes: Sequence[int]) -> None:
        super().__init__()
        refuse_packed(lm, "cut into stages", where="turnout.models.stages")
        refuse_carry(lm, "cut into stages", where="turnout.models.stages")
        self.config: LMConfig = lm.config
        self.stage, self.stages = stage, len(sizes)
        self.first, self.last = stage == 0, stage == len(sizes) - 1
        self.layers = _blocks_of(sizes, stage)
        copies = shared_parameters(lm, sizes)

        def mine(name: str, parameter: nn.Parameter) -> nn.Parameter:
            if copies.get(name, (stage,))[0] == stage:
                return parameter
            return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)

        # The embedding is the output layer too where there is no other.
        embeds = self.first or (self.last and lm.head is None)
        self.embedding = mine("embedding", lm.embedding) if embeds else None
        self.positions = lm.positions if self.first else None
        self.blocks = nn.ModuleList()
        for layer in self.layers:  # under their own names, not numbered anew
            self.blocks.add_module(str(layer), lm.blocks[layer])
        self.norm, self.head = (lm.norm, lm.head) if self.last else (None, None)
        self.rope, self.local_rope = lm.rope, lm.local_rope
        # Cast along with the weights, which a stage may have none of.
        self.register_buffer("like", torch.empty(0, dtype=lm.embedding.dtype), persistent=False)
        self.pre_gate = None
        if lm.pre_gate is not None and any(map(lm.config.is_routed, self.layers)):
            keeps = copies.get("pre_gate.weight", (stage,))[0] == stage
            self.pre_gate = lm.pre_gate if keeps else copy.deepcopy(lm.pre_gate)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is handed on: that of the weights."""
        return self.like.dtype

    @property
    def routers(self) -> list[nn.Module]:
        """The routers of this stage's routed layers, in layer order."""
        parts = [unwrapped(block.ff) for block in self._blocks()]
        found = [self.pre_gate or part.router for part in parts if isinstance(part, MoE)]
        return [router for router in found if router is not None]

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # pyrefly: ignore[bad-return] - nn.ModuleList knows only Modules

    def carries(self, *, id_BS: Tensor, **_: object) -> Carried:
        """(B, S, D) in the dtype of the weights.

        Raises:
            ShapeError: ids that are not (B, S), or longer than the model reads.
            UsageError: an id outside the vocabulary (looked at on a CPU).
        """
        most, vocabulary = self.config.max_seq, self.config.vocab_size
        if id_BS.ndim != 2 or not 0 < id_BS.shape[1] <= most or id_BS.is_floating_point():
            got, allowed = f"{id_BS.dtype} of shape {tuple(id_BS.shape)}", f"be whole numbers (B, S), S up to {most}"
            raise ShapeError(
                word("id_BS", got=got, allowed=allowed, where="LMStage", fix=f"cut texts to {most} tokens")
            )
        if id_BS.device.type == "cpu" and id_BS.numel():
            low, high = (int(bound) for bound in id_BS.aminmax())
            if low < 0 or high >= vocabulary:
                fix = "use the tokenizer that the model was trained with"
                got, allowed = f"{low} to {high}", f"be from 0 to {vocabulary - 1}"
                raise UsageError(word("id_BS", got=got, allowed=allowed, where="LMStage", fix=fix))
        return Carried((*id_BS.shape, self.config.width), self.dtype)

    def forward(
        self,
        x_BSD: Tensor | None = None,
        *,
        id_BS: Tensor,
        target_BS: Tensor | None = None,
        attention_mask: Tensor | None = None,
        predicted: float = 1.0,
        backend: str = "auto",
        seed: int | None = None,
    ) -> Tensor:
        """What the next stage reads; of the last stage the sum of the targets' nats divided by ``predicted``, or what
        its output layer gives where there are no targets.

        Args:
            x_BSD: (B, S, D) from the stage before; of the first None.
            id_BS: (B, S) token ids, for every stage: routers may look at them.
            target_BS: (B, S) which token came after each; -100 for none.
            attention_mask: as for ``LM``.
            predicted: how many targets the whole step has.
            backend: the name of an executor in ``turnout.run``, or "auto".
            seed: of what routers draw in training, in each stage something else; None for torch's default generator.

        Raises:
            ShapeError: as ``LM``.
            UsageError: as ``LM``.
        """
        places = _places(id_BS, attention_mask)
        if self.first:
            x_BSD = self._embedded(id_BS, places)
        if x_BSD is None:
            fix = "hand it the output of the stage before, as turnout.run.ranks.pipeline.Pipeline does"
            got, allowed = "nothing", f"be there for stage {self.stage}, which does not embed,"
            raise UsageError(word("x_BSD", got=got, allowed=allowed, where="LMStage", fix=fix))
        generator = None
        if seed is not None:
            generator = torch.Generator(x_BSD.device)
            generator.manual_seed((seed + self.stage * _SEED_STEP) % 2**63)
        x_BSD, routings = self._through(x_BSD, id_BS, places, backend, generator)
        side = self.side(routings) if self.side is not None and routings else None
        if side is not None and side.requires_grad:
            x_BSD = _Beside.apply(x_BSD, side)
        elif not self.layers:
            x_BSD = x_BSD.clone()  # torch's runtime detaches in place what a stage gives
        if not self.last:
            return x_BSD.to(self.dtype)
        return self._finish(x_BSD, target_BS, places, predicted)

    def _embedded(self, id_BS: Tensor, places: Places | None) -> Tensor:
        """As ``LM`` does it, for a text from its beginning."""
        assert self.embedding is not None
        x_BSD, scale = nn.functional.embedding(id_BS, self.embedding), self.config.embedding_scale
        if scale != 1:
            x_BSD = x_BSD * (torch.tensor(scale, dtype=x_BSD.dtype) if self.config.embedding_rounded else scale)
        if self.positions is None:
            return x_BSD
        return x_BSD + self.positions[new_places(0, id_BS.shape[1], places, id_BS.device)]

    def _through(self, x_BSD: Tensor, id_BS: Tensor, places: Any, backend: str, generator: Any) -> tuple[Tensor, list]:
        at = (0, id_BS.shape[1], x_BSD.dtype, places)
        angles = self.rope(*at)
        local = angles if self.local_rope is None else self.local_rope(*at)
        call: dict[str, Any] = {"token_id_BS": id_BS, "backend": backend, "generator": generator}
        if self.pre_gate is not None:
            call["routing"] = self.pre_gate(id_BS, places=places)
        routings = []
        for layer, block in zip(self.layers, self._blocks(), strict=True):
            turns = angles if self.config.window_of(layer) is None else local
            x_BSD, routing = block(x_BSD, turns, None, places, **call)
            if routing is not None:
                routings.append(routing)
        return x_BSD, routings

    def _finish(self, x_BSD: Tensor, target_BS: Tensor | None, places: Any, predicted: float) -> Tensor:
        assert self.norm is not None
        hidden_BSD = self.norm(x_BSD)
        if self.config.logit_divisor != 1:
            hidden_BSD = hidden_BSD / self.config.logit_divisor
        weight_VD = self.embedding if self.head is None else self.head.weight
        assert isinstance(weight_VD, Tensor)  # not packed
        softcap = self.config.logit_softcap
        if target_BS is None:
            return capped(linear(hidden_BSD, weight_VD), softcap)
        if places is not None and target_BS.shape == places.real_BS.shape:
            target_BS = target_BS.masked_fill(~places.real_BS, IGNORE)
        if hidden_BSD.dtype == torch.float64:  # head_loss sums in fp32
            logits_TV = capped(linear(hidden_BSD, weight_VD), softcap).flatten(0, 1)
            nats = nn.functional.cross_entropy(logits_TV, target_BS.flatten(), ignore_index=IGNORE, reduction="sum")
            return nats / predicted
        return head_loss(hidden_BSD, weight_VD, target_BS, softcap=softcap) / predicted


def _places(id_BS: Tensor, attention_mask: Tensor | None) -> Places | None:
    """Where the tokens are among padding; None where there is none."""
    real_BS = None if attention_mask is None else real_tokens(attention_mask, id_BS, None, 0)
    if real_BS is None:
        return None
    return Places(real_BS, id_BS.shape[1], aside=not bool((real_BS[:, 1:] <= real_BS[:, :-1]).all()))


def _blocks_of(sizes: Sequence[int], stage: int) -> range:
    before = sum(sizes[:stage])
    return range(before, before + sizes[stage])


class _Beside(torch.autograd.Function):
    """x as it is, in whose backward pass ``loss`` gets the gradient that the objective gives a term of its own: 1."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.like = (loss.shape, loss.dtype, loss.device)
        return x.clone()

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        shape, dtype, device = ctx.like
        return slope, torch.ones(shape, dtype=dtype, device=device)
