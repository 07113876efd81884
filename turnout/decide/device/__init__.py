"""Which device holds what, and which work it does when."""

from turnout.decide.device.block_schedule import block_schedule
from turnout.decide.device.layouts import Choice, layouts
from turnout.decide.device.memory import Held, held, stage_blocks
from turnout.decide.device.pace import Pace, Wire, pace

__all__ = ["Choice", "Held", "Pace", "Wire", "block_schedule", "held", "layouts", "pace", "stage_blocks"]
