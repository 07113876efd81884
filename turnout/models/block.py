"""One layer of a decoder, and the routers that a configuration names."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turnout.decide import token
from turnout.errors import UsageError, word
from turnout.layers import MoE
from turnout.layers.moe import feed_forward
from turnout.models.attention import Angles, Attention, Cache, LatentAttention
from turnout.models.config import LMConfig, MoEConfig
from turnout.models.norm import Norm, build_norm
from turnout.models.padding import Places
from turnout.models.pre_gate import PreGate
from turnout.paths import FeedForward, PackedFeedForward
from turnout.types import Routing
from turnout.wrappers import takes, unwrapped

__all__ = ["Block", "Detour", "build_pre_gate", "build_router", "share_cells"]

# What decides in the place of a layer's router: given the layer, what it reads, and where there is padding.
Detour = Callable[[MoE, Tensor, Places | None], Routing]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x)), the latter dense or routed.

    The norms stand before the two, after them (x + norm(attention(x))), or on both sides. With ``recompute`` set, a
    forward pass in training keeps its input alone, and runs once more for the backward pass.
    """

    recompute = False

    def __init__(self, config: LMConfig, layer: int, generator: torch.Generator | None) -> None:
        super().__init__()
        start = {"std": config.init_std, "generator": generator}
        self.scale = config.residual_scale
        before, after = config.norm_place != "after", config.norm_place != "before"
        self.attention_norm = _norm(config, before)
        self.attention = (
            Attention(config, layer, generator)
            if config.mla is None
            else LatentAttention(config, config.mla, layer, generator)
        )
        self.attention_out_norm = _norm(config, after)
        self.ff_norm = _norm(config, before)
        self.ff: FeedForward | MoE  # or a PackedFeedForward
        if config.moe is None or not config.is_routed(layer):
            hidden, activation = config.dense_hidden, config.activation
            sizes = {"activation": activation, "bias": config.ff_bias, "packs": config.packs("dense")}
            self.ff = feed_forward(config.width, hidden, **sizes, **start)
        else:
            moe, count = config.moe, config.experts_of(layer)
            own = dataclasses.replace(moe, num_experts=count, per_layer=None)
            self.ff = MoE(
                config.width,
                moe.hidden,
                count,
                router=_router(config, own, generator),
                activation=moe.activation,
                bias=moe.bias,
                shared_hidden=moe.shared_hidden,
                shared_gate=moe.shared_gate,
                distinct=config.experts_held(layer),
                factored=config.factors(layer),
                packs=config.packs("experts"),
                shared_packs=config.packs("shared"),
                zero_computation=moe.zero_computation,
                **start,
            )
        self.ff_out_norm = _norm(config, after)

    def forward(
        self,
        x_BSD: Tensor,
        angles: Angles,
        cache: Cache | None,
        places: Places | None = None,
        *,
        token_id_BS: Tensor,
        backend: str,
        generator: torch.Generator | None,
        routing: Routing | None = None,
        only_B: Tensor | None = None,
        detour: Detour | None = None,
        carry_TX: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The tokens after this layer, and where they went; a ``routing`` that is given is where they go.

        With ``only_B`` one token a row goes on after the attention, (B, 1, D), in evaluation: of those alone is asked.
        A ``detour`` gives the routing, of what the routed layer reads. ``carry_TX`` is what the routed layer before
        carried on of each token.
        """
        call: dict[str, Any] = {"token_id_BS": token_id_BS, "backend": backend, "generator": generator}
        call |= {"routing": routing, "detour": detour, "carry_TX": carry_TX}
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self._run(x_BSD, angles, cache, places, **call, only_B=only_B)
        # The second time a router draws what it drew the first time.
        state, run = None if generator is None else generator.get_state(), [False]

        def again(*at: Any) -> tuple[Tensor, Routing | None]:
            if run[0] and generator is not None:
                drawn = torch.Generator(generator.device)
                call["generator"] = drawn.set_state(state)  # pyrefly: ignore[bad-argument-type]
            run[0] = True
            return self._run(*at, **call)

        return checkpoint(again, x_BSD, angles, cache, places, use_reentrant=False)

    def _run(
        self,
        x_BSD: Tensor,
        angles: Angles,
        cache: Cache | None,
        places: Places | None = None,
        *,
        token_id_BS: Tensor,
        backend: str,
        generator: torch.Generator | None,
        routing: Routing | None = None,
        only_B: Tensor | None = None,
        detour: Detour | None = None,
        carry_TX: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x_BSD = self.attended(x_BSD, angles, cache, places)
        call: dict[str, Any] = {"token_id_BS": token_id_BS, "backend": backend, "generator": generator}
        return self.fed(x_BSD, places, **call, routing=routing, only_B=only_B, detour=detour, carry_TX=carry_TX)

    def attended(self, x_BSD: Tensor, angles: Angles, cache: Cache | None, places: Places | None = None) -> Tensor:
        """The first half of ``forward``: the tokens after the attention."""
        normed_BSD = x_BSD if self.attention_norm is None else self.attention_norm(x_BSD)
        return self.add(x_BSD, self.attention(normed_BSD, angles, cache, places), self.attention_out_norm)

    def fed(
        self,
        x_BSD: Tensor,
        places: Places | None = None,
        *,
        token_id_BS: Tensor,
        backend: str,
        generator: torch.Generator | None,
        routing: Routing | None = None,
        only_B: Tensor | None = None,
        detour: Detour | None = None,
        carry_TX: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The second half: the tokens after the feed-forward layer, and where they went."""
        if only_B is not None:
            if carry_TX is not None:
                carry_TX = carry_TX.view(*x_BSD.shape[:2], -1)[torch.arange(len(x_BSD), device=x_BSD.device), only_B]
            places, at = None, (torch.arange(len(x_BSD), device=x_BSD.device), only_B)
            x_BSD, token_id_BS = x_BSD[at].unsqueeze(1), token_id_BS[at].unsqueeze(1)
        normed_BSD = x_BSD if self.ff_norm is None else self.ff_norm(x_BSD)
        ff: Any = self.ff  # or what wraps it
        if isinstance(unwrapped(ff), FeedForward | PackedFeedForward):
            return self.add(x_BSD, ff(normed_BSD), self.ff_out_norm), None
        if detour is not None:
            moe: Any = unwrapped(ff)
            routing = detour(moe, normed_BSD, places)
        call = {"token_id": token_id_BS, "generator": generator, "backend": backend, "routing": routing}
        if carry_TX is not None:
            call["carry_TX"] = carry_TX
        routed = ff(normed_BSD, **call, real=None if places is None else places.real_BS)
        return self.add(x_BSD, routed.output, self.ff_out_norm), routed.routing

    def add(self, x_BSD: Tensor, change_BSD: Tensor, norm: Norm | None) -> Tensor:
        """What a layer makes of x, normed, scaled and added to it."""
        change_BSD = change_BSD if norm is None else norm(change_BSD)
        return x_BSD + (change_BSD if self.scale == 1 else change_BSD * self.scale)


def _norm(config: LMConfig, there: bool) -> Norm | None:
    return build_norm(config, config.width) if there else None


def _router(config: LMConfig, moe: MoEConfig, generator: torch.Generator | None) -> nn.Module | None:
    if moe.router == "PreGate":
        return None
    return build_router(config.width, moe, generator, config.init_std, vocab_size=config.vocab_size)


def build_router(
    width: int, moe: MoEConfig, generator: torch.Generator | None, std: float, *, vocab_size: int | None = None
) -> nn.Module:
    """The router that a configuration names; one that has a row for each token id is told how many there are.

    Raises:
        UsageError: an option that the router does not have.
    """
    kind = getattr(token, moe.router)
    start = {"std": std, "generator": generator, "free": moe.free, "zero": (moe.zero_computation or {}).get("zero", 0)}
    if vocab_size is not None:
        start["vocab_size"] = vocab_size
    return _built(kind, moe, width, **{name: value for name, value in start.items() if takes(kind, name)})


def share_cells(routers: Sequence[nn.Module]) -> None:
    """Of routers that run one recurrent cell over the layers, gives all but the first that one's cell."""
    recurrent = [router for router in map(unwrapped, routers) if isinstance(router, token.RMoE)]
    for router in recurrent[1:]:
        router.share(recurrent[0].cell)


def build_pre_gate(config: LMConfig, generator: torch.Generator | None) -> PreGate | None:
    """The router of all layers, where the configuration names one."""
    if config.moe is None or config.moe.router != "PreGate":
        return None
    fixed = {"max_seq": config.max_seq, "rope_theta": config.rope_theta, "first_layer": config.layers}
    return _built(PreGate, config.moe, config.vocab_size, std=config.init_std, generator=generator, **fixed)


def _built(kind: Callable[..., Any], moe: MoEConfig, inputs: int, **start: object) -> Any:
    try:
        return kind(inputs, moe.num_experts + moe.free, top_k=moe.top_k, **(start | dict(moe.router_options)))
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
