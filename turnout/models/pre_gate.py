"""The pre-gating router: one small decoder over the tokens, which routes all layers before any of them runs."""

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, largest, linear, softmax
from turnout.models.attention import Angles, Attention, Cache, Projection
from turnout.models.config import LMConfig
from turnout.models.norm import RMSNorm
from turnout.models.padding import Places
from turnout.models.rope import Rope
from turnout.paths import FeedForward
from turnout.types import Routing, spread
from turnout.types.called import Called

__all__ = ["PreGate"]


class PreGate(Called):
    """A causal decoder of its own, from token ids to one routing that every routed layer takes.

    p = softmax(W norm(x)), x what its layers make of the tokens so far; each token takes the k experts with the highest
    p, weighted by p over their sum. With k = 1 that weight is 1, with the gradient of ln p, so that a loss on the
    output trains the gate too.

    Args:
        vocab_size: V, of the token ids.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        width: of its own embedding and layers.
        layers: how many it has.
        heads: of its attention, a divisor of ``width``.
        max_seq: the longest sequence.
        rope_theta: base of its rotary frequencies.
        first_layer: the place of its first layer in a cache that it shares with a model of so many layers.
        std: standard deviation of the normal distribution that its weights start from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: heads do not fit the width.

    >>> gate = PreGate(16, 4, width=8, layers=1)
    >>> id_BS = torch.tensor([[3, 1, 4, 1]])
    >>> routing = gate(id_BS)
    >>> early = gate(id_BS[:, :2])  # later tokens do not matter
    >>> routing.num_entries, routing.weight_R.tolist(), torch.allclose(early.logit_TE, routing.logit_TE[:2], atol=1e-6)
    (4, [1.0, 1.0, 1.0, 1.0], True)

    Source: Cai et al., 2024, "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System
    Co-Design". Sizes as in the published code, whose attention is not scaled by head_width^-1/2, whose embedding starts
    as a slice of the model's and whose output has a bias; there no gradient reaches the gate but its distillation's.
    """

    def __init__(
        self,
        vocab_size: int,
        num_experts: int,
        *,
        top_k: int = 1,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        max_seq: int = 1024,
        rope_theta: float = 1e4,
        first_layer: int = 0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("PreGate", width, num_experts, top_k, None)
        sizes = {"width": width, "layers": layers, "heads": heads, "hidden": width, "max_seq": max_seq}
        config = LMConfig(
            vocab_size, **sizes, rope_theta=rope_theta, qkv_bias=True, out_bias=True, activation="silu", init_std=std
        )
        self.config, self.num_experts, self.top_k = config, num_experts, top_k
        self.embedding = nn.Parameter(torch.empty(vocab_size, width).normal_(0, std, generator=generator))
        self.layers = nn.ModuleList(_Layer(config, first_layer + layer, generator) for layer in range(layers))
        self.norm = RMSNorm(width, config.norm_eps)
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))
        self.rope = Rope(config)

    def logits(self, id_BS: Tensor, *, cache: Cache | None = None, places: Places | None = None) -> Tensor:
        """(B·S, E) the scores of the experts before the softmax, in fp32.

        Args:
            id_BS: (B, S) token ids.
            cache: what went before; these tokens are added, and whoever owns the cache counts them.
            places: where there is padding; None for nowhere.
        """
        x_BSD = nn.functional.embedding(id_BS, self.embedding)
        angles = self.rope(0 if cache is None else cache.length, id_BS.shape[1], x_BSD.dtype, places)
        for layer in self.layers:
            x_BSD = layer(x_BSD, angles, cache, places)
        return linear(self.norm(x_BSD).flatten(0, 1), self.weight)

    def forward(self, id_BS: Tensor, *, cache: Cache | None = None, places: Places | None = None) -> Routing:
        """The routing of the B·S flattened tokens; arguments as in ``logits``."""
        logit_TE = self.logits(id_BS, cache=cache, places=places)
        if places is None:
            return self._chosen(logit_TE)
        real_T = places.real_BS.flatten()
        return spread(self._chosen(logit_TE[real_T]), real_T)

    def _chosen(self, logit_TE: Tensor) -> Routing:
        score_TE = softmax(logit_TE)
        index_TK = largest(score_TE, self.top_k)
        if self.top_k == 1:
            log_T1 = logit_TE.log_softmax(1).gather(1, index_TK)
            weight_TK = (log_T1 - log_T1.detach()).exp()
        else:
            weight_TK = score_TE.gather(1, index_TK)
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        return Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=score_TE, logit_TE=logit_TE
        )

    def products(self, seq: int) -> float:
        """Multiply-adds per token in a sequence of ``seq`` tokens, counted as ``LM.cost`` does."""
        found = float(self.weight.numel())
        for layer in self.layers:
            found += sum(p.weight.numel() for p in layer.modules() if isinstance(p, Projection))
            found += sum(p.up.numel() + p.down.numel() for p in layer.modules() if isinstance(p, FeedForward))
            found += 2 * seq * self.config.width
        return found

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.config.vocab_size}, {self.num_experts}, top_k={self.top_k}, width={self.config.width}"


class _Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: LMConfig, place: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, place, generator)
        self.ff_norm = RMSNorm(config.width, config.norm_eps)
        start = {"std": config.init_std, "generator": generator}
        self.ff = FeedForward(config.width, config.dense_hidden, activation=config.activation, bias=True, **start)

    def forward(self, x_BSD: Tensor, angles: Angles, cache: Cache | None, places: Places | None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), angles, cache, places)
        return x_BSD + self.ff(self.ff_norm(x_BSD))
