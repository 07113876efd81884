"""Routing: the token decision, a sparse tokens x experts matrix with its entries sorted by expert."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.types.ordered import in_order
from turnout.types.routing_file import read_routing, write_routing
from turnout.types.sound import check_dense, check_dropped, check_entries, check_range, check_sound, check_topk


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """A sparse tokens x experts matrix: entry r sends token ``token_R[r]`` to one expert with ``weight_R[r]``.

    Entries are sorted by expert, and by token within an expert; expert e owns the entries
    ``offset_E[e]:offset_E[e + 1]``. Any sparsity pattern is allowed: K entries a row (top-k), C entries a column
    (expert choice), rows with none (dropped tokens), rows with many. At most one entry per token and expert.

    Args:
        token_R: (R,) int64, the row of each entry, in [0, num_tokens).
        weight_R: (R,) floating point, the combine weight of each entry; gradients flow through it.
        offset_E: (E + 1,) int64, non-decreasing, from 0 to R.
        num_tokens: T, the number of rows.
        wanted_E: (E,) int64, the load before capacity truncated it; None when nothing was truncated.
        score_TE: (T, E) the router's scores for all experts (probabilities or affinities), for losses and reports.
        logit_TE: (T, E) fp32, the scores before their non-linearity, for the router z-loss.
        real_T: (T,) bool, false at padding: rows that nobody decided about, which have no entry and count nowhere.
            None where every row is a token. See ``turnout.types.spread``.
        penalty: a scalar that the router asks to be minimised beside the loss, a mean over its tokens; not on disk.
        carry_TX: (T, X) what the router of the next routed layer is told of each token, where it has the attribute
            ``needs_carry``; with its gradient, and not on disk.

    >>> r = Routing.from_topk(torch.tensor([[2, 0], [2, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), num_experts=3)
    >>> r.token_R.tolist(), r.offset_E.tolist(), r.load_E.tolist()
    ([0, 1, 0, 1], [0, 1, 2, 4], [1, 1, 2])
    >>> print(r)
    Routing(2 tokens -> 3 experts, 4 entries, 2.00 per token, load 1..2, 0 dropped)

    Source: the compressed sparse column view of Gale et al., 2022, "MegaBlocks: Efficient Sparse Training with
    Mixture-of-Experts". We keep the matrix itself, not its block-padded form.
    """

    token_R: Tensor
    weight_R: Tensor
    offset_E: Tensor
    num_tokens: int
    wanted_E: Tensor | None = None
    score_TE: Tensor | None = None
    logit_TE: Tensor | None = None
    real_T: Tensor | None = None
    penalty: Tensor | None = None
    carry_TX: Tensor | None = None
    # Where each entry stood in the (T, K) tensors of from_topk; None for any other pattern. See by_token.
    entry_R: Tensor | None = dataclasses.field(default=None, repr=False)
    top_k: int | None = dataclasses.field(default=None, repr=False)
    # The routing before capacity truncated it, detached; it does not go to disk. See wanted.
    before: "Routing | None" = dataclasses.field(default=None, repr=False)

    # ---- making one

    @classmethod
    def from_topk(
        cls,
        index_TK: Tensor,
        weight_TK: Tensor,
        *,
        num_experts: int,
        dropped: int | None = None,
        score_TE: Tensor | None = None,
        logit_TE: Tensor | None = None,
    ) -> Self:
        """The routing in which token t goes to the K experts ``index_TK[t]`` with ``weight_TK[t]``.

        The experts of one token must differ; ``validate`` checks it. Entries of the index ``dropped``, which is no
        expert's, are left out. On a CPU every index is looked at; elsewhere that would wait for the device, and an
        index of no expert gives an undefined result.

        Raises:
            ShapeError: the two are not (T, K).
            UsageError: an index is no expert's, ``dropped`` is one's, or a dtype is another.
        """
        check_topk(index_TK, weight_TK, where="Routing.from_topk")
        num_tokens, top_k = index_TK.shape
        if dropped is not None:
            check_dropped(dropped, num_experts)
            token_R, place_R = (index_TK != dropped).nonzero(as_tuple=True)
            entries = token_R, index_TK[token_R, place_R], weight_TK[token_R, place_R]
            sizes = {"num_tokens": num_tokens, "num_experts": num_experts}
            return cls.from_entries(*entries, **sizes, score_TE=score_TE, logit_TE=logit_TE)
        check_range("expert", index_TK, num_experts, where="Routing.from_topk")
        # Narrow keys sort several times faster (a radix sort pays per byte); values and order are the same.
        narrow = index_TK.device.type in ("cpu", "cuda") and num_experts <= 32768
        kind = (torch.uint8 if num_experts <= 256 else torch.int16) if narrow else torch.int64
        key_R, entry_R = in_order(index_TK.reshape(-1).to(kind))
        column_E = torch.arange(num_experts, dtype=kind, device=key_R.device)
        end_E = torch.searchsorted(key_R, column_E, right=True)  # not bincount, which waits for a GPU
        shift = max(top_k, 1).bit_length() - 1
        return cls(
            # A shift is ten times faster than a division, and top_k is mostly a power of two.
            token_R=entry_R >> shift if top_k in (0, 1 << shift) else entry_R // top_k,
            weight_R=weight_TK.reshape(-1).index_select(0, entry_R),
            offset_E=torch.nn.functional.pad(end_E, (1, 0)),
            num_tokens=num_tokens,
            score_TE=score_TE,
            logit_TE=logit_TE,
            entry_R=entry_R,
            top_k=top_k,
        )

    @classmethod
    def from_entries(
        cls,
        token_R: Tensor,
        expert_R: Tensor,
        weight_R: Tensor,
        *,
        num_tokens: int,
        num_experts: int,
        wanted_E: Tensor | None = None,
        score_TE: Tensor | None = None,
        logit_TE: Tensor | None = None,
    ) -> Self:
        """The routing with these entries, given in any order.

        Raises:
            ShapeError: the three are not of the same shape (R,).
            UsageError: a token or an expert is out of range (looked at on a CPU), or a dtype is another.
        """
        check_entries(token_R, expert_R, weight_R, num_tokens, num_experts, where="Routing.from_entries")
        token_R, expert_R = token_R.long(), expert_R.long()
        entry_R = torch.argsort(expert_R * max(num_tokens, 1) + token_R)
        count_E = torch.bincount(expert_R, minlength=num_experts)
        return cls(
            token_R=token_R[entry_R],
            weight_R=weight_R[entry_R],
            offset_E=torch.nn.functional.pad(count_E.cumsum(0), (1, 0)),
            num_tokens=num_tokens,
            wanted_E=wanted_E,
            score_TE=score_TE,
            logit_TE=logit_TE,
        )

    @classmethod
    def from_dense(cls, weight_TE: Tensor, *, mask_TE: Tensor | None = None) -> Self:
        """The routing whose entries are the true entries of ``mask_TE`` (default: the non-zeros of ``weight_TE``).

        Raises:
            ShapeError: ``weight_TE`` is not (T, E), or the mask is of another shape.
        """
        check_dense(weight_TE, mask_TE, where="Routing.from_dense")
        chosen_TE = weight_TE != 0 if mask_TE is None else mask_TE
        expert_R, token_R = chosen_TE.t().nonzero(as_tuple=True)
        num_tokens, num_experts = weight_TE.shape
        return cls.from_entries(
            token_R, expert_R, weight_TE[token_R, expert_R], num_tokens=num_tokens, num_experts=num_experts
        )

    # ---- asking it

    @property
    def num_experts(self) -> int:
        """E, the number of columns."""
        return self.offset_E.numel() - 1

    @property
    def num_entries(self) -> int:
        """R, the number of entries."""
        return self.token_R.numel()

    def bounds(self) -> list[int]:
        """Where each expert's entries begin, and where the last one's end, on the host; a GPU is waited for.

        Raises:
            ShapeError: the offsets are not those of the entries. A routing made by hand may hold any.
        """
        bound_E = self.offset_E.tolist()
        if bound_E[0] != 0 or bound_E[-1] != self.num_entries or bound_E != sorted(bound_E):
            self.validate()
        return bound_E

    @property
    def num_real(self) -> int:
        """The rows that are tokens, all but padding."""
        return self.num_tokens if self.real_T is None else int(self.real_T.sum())

    @functools.cached_property
    def load_E(self) -> Tensor:
        """(E,) int64, the number of tokens that each expert receives: the column sums of the pattern."""
        return self.offset_E.diff()

    @functools.cached_property
    def expert_R(self) -> Tensor:
        """(R,) int64, the column of each entry."""
        return torch.repeat_interleave(
            torch.arange(self.num_experts, device=self.offset_E.device),
            self.load_E,
            output_size=self.num_entries,
        )

    @functools.cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """Positions of the entries ordered by token (R,), and where each token's begin (T + 1,): the rows."""
        if self.entry_R is not None and self.top_k is not None:
            place_R = torch.arange(self.num_entries, device=self.token_R.device)
            start_T = torch.arange(0, self.num_entries + 1, self.top_k, device=self.token_R.device)
            return torch.empty_like(self.entry_R).scatter_(0, self.entry_R, place_R), start_T
        sorted_R, order_R = self.token_R.sort(stable=True)
        return order_R, torch.searchsorted(sorted_R, torch.arange(self.num_tokens + 1, device=sorted_R.device))

    @property
    def choice_R(self) -> Tensor:
        """(R,) int64, which of its token's choices each entry is, 0 for the first.

        Raises:
            UsageError: the routing is not that of a top-k, or something was taken from it.
        """
        if self.entry_R is None or self.top_k is None:
            got, fix = "entries in any pattern", "ask before anything is dropped or spread"
            allowed = "be those of Routing.from_topk, which says the order of choices"
            raise UsageError(word("the routing", got=got, allowed=allowed, where="Routing.choice_R", fix=fix))
        return self.entry_R % max(self.top_k, 1)

    @property
    def dropped_E(self) -> Tensor:
        """(E,) int64, the number of entries that capacity took from each expert."""
        return torch.zeros_like(self.load_E) if self.wanted_E is None else (self.wanted_E - self.load_E).clamp_min(0)

    def dense(self) -> Tensor:
        """(T, E) the matrix itself, zero where there is no entry; differentiable in ``weight_R``."""
        weight_TE = self.weight_R.new_zeros(self.num_tokens, self.num_experts)
        return weight_TE.index_put((self.token_R, self.expert_R), self.weight_R)

    def affinity(self, after: "Routing") -> Tensor:
        """(E, E') int64, how many tokens go to expert i here and to expert j in ``after``: the product A^T A'.

        Raises:
            ShapeError: the two routings are not over the same number of tokens.
        """
        if self.num_tokens != after.num_tokens:
            got, allowed = f"{self.num_tokens} and {after.num_tokens} tokens", "route the same tokens"
            fix = "take both from one forward pass"
            raise ShapeError(word("the two routings", got=got, allowed=allowed, where="Routing.affinity", fix=fix))
        here_TE, there_TE = (
            dataclasses.replace(one, weight_R=torch.ones_like(one.token_R, dtype=torch.float64)).dense()
            for one in (self, after)
        )
        return (here_TE.t() @ there_TE).long()

    # ---- changing it

    def keep(self, keep_R: Tensor) -> Self:
        """The routing with only the entries where ``keep_R`` is true; the load before is kept in ``wanted_E``.

        Raises:
            ShapeError: not one bool for each entry.
        """
        if keep_R.shape != self.token_R.shape or keep_R.dtype != torch.bool:
            got, fix = f"{keep_R.dtype} of shape {tuple(keep_R.shape)}", "pass a comparison, such as weight_R > 0.1"
            allowed = f"be bool of shape ({self.num_entries},)"
            raise ShapeError(word("keep_R", got=got, allowed=allowed, where="Routing.keep", fix=fix))
        kept_E = torch.zeros_like(self.load_E).index_add_(0, self.expert_R, keep_R.long())
        return dataclasses.replace(
            self,
            token_R=self.token_R[keep_R],
            weight_R=self.weight_R[keep_R],
            offset_E=torch.nn.functional.pad(kept_E.cumsum(0), (1, 0)),
            wanted_E=self.load_E if self.wanted_E is None else self.wanted_E,
            entry_R=None,
            top_k=None,
            before=self.detach() if self.before is None and self.wanted_E is None else self.before,
        )

    def relabel(self, label_E: Tensor, num_experts: int) -> Self:
        """The routing over other experts, expert e being ``label_E[e]`` there; entries that meet there are summed.

        Args:
            label_E: (E,) int64, each in [0, num_experts).
            num_experts: how many there are then.

        Raises:
            ShapeError: not one label for each expert.
            UsageError: a label is out of range (looked at on a CPU).
        """
        if label_E.shape != (self.num_experts,):
            got, fix = f"shape {tuple(label_E.shape)}", "pass a tensor (E,)"
            allowed = f"have one label for each of {self.num_experts} experts"
            raise ShapeError(word("label_E", got=got, allowed=allowed, where="Routing.relabel", fix=fix))
        check_range("label", label_E, num_experts, where="Routing.relabel")
        tokens = max(self.num_tokens, 1)
        key_N, place_R = torch.unique(label_E[self.expert_R] * tokens + self.token_R, return_inverse=True)
        border_E = torch.arange(num_experts + 1, device=key_N.device) * tokens
        return type(self)(
            token_R=key_N % tokens,
            weight_R=self.weight_R.new_zeros(len(key_N)).index_add(0, place_R, self.weight_R),
            offset_E=torch.searchsorted(key_N, border_E),
            num_tokens=self.num_tokens,
            real_T=self.real_T,
        )

    def columns(self, start: int, end: int) -> Self:
        """The routing to the experts from ``start`` to before ``end`` alone, numbered anew; entries are not copied.

        It has the same columns of scores and logits; no penalty, and nothing to carry.

        Raises:
            UsageError: not 0 <= start <= end <= E.

        >>> r = Routing.from_topk(torch.tensor([[2, 0], [2, 1]]), torch.ones(2, 2), num_experts=3)
        >>> r.columns(1, 3).token_R.tolist(), r.columns(1, 3).load_E.tolist()
        ([1, 0, 1], [1, 2])
        """
        if not 0 <= start <= end <= self.num_experts:
            got, allowed = f"{start} and {end}", f"be in order, from 0 to {self.num_experts}"
            fix = f"pass columns(0, {self.num_experts})"
            raise UsageError(word("start and end", got=got, allowed=allowed, where="Routing.columns", fix=fix))
        first, last = int(self.offset_E[start]), int(self.offset_E[end])
        return dataclasses.replace(
            self,
            token_R=self.token_R[first:last],
            weight_R=self.weight_R[first:last],
            offset_E=self.offset_E[start : end + 1] - first,
            wanted_E=None if self.wanted_E is None else self.wanted_E[start:end],
            score_TE=None if self.score_TE is None else self.score_TE[:, start:end],
            logit_TE=None if self.logit_TE is None else self.logit_TE[:, start:end],
            penalty=None,
            carry_TX=None,
            entry_R=None,
            top_k=None,
            before=None if self.before is None else self.before.columns(start, end),
        )

    def truncate(self, capacity: int, *, priority: Literal["weight", "position", "rank"] = "weight") -> Self:
        """The routing in which no expert receives more than ``capacity`` tokens.

        Args:
            capacity: C >= 1, tokens per expert.
            priority: whom an expert keeps: the highest weights (ties: the earlier token), the earliest tokens
                (Switch), or by "rank" those whose first choice it is before those whose second it is and so on
                (GShard; within a rank the highest weights), which only the routing of a top-k knows.

        Raises:
            UsageError: capacity is below 1, priority is none of the three, or there are no ranks.
        """
        if capacity < 1 or priority not in ("weight", "position", "rank"):
            got, fix = f"{capacity} and {priority!r}", "pass capacity=1 or more and priority='weight'"
            allowed, where = "be at least 1, and 'weight', 'position' or 'rank'", "Routing.truncate"
            raise UsageError(word("capacity and priority", got=got, allowed=allowed, where=where, fix=fix))
        rank_R = torch.arange(self.num_entries, device=self.token_R.device)
        if priority != "position":
            heavy_R = torch.argsort(self.weight_R.detach(), descending=True, stable=True)
            if priority == "rank":
                heavy_R = heavy_R[torch.argsort(self.choice_R[heavy_R], stable=True)]
            heavy_R = heavy_R[torch.argsort(self.expert_R[heavy_R], stable=True)]
            rank_R = torch.empty_like(rank_R).index_copy(0, heavy_R, rank_R)
        return self.keep(rank_R - self.offset_E[self.expert_R] < capacity)

    def detach(self) -> Self:
        """The same routing, outside any gradient: without scores, logits, penalty, and what it carries."""
        none = dict.fromkeys(("score_TE", "logit_TE", "penalty", "carry_TX"))
        return dataclasses.replace(self, weight_R=self.weight_R.detach(), **none)

    # ---- checking, printing, keeping it

    def validate(self) -> Self:
        """This routing, once its invariants are checked; reads every entry, so not for a hot path.

        Raises:
            ShapeError: an entry is out of range, out of order, repeated or not finite, or the offsets do not fit.
        """
        check_sound(self)
        return self

    def __str__(self) -> str:
        load_E = self.load_E
        span = f"{int(load_E.min())}..{int(load_E.max())}" if load_E.numel() else "none"
        mean = self.num_entries / max(self.num_real, 1)
        return (
            f"Routing({self.num_tokens} tokens -> {self.num_experts} experts, {self.num_entries} entries, "
            f"{mean:.2f} per token, load {span}, {int(self.dropped_E.sum())} dropped)"
        )

    def save(self, path: str | Path) -> None:
        """Writes the routing to one safetensors file, aside first and then renamed."""
        write_routing(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The routing that ``save`` wrote.

        Raises:
            CheckpointError: the file is missing, truncated, altered or not a routing.
        """
        return read_routing(cls, Path(path))
