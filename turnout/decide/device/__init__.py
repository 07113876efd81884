"""Which device holds what, and which work it does when."""

from turnout.decide.device import cache, place
from turnout.decide.device.block_schedule import block_schedule
from turnout.decide.device.dual_pipe_v import dual_pipe_v
from turnout.decide.device.exact_schedule import exact_schedule
from turnout.decide.device.expert_memory import expert_slots
from turnout.decide.device.flows import Flows, ecmp, flows
from turnout.decide.device.gpipe import gpipe
from turnout.decide.device.interleaved import interleaved, looped_breadth_first
from turnout.decide.device.layouts import Choice, layouts
from turnout.decide.device.memory import Held, held, stage_blocks
from turnout.decide.device.named_schedule import named_schedule, schedule_of
from turnout.decide.device.offload import BlockLoad, Foreseen, block_loads, foresee, offload
from turnout.decide.device.one_f_one_b import one_f_one_b
from turnout.decide.device.pace import Pace, Wire, pace
from turnout.decide.device.partition import Partition, partition
from turnout.decide.device.refined import refined
from turnout.decide.device.regroup import regroup
from turnout.decide.device.search import Found, known_schedules, search
from turnout.decide.device.v_pattern import v_half, v_min
from turnout.decide.device.zb_automatic import zb_automatic
from turnout.decide.device.zbv import zbv
from turnout.decide.device.zero_bubble import interleaved_zero_bubble, zb_h1, zb_h2
from turnout.decide.device.zeropp import zeropp

__all__ = [
    "BlockLoad",
    "Choice",
    "Flows",
    "Foreseen",
    "Found",
    "Held",
    "Pace",
    "Partition",
    "Wire",
    "block_loads",
    "block_schedule",
    "cache",
    "dual_pipe_v",
    "ecmp",
    "exact_schedule",
    "expert_slots",
    "flows",
    "foresee",
    "gpipe",
    "held",
    "interleaved",
    "interleaved_zero_bubble",
    "known_schedules",
    "layouts",
    "looped_breadth_first",
    "named_schedule",
    "offload",
    "one_f_one_b",
    "pace",
    "partition",
    "place",
    "refined",
    "regroup",
    "schedule_of",
    "search",
    "stage_blocks",
    "v_half",
    "v_min",
    "zb_automatic",
    "zb_h1",
    "zb_h2",
    "zbv",
    "zeropp",
]
