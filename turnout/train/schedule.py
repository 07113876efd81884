"""Learning-rate schedules: pure functions of the step, so that nothing about them needs saving."""

import math

from turnout.errors import UsageError, word
from turnout.expects import NUMBER, expects

__all__ = ["cosine", "wsd"]


@expects(step=NUMBER)
def cosine(step: int, *, steps: int, lr: float, min_lr: float = 0.0, warmup: int = 0) -> float:
    """The learning rate of one step: a linear warm-up, then half a cosine down to ``min_lr``.

    lr(s) = lr (s + 1) / W                                            for s < W
    lr(s) = min_lr + (lr - min_lr) (1 + cos(pi (s - W) / (S - 1 - W))) / 2   from there on

    Args:
        step: s, counted from 0.
        steps: S, the length of the run; the last step, S - 1, gets ``min_lr``.
        lr: the highest learning rate, > 0.
        min_lr: the lowest after the warm-up, in [0, lr].
        warmup: W, steps of warm-up, in [0, S].

    Returns:
        The learning rate.

    Raises:
        UsageError: sizes that do not fit each other.

    >>> [round(cosine(s, steps=7, lr=1.0, min_lr=0.1, warmup=2), 2) for s in range(7)]
    [0.5, 1.0, 1.0, 0.87, 0.55, 0.23, 0.1]

    Source: Loshchilov & Hutter, 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts"; without restarts,
    with a linear warm-up.
    """
    _check(step, steps, lr, min_lr, warmup, "turnout.train.cosine")
    if step < warmup:
        return lr * (step + 1) / warmup
    along = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * along)) / 2


@expects(step=NUMBER)
def wsd(step: int, *, steps: int, lr: float, min_lr: float = 0.0, warmup: int = 0, decay: float = 0.2) -> float:
    """The learning rate of one step: warm-up, a long stable stretch, then a short decay to ``min_lr``.

    With D = round(decay S) steps of decay and u = (s - (S - D) + 1) / D, the share of the decay that is over:
    lr(s) = lr (s + 1) / W for s < W, lr for s < S - D, and min_lr + (lr - min_lr) (1 - sqrt(u)) from there on.

    Args:
        step: s, counted from 0.
        steps: S, the length of the run.
        lr: the highest learning rate, > 0.
        min_lr: the last one, in [0, lr].
        warmup: W, steps of warm-up, in [0, S].
        decay: the share of the run that decays, in [0, 1]; it never begins before the warm-up has ended.

    Returns:
        The learning rate.

    Raises:
        UsageError: sizes that do not fit each other.

    >>> [round(wsd(s, steps=8, lr=1.0, warmup=2, decay=0.5), 2) for s in range(8)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.29, 0.13, 0.0]

    Source: Hu et al., 2024, "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
    Strategies"; the decay is the 1 - sqrt of Haegele et al., 2024, "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations".
    """
    _check(step, steps, lr, min_lr, warmup, "turnout.train.wsd")
    if not 0 <= decay <= 1:
        raise UsageError(word("decay", got=decay, allowed="be in [0, 1]", where="turnout.train.wsd", fix="decay=0.2"))
    if step < warmup:
        return lr * (step + 1) / warmup
    length = min(round(decay * steps), steps - warmup)
    if step < steps - length:
        return lr
    over = min(1.0, (step - (steps - length) + 1) / max(1, length))
    return min_lr + (lr - min_lr) * (1 - math.sqrt(over))


def _check(step: int, steps: int, lr: float, min_lr: float, warmup: int, where: str) -> None:
    for name, got, allowed, fits, fix in (
        ("step", step, "be 0 or more", step >= 0, "count steps from 0"),
        ("steps", steps, "be 1 or more", steps >= 1, "steps=1"),
        ("lr", lr, "be above 0", lr > 0, "lr=0.001"),
        ("min_lr", min_lr, f"be in [0, lr={lr}]", 0 <= min_lr <= lr, f"min_lr={lr / 10:g}"),
        ("warmup", warmup, f"be between 0 and steps={steps}", 0 <= warmup <= steps, f"warmup={steps // 10}"),
    ):
        if not fits:
            raise UsageError(
                word(name, got=got, allowed=allowed, where=where, fix=f"pass {fix}" if "=" in fix else fix)
            )
