"""The best path through stages whose choices are only tied to those of the next: dynamic programming."""

from collections.abc import Callable

import numpy as np

from turnout.solve.solution import Solution

__all__ = ["chain"]


def chain(sizes: list[int], score: Callable[[int], np.ndarray]) -> Solution:
    """The choice for each stage that maximises sum_l score_l[choice_l, choice_l+1]; exact.

    Args:
        sizes: how many choices each stage has.
        score: stage l -> (choices of l, choices of l + 1); asked once for each, in order.

    Returns:
        The choices and the sum. Ties go to the lower choice.

    >>> chain([2, 2], lambda stage: np.array([[1.0, 2.0], [5.0, 0.0]])).column_M.tolist()
    [1, 0]

    Source: Bellman, 1957, "Dynamic Programming"; on a trellis, Viterbi, 1967.
    """
    best_S, back = np.zeros(sizes[0]), []
    for stage in range(len(sizes) - 1):
        total_SS = best_S[:, None] + score(stage)
        back.append(total_SS.argmax(0))
        best_S = total_SS.max(0)
    choice = [int(best_S.argmax())]
    for from_S in reversed(back):
        choice.append(int(from_S[choice[-1]]))
    return Solution(np.array(choice[::-1]), float(best_S.max()))
