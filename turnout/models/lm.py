"""A decoder language model: dense or with experts in any layer, exactly expressible in the published architectures."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turnout.decide import token
from turnout.errors import ShapeError, UsageError, word
from turnout.expects import expects
from turnout.layers import MoE
from turnout.models.attention import Angles, Attention, Cache, LatentAttention, Projection, RMSNorm, attended
from turnout.models.config import FactoredConfig, LMConfig, MLAConfig, MoEConfig
from turnout.models.head import LMLoss, head_loss
from turnout.models.pre_gate import PreGate
from turnout.models.rope import Rope
from turnout.paths import FeedForward
from turnout.run.product import linear
from turnout.types import Cost, Routing

__all__ = ["LM", "Cache", "FactoredConfig", "LMConfig", "LMLoss", "LMOutput", "MLAConfig", "MoEConfig"]


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


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x)), the latter dense or routed."""

    def __init__(self, config: LMConfig, layer: int, generator: torch.Generator | None) -> None:
        super().__init__()
        start = {"std": config.init_std, "generator": generator}
        self.scale = config.residual_scale
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = (
            Attention(config, layer, generator)
            if config.mla is None
            else LatentAttention(config, config.mla, layer, generator)
        )
        self.ff_norm = RMSNorm(config.width, config.norm_eps)
        self.ff: FeedForward | MoE
        if config.moe is None or not config.is_routed(layer):
            hidden, activation = config.dense_hidden, config.activation
            self.ff = FeedForward(config.width, hidden, activation=activation, bias=config.ff_bias, **start)
        else:
            moe = config.moe
            self.ff = MoE(
                config.width,
                moe.hidden,
                moe.num_experts,
                router=None if moe.router == "PreGate" else build_router(config.width, moe, generator, config.init_std),
                activation=moe.activation,
                bias=moe.bias,
                shared_hidden=moe.shared_hidden,
                shared_gate=moe.shared_gate,
                distinct=config.experts_held(layer),
                factored=config.factors(layer),
                **start,
            )

    def forward(
        self,
        x_BSD: Tensor,
        angles: Angles,
        cache: Cache | None,
        *,
        token_id_BS: Tensor,
        backend: str,
        generator: torch.Generator | None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The tokens after this layer, and where they went; a ``routing`` that is given is where they go."""
        x_BSD = self._add(x_BSD, self.attention(self.attention_norm(x_BSD), angles, cache))
        normed_BSD = self.ff_norm(x_BSD)
        if isinstance(self.ff, FeedForward):
            return self._add(x_BSD, self.ff(normed_BSD)), None
        routed = self.ff(normed_BSD, token_id=token_id_BS, generator=generator, backend=backend, routing=routing)
        return self._add(x_BSD, routed.output), routed.routing

    def _add(self, x_BSD: Tensor, change_BSD: Tensor) -> Tensor:
        return x_BSD + (change_BSD if self.scale == 1 else change_BSD * self.scale)


def build_router(width: int, moe: MoEConfig, generator: torch.Generator | None, std: float) -> nn.Module:
    """The router that a configuration names.

    Raises:
        UsageError: an option that the router does not have.
    """
    kind = getattr(token, moe.router)
    start = {} if moe.router == "Hash" else {"std": std, "generator": generator}
    return _built(kind, moe, width, **start)


def build_pre_gate(config: LMConfig, generator: torch.Generator | None) -> PreGate | None:
    """The router of all layers, where the configuration names one."""
    if config.moe is None or config.moe.router != "PreGate":
        return None
    fixed = {"max_seq": config.max_seq, "rope_theta": config.rope_theta, "first_layer": config.layers}
    return _built(PreGate, config.moe, config.vocab_size, std=config.init_std, generator=generator, **fixed)


def _built(kind: Callable[..., Any], moe: MoEConfig, inputs: int, **start: object) -> Any:
    try:
        return kind(inputs, moe.num_experts, top_k=moe.top_k, **(start | dict(moe.router_options)))
    except TypeError as error:
        raise UsageError(
            word(
                "router_options",
                got=f"{dict(moe.router_options)} ({error})",
                allowed=f"be keywords of {moe.router}",
                where="MoEConfig",
                fix=f"see help(turnout.{'models' if moe.router == 'PreGate' else 'decide.token'}.{moe.router})",
            )
        ) from error


class LM(nn.Module):
    """A decoder language model: tokens in, scores of each next token out.

    x_0 = embedding; in every layer x += attention(norm(x)), x += ff(norm(x)); logits = head(norm(x_L)).

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
    configuration it computes what the published Llama, Mistral, Qwen, Mixtral, OLMoE, DeepSeek and gpt-oss models do.
    """

    # The folder that the weights were read from, if any: its tokenizer goes along when they are written again.
    origin: Path | None = None

    @expects(config=LMConfig)
    def __init__(self, config: LMConfig, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = config
        self.embedding = nn.Parameter(
            torch.empty(config.vocab_size, config.width).normal_(0, config.init_std, generator=generator)
        )
        self.blocks = nn.ModuleList(Block(config, layer, generator) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            start = {"std": config.init_std, "generator": generator}
            self.head = Projection(config.width, config.vocab_size, bias=False, **start)
        self.rope = Rope(config)
        self.pre_gate = build_pre_gate(config, generator)

    @property
    def routers(self) -> list[nn.Module]:
        """The routers of the routed layers, in layer order; one that routes all layers stands there for each."""
        found = [self.pre_gate or block.ff.router for block in self._blocks() if isinstance(block.ff, MoE)]
        return [router for router in found if router is not None]

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # pyrefly: ignore[bad-return] - nn.ModuleList knows only Modules

    def forward(
        self,
        id_BS: Tensor,
        *,
        cache: Cache | None = None,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ) -> LMOutput:
        """The scores of the next token after every position.

        Args:
            id_BS: (B, S) token ids; rows are independent, and there is no padding.
            cache: what went before, to which these tokens are added.
            backend: the name of an executor in ``turnout.run``, or "auto".
            generator: for routers that draw in training.

        Raises:
            ShapeError: not (B, S), longer than ``config.max_seq``, or another B than the cache's.
            UsageError: an id outside the vocabulary, a cache together with gradients, or an unknown backend.
        """
        hidden_BSD, routings = self._hidden(id_BS, cache, backend, generator)
        logits_BSV = linear(hidden_BSD, self.embedding if self.head is None else self.head.weight)
        if self.config.logit_divisor != 1:
            logits_BSV = logits_BSV / self.config.logit_divisor
        return LMOutput(logits_BSV, routings, hidden_BSD)

    def loss(
        self, id_BS: Tensor, target_BS: Tensor, *, backend: str = "auto", generator: torch.Generator | None = None
    ) -> LMLoss:
        """As ``token_loss`` of the logits of ``forward``, but the logits of all positions are never held at once.

        Args:
            id_BS: (B, S) token ids.
            target_BS: (B, S) which token came after each; -100 for none.
            backend: as in ``forward``.
            generator: as in ``forward``.

        Raises:
            ShapeError: as ``forward``, or the two differ in shape.
            UsageError: as ``forward``.
        """
        hidden_BSD, routings = self._hidden(id_BS, None, backend, generator)
        if self.config.logit_divisor != 1:
            hidden_BSD = hidden_BSD / self.config.logit_divisor
        weight_VD = self.embedding if self.head is None else self.head.weight
        return LMLoss(head_loss(hidden_BSD, weight_VD, target_BS), routings)

    def _hidden(
        self, id_BS: Tensor, cache: Cache | None, backend: str, generator: torch.Generator | None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """What the output layer reads, and the decisions."""
        start = 0 if cache is None else cache.length
        self._check(id_BS, start)
        x_BSD = nn.functional.embedding(id_BS, self.embedding)
        if self.config.embedding_scale != 1:
            x_BSD = x_BSD * self.config.embedding_scale
        angles = self.rope(start, id_BS.shape[1], x_BSD.dtype)
        call = {"token_id_BS": id_BS, "backend": backend, "generator": generator}
        if self.pre_gate is not None:
            call["routing"] = self.pre_gate(id_BS, cache=cache)
        routings = []
        for block in self._blocks():
            x_BSD, routing = block(x_BSD, angles, cache, **call)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.advance(id_BS.shape[1])
        return self.norm(x_BSD), tuple(routings)

    @torch.no_grad()
    def route(self, id_BS: Tensor) -> tuple[Routing, ...]:
        """Where every token goes in every routed layer, as ``LMOutput.routings``, before any layer runs.

        Args:
            id_BS: (B, S) token ids.

        Raises:
            ShapeError: not (B, S), or longer than ``config.max_seq``.
            UsageError: the model has no ``PreGate``: its routers look at what the layers before them made.
        """
        self._check(id_BS, 0)
        if self.pre_gate is None:
            got = "a dense model" if self.config.moe is None else f"router={self.config.moe.router!r}"
            allowed, fix = "have router='PreGate', which looks at ids alone", "read lm(id_BS).routings instead"
            raise UsageError(word("the model", got=got, allowed=allowed, where="LM.route", fix=fix))
        return (self.pre_gate(id_BS),) * sum(isinstance(block.ff, MoE) for block in self._blocks())

    def _check(self, id_BS: Tensor, start: int) -> None:
        if id_BS.ndim != 2 or id_BS.is_floating_point() or id_BS.shape[1] == 0:
            got, fix = f"{id_BS.dtype} of shape {tuple(id_BS.shape)}", "pass id[None] for one sequence"
            raise ShapeError(word("id_BS", got=got, allowed="be whole numbers (B, S), S > 0", where="LM", fix=fix))
        if start + id_BS.shape[1] > self.config.max_seq:
            fix = f"pass at most {self.config.max_seq} tokens, cached ones included, or build it with a longer max_seq"
            allowed = f"end within max_seq={self.config.max_seq}"
            raise ShapeError(
                word("id_BS", got=f"{start + id_BS.shape[1]} tokens", allowed=allowed, where="LM", fix=fix)
            )
        if id_BS.device.type == "cpu" and id_BS.numel():  # on an accelerator the look would wait for it
            least, most = (int(bound) for bound in id_BS.aminmax())
            if least < 0 or most >= self.config.vocab_size:
                allowed = f"be from 0 to {self.config.vocab_size - 1}"
                fix = "use the tokenizer that the model was trained with"
                raise UsageError(word("id_BS", got=f"{least} to {most}", allowed=allowed, where="LM", fix=fix))

    @torch.no_grad()
    def generate(
        self,
        id_BS: Tensor,
        *,
        tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The prompt with ``tokens`` further tokens, each drawn from softmax(logits / temperature).

        Args:
            id_BS: (B, S) the prompts, all of the same length.
            tokens: how many to add.
            temperature: 0 takes the most likely token; 1 draws as the model says.
            top_k: draw among the k most likely only; None among all.
            generator: where the chance comes from; torch's default when None.

        Returns:
            (B, S + tokens).

        Raises:
            ShapeError: the result would be longer than ``config.max_seq``.
            UsageError: a negative temperature, or a top_k below 1.
        """
        if tokens < 0 or not temperature >= 0 or (top_k is not None and top_k < 1):
            got, allowed = f"{tokens}, {temperature} and {top_k}", "be at least 0, at least 0, and at least 1 or None"
            fix = "pass tokens=64, temperature=1.0, top_k=50"
            raise UsageError(
                word("tokens, temperature and top_k", got=got, allowed=allowed, where="LM.generate", fix=fix)
            )
        was_training, cache, new_BS = self.training, Cache(), id_BS
        self._check(id_BS, tokens)
        self.eval()
        try:
            for _ in range(tokens):
                logits_BV = self(new_BS, cache=cache).logits_BSV[:, -1]
                new_BS = _draw(logits_BV.float(), temperature, top_k, generator)
                id_BS = torch.cat((id_BS, new_BS), dim=1)
        finally:
            self.train(was_training)
        return id_BS

    def cost(self, *, seq: int | None = None) -> Cost:
        """What one token's forward pass takes, the mean over the positions of a sequence.

        Matrix products count, a multiply-add as 2; attention counts all seq x seq pairs, as kernels are asked for
        them; norms, activations and the router's softmax do not count. An expert's share is K / E of its bank.

        Args:
            seq: the length of the sequence; ``config.max_seq`` when None.

        Returns:
            ``params`` (tied ones once), ``params_active`` (all, less E - K of E experts) and ``flops``.
        """
        config, seq = self.config, self.config.max_seq if seq is None else seq
        params = sum(parameter.numel() for parameter in self.parameters())
        active, products = params, float(config.width * config.vocab_size)
        for layer, block in enumerate(self._blocks()):
            products += sum(p.weight.numel() for p in block.attention.modules() if isinstance(p, Projection))
            products += attended(config, layer, seq)
            if isinstance(block.ff, FeedForward):
                products += block.ff.up.numel() + block.ff.down.numel()
                continue
            moe, bank = block.ff, block.ff.bank
            used = min(_experts_per_token(config), bank.num_experts)
            spent = bank.cost(1, used)
            active -= (spent.params or 0) - (spent.params_active or 0)
            products += (spent.flops or 0.0) / 2
            always = [getattr(moe.router, "weight", None), moe.shared_gate]
            always += [] if moe.shared is None else [moe.shared.up, moe.shared.down]
            products += sum(p.numel() for p in always if p is not None)
        products += 0 if self.pre_gate is None else self.pre_gate.products(seq)
        return Cost(params=params, params_active=active, flops=2.0 * products)


def _experts_per_token(config: LMConfig) -> float:
    """K, or for experts that choose their tokens the mean number that choose one."""
    moe = config.moe
    if moe is None:
        return 0
    factor = moe.router_options.get("capacity_factor")
    if moe.router == "ExpertChoice" and isinstance(factor, int | float):
        return factor
    return moe.top_k


def _draw(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(1, keepdim=True)
    logits_BK, index_BK = logits_BV.topk(min(top_k or logits_BV.shape[1], logits_BV.shape[1]), dim=1)
    place_B1 = torch.multinomial((logits_BK / temperature).softmax(1), 1, generator=generator)
    return index_BK.gather(1, place_B1)
