"""Changing models that exist: every function takes a model and gives ``(model, Report)``, which says what changed.

The floors say what is changed: ``live`` models in place, dense ``to_sparse``, sparse ``to_smaller``, weights to few
bits (``quantize``), ``many_to_one``, and ``adapters``. Every name is here too.
"""

from typing import TYPE_CHECKING

from turnout import moved
from turnout.reshape.adapters import (
    adapters_of,
    add_low_rank,
    add_tasks,
    attach,
    attach_folder,
    attach_shards,
    detach,
    fold_adapters,
    fold_low_rank,
    fresh_adapters,
    load_routers,
    load_shards,
    low_rank_adapter,
    save_adapters,
    save_attached,
    save_routers,
    save_shards,
    scale_and_shift,
    train_gates,
)
from turnout.reshape.live import adopt, register_backend, release
from turnout.reshape.many_to_one import (
    Soup,
    average,
    fisher,
    fisher_information,
    interpolate,
    interpolate_sparse,
    interpolation_path,
    soup,
    stragglers,
    task_vectors,
)
from turnout.reshape.quantize import quantize
from turnout.reshape.to_smaller import compress_experts, densify, drop_experts, latent_experts, merge_experts
from turnout.reshape.to_sparse import diversify, read_me, split, upcycle

__all__ = [
    "Soup",
    "adapters_of",
    "add_low_rank",
    "add_tasks",
    "adopt",
    "attach",
    "attach_folder",
    "attach_shards",
    "average",
    "compress_experts",
    "densify",
    "detach",
    "diversify",
    "drop_experts",
    "fisher",
    "fisher_information",
    "fold_adapters",
    "fold_low_rank",
    "fresh_adapters",
    "interpolate",
    "interpolate_sparse",
    "interpolation_path",
    "latent_experts",
    "load_routers",
    "load_shards",
    "low_rank_adapter",
    "merge_experts",
    "quantize",
    "read_me",
    "register_backend",
    "release",
    "save_adapters",
    "save_attached",
    "save_routers",
    "save_shards",
    "scale_and_shift",
    "soup",
    "split",
    "stragglers",
    "task_vectors",
    "train_gates",
    "upcycle",
]

if not TYPE_CHECKING:  # a checker would take every name for there

    def __getattr__(name: str) -> object:
        return moved.name("turnout.reshape", name)
