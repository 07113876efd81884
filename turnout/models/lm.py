"""A decoder language model: dense or with experts in any layer, exactly expressible in the published architectures."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.expects import expect
from turnout.layers import MoE
from turnout.models.attention import Cache, projection
from turnout.models.batch import Batch
from turnout.models.bill import cost
from turnout.models.block import Block, build_pre_gate, build_router, share_cells
from turnout.models.config import FactoredConfig, LMConfig, MLAConfig, MoEConfig, QuantizedConfig
from turnout.models.fused import IGNORE, capped
from turnout.models.head import LMLoss, head_loss
from turnout.models.norm import build_norm
from turnout.models.padding import Places, find_places, new_places
from turnout.models.prompts import Given
from turnout.models.rope import Rope
from turnout.paths import OffloadedBank, PackedLinear
from turnout.run.product import linear
from turnout.run.swap import ExpertCache
from turnout.types import Cost, Routing
from turnout.types.called import Called
from turnout.wrappers import unwrapped

__all__ = [
    "LM",
    "Batch",
    "Block",
    "Cache",
    "FactoredConfig",
    "LMConfig",
    "LMLoss",
    "LMOutput",
    "MLAConfig",
    "MoEConfig",
    "QuantizedConfig",
    "build_pre_gate",
    "build_router",
]


@dataclasses.dataclass(frozen=True, eq=False)
class LMOutput:
    """What a language model gives.

    Args:
        logits_BSV: scores of the next token at every position, before the softmax.
        routings: the decision of each routed layer over the B·S flattened tokens, in layer order.
        hidden_BSD: what the output layer read, after the last norm.

    >>> out = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2))(torch.zeros(2, 3, dtype=torch.long))
    >>> out.logits_BSV.shape, out.routings
    (torch.Size([2, 3, 16]), ())

    Source: none; plain bookkeeping.
    """

    logits_BSV: Tensor
    routings: tuple[Routing, ...]
    hidden_BSD: Tensor


class LM(Called):
    """A decoder language model: tokens in, scores of each next token out.

    x_0 = embedding; in every layer x += attention(norm(x)), x += ff(norm(x)); logits = head(norm(x_L)). Norms can stand
    elsewhere, and much else varies: see ``LMConfig``.

    Args:
        config: the sizes.
        seed: of the starting weights: normal with ``config.init_std``, norms at one, biases at zero.

    Raises:
        UsageError: router options that the router does not take.

    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, moe=MoEConfig(num_experts=4, top_k=2, hidden=8)))
    >>> id_BS = torch.tensor([[3, 1, 4]])
    >>> [routing.num_experts for routing in lm(id_BS).routings], lm.generate(id_BS, tokens=2).shape
    ([4, 4], torch.Size([1, 5]))

    Source: Touvron et al., 2023, "LLaMA"; experts as Jiang et al., 2024, "Mixtral of Experts". With the right
    configuration it computes what the published models of ``turnout.models.families`` do.
    """

    # The folder that the weights were read from, if any: its tokenizer goes along when they are written again.
    origin: Path | None = None
    experts: ExpertCache | None = None  # where most of its experts are in files
    # The tokens that end a text, where the model that this one was made of said so.
    ends: tuple[int, ...] = ()
    # What else its generation configuration asked for.
    wishes: dict[str, Any] | None = None

    def __init__(self, config: LMConfig, *, seed: int = 0) -> None:
        super().__init__()
        expect("config", config, LMConfig, "turnout.models.LM")
        generator = torch.Generator().manual_seed(seed)
        self.config = config
        self.embedding = nn.Parameter(
            torch.empty(config.vocab_size, config.width).normal_(0, config.init_std, generator=generator)
        )
        self.blocks = nn.ModuleList(Block(config, layer, generator) for layer in range(config.layers))
        self.positions = None
        if config.learned_positions:
            at_SD = torch.empty(config.max_seq, config.width).normal_(0, config.init_std, generator=generator)
            self.positions = nn.Parameter(at_SD)
        self.norm = build_norm(config, config.width)
        self.head = None
        if not config.tie_embeddings:
            sizes = (config.width, config.vocab_size)
            self.head = projection(config, "head", *sizes, bias=False, generator=generator)
        self.rope, self.local_rope = Rope(config), None
        if config.local_rope_theta is not None:
            self.local_rope = Rope(config, theta=config.local_rope_theta)
        self.pre_gate = build_pre_gate(config, generator)
        share_cells(self.routers)

    @property
    def routers(self) -> list[nn.Module]:
        """The routers of the routed layers, in layer order; one that routes all layers stands there for each."""
        parts = [unwrapped(block.ff) for block in self._blocks()]
        found = [self.pre_gate or part.router for part in parts if isinstance(part, MoE)]
        return [router for router in found if router is not None]

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # pyrefly: ignore[bad-return] - nn.ModuleList knows only Modules

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for module in self.modules() if self.experts is not None else ():
            if isinstance(module, OffloadedBank):
                module.check(fn)  # before a part of the model is somewhere else
        return super()._apply(fn, recurse)

    def forward(
        self,
        id_BS: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ) -> LMOutput:
        """The scores of the next token after every position.

        Padding takes no part in anything: no token attends to it, it is sent to no expert, takes nobody's place there
        and has no place in the order of the text. What comes out at its positions means nothing.

        Args:
            id_BS: (B, S) token ids.
            attention_mask: (B, S), 1 or true at tokens and 0 or false at padding, on either side or in between; also
                (B,) the number of tokens in each row, padding after them; None for no padding. With a cache (B, S) is
                of the new tokens, (B, P + S) of all.
            cache: what went before, to which these tokens are added.
            backend: the name of an executor in ``turnout.run``, or "auto".
            generator: for routers that draw in training.

        Raises:
            ShapeError: not (B, S), longer than ``config.max_seq``, another B than the cache's, or a mask of another
                shape.
            UsageError: an id outside the vocabulary, a mask of other values, a cache together with gradients or whose
                keys no longer hold (longrope), or an unknown backend.
        """
        hidden_BSD, routings, _ = self.hidden(id_BS, attention_mask, cache, backend, generator)
        return LMOutput(self.scores(hidden_BSD), routings, hidden_BSD)

    def scores(self, hidden_BSD: Tensor) -> Tensor:
        """(..., V) what the output layer makes of what it reads."""
        head = self.head
        packed = isinstance(head, PackedLinear)
        logits_BSV = head(hidden_BSD) if packed else linear(hidden_BSD, self._head_VD(hidden_BSD.dtype))
        if self.config.logit_divisor != 1:
            logits_BSV = logits_BSV / self.config.logit_divisor
        return capped(logits_BSV, self.config.logit_softcap)

    def loss(
        self,
        id_BS: Tensor,
        target_BS: Tensor,
        *,
        attention_mask: Tensor | None = None,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ) -> LMLoss:
        """As ``token_loss`` of the logits of ``forward``, but the logits of all positions are never held at once.

        Args:
            id_BS: (B, S) token ids.
            target_BS: (B, S) which token came after each; -100 for none. What came after padding does not count.
            attention_mask: as in ``forward``.
            backend: as in ``forward``.
            generator: as in ``forward``.

        Raises:
            ShapeError: as ``forward``, or the two differ in shape.
            UsageError: as ``forward``.
        """
        hidden_BSD, routings, places = self.hidden(id_BS, attention_mask, None, backend, generator)
        return LMLoss(self._nats(hidden_BSD, target_BS, places), routings)

    def nats(self, x_BSD: Tensor, target_BS: Tensor, *, places: Places | None = None) -> Tensor:
        """The summed loss of what comes out of the last block, for those sequences; targets as in ``loss``."""
        return self._nats(self.norm(x_BSD), target_BS, places)

    def _nats(self, hidden_BSD: Tensor, target_BS: Tensor, places: Places | None) -> Tensor:
        if places is not None and target_BS.shape == places.real_BS.shape:
            target_BS = target_BS.masked_fill(~places.real_BS, IGNORE)
        if self.config.logit_divisor != 1:
            hidden_BSD = hidden_BSD / self.config.logit_divisor
        return head_loss(hidden_BSD, self._head_VD(hidden_BSD.dtype), target_BS, softcap=self.config.logit_softcap)

    def _head_VD(self, dtype: torch.dtype) -> Tensor:
        """The output layer's matrix; written out where it is in few bits."""
        if self.head is None:
            return self.embedding
        weight = self.head.weight
        return weight if isinstance(weight, Tensor) else weight.packed.dequantised(dtype)

    def hidden(
        self,
        id_BS: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        backend: str = "auto",
        generator: torch.Generator | None = None,
        only_B: Tensor | None = None,
        detour: Callable[[int, MoE, Tensor, Places | None], Routing] | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...], Places | None]:
        """What the output layer reads, the decisions, and where there is padding.

        With ``only_B`` (B, 1, D) of that place in each row alone: the last layer does no more than is asked. Only for
        models in which a token's experts do not depend on which other tokens there are. A ``detour`` decides in the
        place of the layers' routers: given which of the routed layers it is, the layer, what that reads, and padding.
        """
        batch = self.begin(id_BS, attention_mask=attention_mask, cache=cache)
        x_BSD, places = batch.x_BSD, batch.places
        call: dict[str, Any] = {"token_id_BS": id_BS, "backend": backend, "generator": generator}
        if self.pre_gate is not None:
            call["routing"] = self.pre_gate(id_BS, cache=cache, places=places)
        routings = []
        last = len(self.blocks) - 1
        for layer, (block, angles) in enumerate(zip(self._blocks(), batch.angles_L, strict=True)):
            some: dict[str, Any] = {} if only_B is None or layer < last else {"only_B": only_B}
            if detour is not None:
                some["detour"] = functools.partial(detour, len(routings))
            x_BSD, routing = block(x_BSD, angles, cache, places, **call, **some)
            if routing is not None:
                routings.append(routing)
                call |= {} if routing.carry_TX is None else {"carry_TX": routing.carry_TX}
        if cache is not None:
            cache.advance(id_BS.shape[1], None if places is None else places.real_BT)
        return self.norm(x_BSD), tuple(routings), places

    def begin(self, id_BS: Tensor, *, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Batch:
        """What the first block reads, and what all of them want to know; arguments and errors as in ``forward``."""
        start = 0 if cache is None else cache.length
        self.check(id_BS, start)
        places = find_places(id_BS, attention_mask, cache)
        x_BSD = self._embedded(id_BS, start, places)
        if self.rope.changes(start, id_BS.shape[1], places):
            allowed = "end where its keys still hold: in longer texts this model's RoPE is another (longrope)"
            fix = "start a new Cache with all the tokens, as LM.generate does"
            got = f"{start} positions and {id_BS.shape[1]} more"
            raise UsageError(word("cache", got=got, allowed=allowed, where="LM", fix=fix))
        at = (start, id_BS.shape[1], x_BSD.dtype, places)
        angles = self.rope(*at)
        local = angles if self.local_rope is None else self.local_rope(*at)
        windows = [self.config.window_of(layer) for layer in range(len(self.blocks))]  # which may have been added to
        return Batch(id_BS, x_BSD, tuple(angles if window is None else local for window in windows), places)

    def _embedded(self, id_BS: Tensor, start: int, places: Places | None) -> Tensor:
        x_BSD, scale = nn.functional.embedding(id_BS, self.embedding), self.config.embedding_scale
        if scale != 1:
            x_BSD = x_BSD * (torch.tensor(scale, dtype=x_BSD.dtype) if self.config.embedding_rounded else scale)
        if self.positions is None:
            return x_BSD
        return x_BSD + self.positions[new_places(start, id_BS.shape[1], places, id_BS.device)]

    @torch.no_grad()
    def route(self, id_BS: Tensor, *, attention_mask: Tensor | None = None) -> tuple[Routing, ...]:
        """Where every token goes in every routed layer, as ``LMOutput.routings``, before any layer runs.

        Args:
            id_BS: (B, S) token ids.
            attention_mask: as in ``forward``.

        Raises:
            ShapeError: not (B, S), or longer than ``config.max_seq``.
            UsageError: the model has no ``PreGate``: its routers look at what the layers before them made.
        """
        self.check(id_BS, 0)
        if self.pre_gate is None:
            got = "a dense model" if self.config.moe is None else f"router={self.config.moe.router!r}"
            allowed, fix = "have router='PreGate', which looks at ids alone", "read lm(id_BS).routings instead"
            raise UsageError(word("the model", got=got, allowed=allowed, where="LM.route", fix=fix))
        places = find_places(id_BS, attention_mask, None)
        return (self.pre_gate(id_BS, places=places),) * sum(isinstance(block.ff, MoE) for block in self._blocks())

    def check(self, id_BS: Tensor, start: int) -> None:
        """Refuses ids that ``forward`` refuses, where so many positions are before them.

        Raises:
            ShapeError: not whole numbers (B, S), or longer than ``config.max_seq``.
            UsageError: outside the vocabulary, or on another device than the model.
        """
        if id_BS.ndim != 2 or id_BS.is_floating_point() or id_BS.shape[1] == 0:
            got, fix = f"{id_BS.dtype} of shape {tuple(id_BS.shape)}", "pass id[None] for one sequence"
            raise ShapeError(word("id_BS", got=got, allowed="be whole numbers (B, S), S > 0", where="LM", fix=fix))
        if start + id_BS.shape[1] > self.config.max_seq:
            fix = f"pass at most {self.config.max_seq} tokens, cached ones included, or build it with a longer max_seq"
            got, allowed = f"{start + id_BS.shape[1]} tokens", f"end within max_seq={self.config.max_seq}"
            raise ShapeError(word("id_BS", got=got, allowed=allowed, where="LM", fix=fix))
        if id_BS.device != self.embedding.device:
            allowed, fix = f"be on the model's {self.embedding.device}", f"pass id_BS.to('{self.embedding.device}')"
            raise UsageError(word("id_BS", got=f"them on {id_BS.device}", allowed=allowed, where="LM", fix=fix))
        if id_BS.device.type == "cpu" and id_BS.numel():  # on an accelerator the look would wait for it
            least, most = (int(bound) for bound in id_BS.aminmax())
            if least < 0 or most >= self.config.vocab_size:
                allowed = f"be from 0 to {self.config.vocab_size - 1}"
                fix = "use the tokenizer that the model was trained with"
                raise UsageError(word("id_BS", got=f"{least} to {most}", allowed=allowed, where="LM", fix=fix))

    def generate(
        self,
        id_BS: Given,
        *,
        tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos: int | Sequence[int] | Literal["model"] | None = None,
        attention_mask: Tensor | None = None,
        pad: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The prompts with ``tokens`` further tokens, each drawn from softmax(logits / temperature).

        ``turnout.generate`` gives more: why each row ended, text, stops, a stream, log-probabilities.

        Args:
            id_BS: (B, S) the prompts, or a list of them.
            tokens: how many to add.
            attention_mask: (B, S), 1 or true at tokens and 0 or false at padding before them; or (B,) lengths.

        The others are as in ``turnout.models.Drawing`` and ``turnout.models.Asked``.

        Returns:
            (B, S + tokens), or less where all rows have ended; padding before shorter prompts and after rows that did.

        Raises:
            ShapeError: a prompt without a token, or a result that would be longer than ``config.max_seq``.
            UsageError: a setting out of its range, or padding after a prompt.
        """
        # By the package's list of names: what decodes an LM imports this module, which therefore imports none of that.
        generate = sys.modules["turnout"].generate
        sizes = {"tokens": tokens, "attention_mask": attention_mask, "pad": pad, "eos": eos}
        drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        drawn |= {"repetition_penalty": repetition_penalty, "seed": seed, "generator": generator}
        return generate(self, id_BS, **sizes, **drawn).id_BT

    def cost(self, *, seq: int | None = None) -> Cost:
        """What one token's forward pass takes, the mean over the positions of a sequence.

        Matrix products count, a multiply-add as 2; attention counts all seq x seq pairs, as kernels are asked for
        them; norms, activations and the router's softmax do not count. An expert's share is K / E of its bank.

        Args:
            seq: the length of the sequence; ``config.max_seq`` when None.

        Returns:
            ``params`` (tied ones once), ``params_active`` (all, less E - K of E experts) and ``flops``.
        """
        seq = self.config.max_seq if seq is None else seq
        return cost(self, self.config, self._blocks(), self.pre_gate, seq)
