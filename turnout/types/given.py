"""Given: what is known about the sequences of a call beside their activations."""

import dataclasses

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Which sequence each token belongs to, which tokens are padding, and what the caller said about each sequence.

    Args:
        sequence_T: (T,) int64, the sequence of each token, in [0, num_sequences).
        num_sequences: B.
        keep_T: (T,) bool, False at padding; None when every token counts.
        task_B: (B,) int64, the number of each sequence's task, where the caller knows it.
        query_BQ: (B, Q) an embedding of what each sequence asks for, where the caller made one.
        kind_T: (T,) int64, the kind of each token (its modality), where the caller knows it.
        label_B: (B,) int64, what each sequence is labelled as (its class), for routers that learn from it in training.

    >>> import torch
    >>> given = Given.of(2, 6, task_B=torch.tensor([3, 1]))
    >>> given.sequence_T.tolist(), given.need("task_B", "Poly").tolist()
    ([0, 0, 0, 1, 1, 1], [3, 1])
    >>> given.mean(torch.arange(6.0)[:, None]).tolist()
    [[1.0], [4.0]]

    Source: none; plain bookkeeping.
    """

    sequence_T: Tensor
    num_sequences: int
    keep_T: Tensor | None = None
    task_B: Tensor | None = None
    query_BQ: Tensor | None = None
    kind_T: Tensor | None = None
    label_B: Tensor | None = None

    @classmethod
    def of(
        cls,
        num_sequences: int,
        num_tokens: int,
        *,
        keep_T: Tensor | None = None,
        task_B: Tensor | None = None,
        query_BQ: Tensor | None = None,
        kind_T: Tensor | None = None,
        label_B: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> "Given":
        """B sequences of the same length, one after the other."""
        each = num_tokens // max(num_sequences, 1)
        sequence_T = torch.arange(num_sequences, device=device).repeat_interleave(each)
        return cls(sequence_T, num_sequences, keep_T, task_B, query_BQ, kind_T, label_B)

    def need(self, name: str, who: str) -> Tensor:
        """``task_B``, ``query_BQ`` or ``label_B`` with one row for each sequence, ``kind_T`` with one for each token.

        Raises:
            UsageError: the caller gave none.
            ShapeError: it has another number of rows than there are sequences or tokens.
        """
        value: Tensor | None = getattr(self, name)
        each, count = ("token", len(self.sequence_T)) if name == "kind_T" else ("sequence", self.num_sequences)
        if value is None:
            said = "kind_BS" if name == "kind_T" else name
            fix = f"call the model inside `with turnout.layers.given({said}=...):`"
            raise UsageError(word(name, got=None, allowed=f"be given for every {each}", where=who, fix=fix))
        if value.shape[0] != count:
            got, allowed = f"{value.shape[0]} rows", f"have a row for each of the {count} {each}s"
            raise ShapeError(word(name, got=got, allowed=allowed, where=who, fix=f"pass one row a {each}"))
        return value.to(self.sequence_T.device)

    def tokens(self) -> "Given":
        """The same for the tokens alone, padding left out."""
        if self.keep_T is None:
            return self
        kind_T = None if self.kind_T is None else self.kind_T[self.keep_T]
        return dataclasses.replace(self, sequence_T=self.sequence_T[self.keep_T], keep_T=None, kind_T=kind_T)

    def mean(self, x_TD: Tensor) -> Tensor:
        """(B, D) the mean of each sequence's tokens, padding left out; zero for a sequence that is all padding."""
        weight_T = torch.ones_like(self.sequence_T, dtype=x_TD.dtype) if self.keep_T is None else self.keep_T
        weight_T = weight_T.to(x_TD.dtype)
        total_BD = x_TD.new_zeros(self.num_sequences, x_TD.shape[1])
        total_BD = total_BD.index_add(0, self.sequence_T, x_TD * weight_T[:, None])
        count_B = x_TD.new_zeros(self.num_sequences).index_add(0, self.sequence_T, weight_T)
        return total_BD / count_B.clamp(min=1)[:, None]
