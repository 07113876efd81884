"""Probe: a neighbour that is the same but louder. Its direction, so its experts, stay; a shared scale does not."""

import torch

from turnout.measure.isolation.finding import Finding
from turnout.measure.isolation.seen import Seen
from turnout.measure.isolation.subject import Layer

__all__ = ["scale"]

_LOUD = (1.0, 2.0, 50.0, 1000.0)


def scale(subject: Layer, chance: torch.Generator, batches: int, bound: float) -> Finding:
    """Whether one neighbour's loudness changes the victim's output, as one dynamic scale for a whole batch makes it.

    Source: vllm-project/vllm, issue 57016: one FP8 scale over the input of co-batched experts.
    """
    seen, victim, others = Seen(bound), subject.rows(1, chance), subject.rows(7, chance)
    for loud in _LOUD:
        row_BS = torch.cat((others, victim))
        row_BS[0] = row_BS[0] * loud
        seen.add(subject.run(row_BS)[-1])
    where = f" of {subject.name}" if subject.name else ""
    what = f"a neighbour{where} up to {_LOUD[-1]:g} times as loud"
    return seen.finding(
        "scale", what, "a scale for each token in place of one for the batch; no experts that keep the loudest"
    )
