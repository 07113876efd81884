"""A linear map with adapters and a router that chooses among them, for each token or for each sequence."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.paths import LoRA
from turnout.run import low_rank
from turnout.types import Given, Routing, spread
from turnout.wrappers import unwrapped

__all__ = ["Adapter", "SequenceRouter", "given"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Said:
    """What ``given`` said, in the shapes of the model's own input."""

    mask_BS: Tensor | None = None
    task_B: Tensor | None = None
    query_BQ: Tensor | None = None
    batch: int | None = None
    outer: "_Said | None" = None


_NOTHING = _Said()
_SAID: contextvars.ContextVar[_Said] = contextvars.ContextVar("turnout_given", default=_NOTHING)


@contextlib.contextmanager
def given(
    *,
    mask_BS: Tensor | None = None,
    task_B: Tensor | None = None,
    query_BQ: Tensor | None = None,
    batch: int | None = None,
) -> Iterator[None]:
    """Says, for all calls inside, what routers of adapters may want to know about the sequences of the batch.

    What an inner ``given`` leaves out holds as the outer one said it.

    Args:
        mask_BS: (B, S) true at tokens, false at padding; with a KV cache the last columns belong to the new tokens.
            A model that ``turnout.reshape.attach`` changed reads it from ``attention_mask`` by itself.
        task_B: (B,) int64, the number of each sequence's task.
        query_BQ: (B, Q) an embedding of each sequence's request.
        batch: B, needed only where linear maps see tokens without a batch axis.

    >>> import torch
    >>> with given(task_B=torch.tensor([0])):
    ...     pass

    Source: none; plain bookkeeping.
    """
    outer = _SAID.get()
    inner = _Said(
        outer.mask_BS if mask_BS is None else mask_BS,
        outer.task_B if task_B is None else task_B,
        outer.query_BQ if query_BQ is None else query_BQ,
        outer.batch if batch is None else batch,
        outer.outer,
    )
    token = _SAID.set(inner)
    try:
        yield
    finally:
        _SAID.reset(token)


def overhear(model: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
    """A pre-forward hook: what the model is called with says which tokens are padding, until ``leave``."""
    outer = _SAID.get()
    new: dict[str, object] = {"outer": outer}
    ids = next((keywords[key] for key in ("input_ids", "inputs_embeds") if keywords.get(key) is not None), None)
    ids = arguments[0] if ids is None and arguments else ids
    if isinstance(ids, Tensor):
        new["batch"] = ids.shape[0]
    if isinstance(mask := keywords.get("attention_mask"), Tensor):
        new["mask_BS"] = mask
    _SAID.set(dataclasses.replace(outer, **new))  # pyrefly: ignore[bad-argument-type]


def leave(model: nn.Module, arguments: object, output: object) -> None:
    """A forward hook: forgets what ``overhear`` heard, also after an error."""
    _SAID.set(_SAID.get().outer or _NOTHING)


@runtime_checkable
class SequenceRouter(Protocol):
    """A router that decides for whole sequences: one row of the routing for each of its ``parts`` of each sequence.

    >>> class Even(nn.Module):
    ...     parts = 1
    ...     def forward(self, x_TD, *, given):
    ...         return Routing.from_dense(torch.full((given.num_sequences, 2), 0.5))
    >>> isinstance(Even(), SequenceRouter)
    True

    Source: none; an interface.
    """

    parts: int

    def forward(self, x_TD: Tensor, *, given: Given) -> Routing:
        """The routing of ``given.num_sequences * parts`` rows over the adapters."""
        ...


class Adapter(nn.Module):
    """A linear map, adapters of it, and the router that says which of them a token or a sequence takes.

    y = base(x) + sum_n w_n * scale_n * B_n A_n x for a router of tokens. A router of sequences (``SequenceRouter``)
    merges the factors first, A = sum_n w_n A_n and B = sum_n w_n scale_n B_n, and adds B A x: one adapter's work.

    Args:
        base: the linear map, for example ``nn.Linear``; it may be trained or frozen, as it is.
        paths: the adapters.
        router: of as many experts as there are adapters: any router of ``turnout.decide.token``. One with the attribute
            ``parts`` is called with ``given`` and decides for sequences; one with a true ``needs_given`` is called with
            ``given`` too, and decides for tokens. One with ``fold`` changes the adapters' factors before they are used.
        names: of the adapters; None is "0", "1" and so on.

    Raises:
        ShapeError: adapters that do not fit the linear map, or a router of another number of experts.

    >>> from turnout.decide.token import TopK
    >>> layer = Adapter(nn.Linear(8, 4), LoRA(8, 4, ranks=(2, 2, 3)), TopK(8, 3, top_k=2))
    >>> layer(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 4])

    Source: Hu et al., 2021, "LoRA", for the adapters; Muqeeth et al., 2024, "Learning to Route Among Specialized
    Experts for Zero-Shot Generalization", for routing at every linear map.
    """

    def __init__(self, base: nn.Module, paths: LoRA, router: nn.Module, *, names: Sequence[str] | None = None) -> None:
        super().__init__()
        shape = tuple(getattr(base, "weight", torch.empty(0)).shape)
        fits = (paths.up.shape[1], paths.down.shape[1])
        experts = getattr(unwrapped(router), "num_experts", paths.num_paths)
        if (len(shape) == 2 and shape != fits) or experts != paths.num_paths:
            got = f"a linear map {shape}, and a router of {experts}"
            allowed = f"be {fits} for these adapters, and a router of {paths.num_paths}"
            fix = "build adapters and router for this linear map"
            raise ShapeError(word("base and router", got=got, allowed=allowed, where="turnout.layers.Adapter", fix=fix))
        self.base, self.paths, self.router = base, paths, router
        self.names = tuple(names or map(str, range(paths.num_paths)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., O) the linear map of x (..., D), and what the chosen adapters add.

        Raises:
            UsageError: the router wants to know something that ``given`` did not say.
            ShapeError: what it said does not fit x.
        """
        y = self.base(x)
        x_TD = x.reshape(-1, x.shape[-1])
        routing, found = self.decide(x)
        x_TD = x_TD.to(self.paths.down.dtype)
        asked = unwrapped(self.router)
        parts, fold = getattr(asked, "parts", None), getattr(asked, "fold", None)
        if fold is not None:
            added_TO = low_rank(x_TD, routing, fold(self.paths.weights()))
        elif parts is None:
            added_TO = self.paths(x_TD, routing)
        else:
            added_TO = self.paths.merged(x_TD, routing, _sequence(found), parts=parts)
        return y + added_TO.view(y.shape).to(y.dtype)

    def decide(self, x: Tensor) -> tuple[Routing, Given | None]:
        """The router's decision for x (..., D), and what was known of the sequences where it asks for that."""
        x_TD = x.reshape(-1, x.shape[-1])
        asked = unwrapped(self.router)
        if not hasattr(asked, "parts") and not getattr(asked, "needs_given", False):
            # A capacity alone lets one token take another's place; else padding is nobody's business here, as in PEFT.
            real_T = None if getattr(asked, "capacity_factor", None) is None else real(x)
            return self.router(x_TD) if real_T is None else spread(self.router(x_TD[real_T]), real_T), None
        found = about(x)
        return self.router(x_TD, given=found), found


def _sequence(found: Given | None) -> Tensor:
    assert found is not None  # decide gives it to routers of sequences
    return found.sequence_T


def real(x: Tensor) -> Tensor | None:
    """(T,) bool, false where the tokens of x (..., D) are padding, as ``given`` or the model's call said; None if none.

    Raises:
        ShapeError: what it said does not fit x.
    """
    keep_T = None if _SAID.get().mask_BS is None else about(x).keep_T
    return None if keep_T is None or bool(keep_T.all()) else keep_T


def about(x: Tensor) -> Given:
    """What ``given`` said, for the flattened tokens of x (..., D)."""
    said = _SAID.get()
    tokens = x.shape[:-1].numel()
    batch = x.shape[0] if x.ndim > 2 else said.batch
    mask_BS = said.mask_BS
    if mask_BS is not None and mask_BS.ndim != 2:
        allowed, fix = "be (B, S), true at tokens", "pass the tokenizer's attention_mask"
        got = f"shape {tuple(mask_BS.shape)}"
        raise ShapeError(word("the mask", got=got, allowed=allowed, where="turnout.layers.Adapter", fix=fix))
    if batch is None and mask_BS is not None:
        batch = mask_BS.shape[0]
    if batch is None:
        if x.ndim > 1:
            fix = "pass x with a batch axis, or call inside `with turnout.layers.given(batch=...):`"
            allowed = "have a batch axis, (B, S, D), for a router of sequences"
            got = f"shape {tuple(x.shape)}"
            raise UsageError(word("x", got=got, allowed=allowed, where="turnout.layers.Adapter", fix=fix))
        batch = 1
    each = tokens // max(batch, 1)
    if each * batch != tokens or (mask_BS is not None and (mask_BS.shape[0] != batch or mask_BS.shape[1] < each)):
        got = f"x {tuple(x.shape)}, batch {batch}, mask {None if mask_BS is None else tuple(mask_BS.shape)}"
        allowed = "be of the same sequences"
        fix = "give the mask of this very batch"
        raise ShapeError(word("x and given", got=got, allowed=allowed, where="turnout.layers.Adapter", fix=fix))
    keep_T = None
    if mask_BS is not None and each:
        keep_T = mask_BS[:, mask_BS.shape[1] - each :].reshape(-1).to(x.device).bool()
    return Given.of(batch, tokens, keep_T=keep_T, task_B=said.task_B, query_BQ=said.query_BQ, device=x.device)
