"""Adapters on a live model: attached, routed, trained, saved and folded away again."""

from turnout.reshape.adapters.attach import attach, detach
from turnout.reshape.adapters.folder import adapters_of, attach_folder, save_adapters, save_attached
from turnout.reshape.adapters.low_rank import add_low_rank, fold_low_rank, low_rank_adapter
from turnout.reshape.adapters.phatgoose import train_gates
from turnout.reshape.adapters.poly import add_tasks, fresh_adapters
from turnout.reshape.adapters.scale_and_shift import scale_and_shift
from turnout.reshape.adapters.shards import attach_shards, load_shards, save_shards
from turnout.reshape.adapters.trained import fold_adapters, load_routers, save_routers

__all__ = [
    "adapters_of",
    "add_low_rank",
    "add_tasks",
    "attach",
    "attach_folder",
    "attach_shards",
    "detach",
    "fold_adapters",
    "fold_low_rank",
    "fresh_adapters",
    "load_routers",
    "load_shards",
    "low_rank_adapter",
    "save_adapters",
    "save_attached",
    "save_routers",
    "save_shards",
    "scale_and_shift",
    "train_gates",
]
