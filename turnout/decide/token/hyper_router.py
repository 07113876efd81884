"""HyperRouter: a fixed network makes the router of a small trained embedding."""

import math

import torch
from torch import Tensor, nn

from turnout.decide.token.correction import refuse_evaluation
from turnout.decide.token.gate import check, largest, linear, softmax
from turnout.errors import UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["HyperRouter"]

_WHERE = "turnout.decide.token.HyperRouter"


class HyperRouter(Called):
    """Top-k by W x + b, where [W | b] = h(e) is what a fixed random network makes of a trained vector.

    h is Linear(D, H), ReLU, Linear(H, E (D + 1)), drawn once and never trained; e (D,) is all that is. g = softmax over
    the K chosen logits. What is made is large, of standard deviation about 0.3, so routing starts peaky.

    With ``end_k``, K rises evenly from ``top_k`` to that over ``steps`` optimizer steps, in evaluation as in training.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        hyper_width: H.
        end_k: K at the end, from ``top_k`` to E; None leaves it.
        steps: how many steps K rises for.
        embedding_std: standard deviation of the normal distribution that ``embedding`` starts from.
        generator: where all chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: end_k, steps or hyper_width out of range.

    >>> router = HyperRouter(4, 8)
    >>> [name for name, _ in router.named_parameters()]
    ['embedding']

    Takes: K experts a token; 2 D E operations a token, and 2 H D E operations a call to make W.

    Source: Do et al., 2023, "HyperRouter: Towards Efficient Training and Inference of Sparse Mixture of Experts".
    """

    done: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        hyper_width: int = 64,
        end_k: int | None = None,
        steps: int = 1000,
        embedding_std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("HyperRouter", width, num_experts, top_k, None)
        if hyper_width < 1 or steps < 1 or not top_k <= (top_k if end_k is None else end_k) <= num_experts:
            got, fix = f"{hyper_width}, {end_k} and {steps}", "pass hyper_width=64, end_k=None and steps=1000"
            allowed = f"be at least 1, from top_k={top_k} to num_experts={num_experts}, and at least 1"
            raise UsageError(word("hyper_width, end_k and steps", got=got, allowed=allowed, where=_WHERE, fix=fix))
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.end_k, self.steps = top_k if end_k is None else end_k, steps
        self.embedding = nn.Parameter(torch.empty(width).normal_(0, embedding_std, generator=generator))
        made = num_experts * (width + 1)
        for name, rows, inputs in (("up", hyper_width, width), ("down", made, hyper_width)):
            bound = 1 / math.sqrt(inputs)
            for part, shape in ((name, (rows, inputs)), (f"{name}_bias", (rows,))):
                self.register_buffer(part, torch.empty(shape).uniform_(-bound, bound, generator=generator))
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    def made(self) -> tuple[Tensor, Tensor]:
        """(E, D) W and (E,) b as they are now."""
        dtype = torch.promote_types(self.embedding.dtype, torch.float32)
        hidden_1H = linear(self.embedding[None], self.up, self.up_bias).relu()
        table_ED = linear(hidden_1H, self.down, self.down_bias).view(self.num_experts, self.width + 1).to(dtype)
        return table_ED[:, :-1], table_ED[:, -1]

    @property
    def k_now(self) -> int:
        """K, as the next batch is routed with."""
        return self.top_k + round((self.end_k - self.top_k) * min(int(self.done) / self.steps, 1.0))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = linear(x_TD, *self.made())
        index_TK = largest(logit_TE, self.k_now)
        weight_TK = logit_TE.gather(1, index_TK).softmax(1)
        tables = {"score_TE": softmax(logit_TE), "logit_TE": logit_TE}
        return Routing.from_topk(index_TK, weight_TK, num_experts=self.num_experts, **tables)

    def after_step(self, load_E: Tensor) -> None:
        """Counts one step; the training loop calls it once per optimizer step. The load does not matter.

        Raises:
            UsageError: the router is in evaluation mode.
        """
        refuse_evaluation(self.training)
        self.done.add_(1)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, end_k={self.end_k}, steps={self.steps}"
