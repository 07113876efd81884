"""What a layer was told, told again when torch.utils.checkpoint runs the layer a second time in the backward pass."""

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint

from turnout.errors import UsageError, word

__all__ = ["in_backward", "recall", "steady"]

T = TypeVar("T")
_FILE = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__.co_filename
_RECORD = "_turnout_recalled"  # what a checkpointed region remembers: values in the order they were asked for
_PLACE = "_turnout_place"  # and how far a recomputation is: (which backward pass, next value)


def recall(label: object, value: Callable[[], T]) -> T:
    """What ``value`` gives now; where a checkpointed region is run again, what it gave there in the forward pass.

    A recomputation is given the region's tensors and nothing else: a context that was open around the forward pass is
    closed by then, or belongs to another call, and the backward pass may run in a thread of its own. torch offers no
    place that both runs of a region see, so the values are kept on the region itself, which its frames on the stack
    name; they live exactly as long as its part of the graph. A backward pass through anything else that runs layers
    again is refused, never guessed.

    Args:
        label: of what is asked, the same in both runs.
        value: only asked in the forward pass.

    Raises:
        UsageError: a recomputation whose forward pass asked for something else.
    """
    if torch.compiler.is_compiling():  # a compiled region is recomputed from its graph, in which the value is a part
        return value()
    inside, again = _regions()
    found = value() if again is None else _next(again, label)
    for region in inside:
        vars(region).setdefault(_RECORD, []).append((label, found))
    return found


def in_backward() -> int:
    """Which backward pass this thread is in; -1 for none."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def steady(generator: torch.Generator | None) -> torch.Generator | None:
    """The generator to draw from now: the caller's; in a recomputation a copy as it stood in the forward pass.

    torch.utils.checkpoint keeps the state of the default generator (None) by itself, and of no other.
    """
    if generator is None or torch.compiler.is_compiling():
        return generator
    inside, again = _regions()
    if not inside and again is None:
        return generator
    state = recall(("generator", str(generator.device)), generator.get_state)
    if again is None:
        return generator
    copied = torch.Generator(generator.device)
    copied.set_state(state)
    return copied


def _regions() -> tuple[list[Any], Any]:
    """The checkpointed regions that this call is in, innermost first, up to the one that is run again, and that one."""
    inside: list[Any] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _FILE:
            name = code.co_qualname
            if name == "CheckpointFunction.backward":
                return inside, frame.f_locals["ctx"]
            if name == "_checkpoint_hook.__init__.<locals>.unpack_hook":
                return inside, frame.f_locals["frame"]
            if name == "CheckpointFunction.forward":
                inside.append(frame.f_locals["ctx"])
            elif name == "checkpoint" and frame.f_locals.get("gen") is not None:
                inside.append(frame.f_locals["gen"].gi_frame.f_locals["new_frame"])
        frame = frame.f_back
    return inside, None


def _next(region: Any, label: object) -> Any:
    """The next value of a region that is run again; from the first at each backward pass."""
    held, task = vars(region), torch._C._current_graph_task_id()
    before, place = held.get(_PLACE, (task, 0))
    place = place if before == task else 0
    record = held.get(_RECORD, [])
    if place >= len(record) or record[place][0] != label:
        got = f"{label} at place {place}, where the forward pass asked for {[one for one, _ in record]}"
        allowed, fix = "ask for the same in the same order", "checkpoint a function that does the same in both runs"
        where = "a region of torch.utils.checkpoint"
        raise UsageError(word("the recomputation", got=got, allowed=allowed, where=where, fix=fix))
    held[_PLACE] = (task, place + 1)
    return record[place][1]
