"""Experts by what is known of a token: its kind, or the skills that its task asks for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.decide.token.balanced import one_choice
from turnout.decide.token.gate import check, check_tokens
from turnout.errors import ShapeError, UsageError, word
from turnout.types import Given, Routing
from turnout.types.called import Called

__all__ = ["ByKind", "Skills"]


class ByKind(Called):
    """Each token goes to the expert of its kind (text, image, ...), with weight 1; nothing is learned.

    The kinds are what ``turnout.layers.given(kind_BS=...)`` says.

    Args:
        width: D, of the tokens.
        num_experts: E, one for each kind.
        top_k: 1.
        generator: not used.

    Raises:
        ShapeError: top_k is not 1, or a size is below 1.

    >>> given = Given.of(1, 3, kind_T=torch.tensor([0, 1, 0]))
    >>> ByKind(4, 2)(torch.zeros(3, 4), given=given).load_E.tolist()
    [2, 1]

    Takes: 1 expert a token; none.

    Source: Liang et al., 2024, "Mixture-of-Transformers: A Sparse and Scalable Architecture for Multi-Modal Foundation
    Models", its feed-forward layers.
    """

    needs_given = True

    def __init__(
        self, width: int, num_experts: int, *, top_k: int = 1, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check("ByKind", width, num_experts, top_k, None)
        one_choice("ByKind", top_k)
        self.width, self.num_experts, self.top_k = width, num_experts, top_k

    def forward(
        self,
        x_TD: Tensor,
        *,
        given: Given,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width), or there is not one kind a token.
            UsageError: no kinds were given, or there is one without an expert.
        """
        check_tokens(x_TD, self.width)
        kind_T = given.need("kind_T", "turnout.decide.token.ByKind")
        weight_T1 = torch.ones(len(x_TD), 1, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device)
        return Routing.from_topk(kind_T[:, None], weight_T1, num_experts=self.num_experts)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}"


class Skills(Called):
    """Each token takes the skills (experts) that its sequence's task asks for, with equal weights; nothing is learned.

    y = mean over s in S_t of expert_s(x), t the task that ``turnout.layers.given(task_B=...)`` says.

    Args:
        width: D, of the tokens.
        num_experts: E, the skills.
        top_k: the most skills of a task; must not be below it.
        table: S_t for each task t, the numbers of its skills; None for one task for each skill, of that skill and of
            the last one, which all tasks have.
        generator: not used.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: a task without skills, with one twice or one that there is not, or with more than ``top_k``.

    >>> router = Skills(4, 3, table=[[0, 2], [1, 2]])
    >>> given = Given.of(2, 4, task_B=torch.tensor([1, 0]))
    >>> router(torch.zeros(4, 4), given=given).dense().tolist()
    [[0.0, 0.5, 0.5], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.0, 0.5]]

    Takes: up to K experts a sequence, by its task; none.

    Source: Dai et al., 2022, "One Model, Multiple Modalities: A Sparsely Activated Approach for Text, Sound, Image,
    Video and Code" (SkillNet). The mean as in its text-only predecessors; a sum differs where tasks have different
    numbers of skills.
    """

    needs_given = True
    table_NE: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        table: Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("Skills", width, num_experts, top_k, None)
        if table is None:
            table = [sorted({skill, num_experts - 1})[:top_k] for skill in range(num_experts)]
        every = set(range(num_experts))
        wrong = [s for s in table if not 1 <= len(s) <= top_k or len(set(s)) < len(s) or not set(s) <= every]
        if wrong or not table:
            allowed = f"name 1 to top_k={top_k} different skills below {num_experts} for each task"
            fix = "pass such as table=[[0, 2], [1, 2]]"
            got = wrong[0] if wrong else table
            where = "turnout.decide.token.Skills"
            raise UsageError(word("table", got=got, allowed=allowed, where=where, fix=fix))
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        table_NE = torch.zeros(len(table), num_experts, dtype=torch.bool)
        for task, skills in enumerate(table):
            table_NE[task, list(skills)] = True
        self.register_buffer("table_NE", table_NE)

    def forward(
        self,
        x_TD: Tensor,
        *,
        given: Given,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width), or there is not one task a sequence.
            UsageError: no tasks were given, or there is one without a row in the table.
        """
        check_tokens(x_TD, self.width)
        where = "turnout.decide.token.Skills"
        task_B = given.need("task_B", where)
        known = len(self.table_NE)
        if task_B.device.type == "cpu" and task_B.numel() and not 0 <= int(task_B.min()) <= int(task_B.max()) < known:
            got, fix = f"{int(task_B.min())} to {int(task_B.max())}", "add the task's skills as a row of the table"
            raise UsageError(word("task_B", got=got, allowed=f"be from 0 to {known - 1}", where=where, fix=fix))
        mask_TE = self.table_NE[task_B[given.sequence_T]]
        weight_TE = mask_TE.to(torch.promote_types(x_TD.dtype, torch.float32)) / mask_TE.sum(1, keepdim=True)
        if len(weight_TE) != len(x_TD):
            got, fix = f"{len(weight_TE)} tokens", "pass what is known of the same tokens"
            raise ShapeError(word("given", got=got, allowed=f"be of the {len(x_TD)} tokens", where=where, fix=fix))
        return Routing.from_dense(weight_TE, mask_TE=mask_TE)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, {len(self.table_NE)} tasks"
