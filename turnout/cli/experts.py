"""The flags that say how much memory experts may take: the same of every command that runs a model."""

import argparse
from typing import TYPE_CHECKING

from turnout.errors import UsageError, word

if TYPE_CHECKING:
    from turnout.recipes.expert_room import ExpertRoom

__all__ = ["add_experts", "experts_of"]


def add_experts(parser: argparse.ArgumentParser) -> None:
    """Adds ``--expert-memory``, ``--expert-policy`` and ``--n-cpu-moe``."""
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="memory that experts may take, as 2GB or 500MiB; the others stay in the model's files (default: all)",
    )
    parser.add_argument(
        "--expert-policy",
        metavar="NAME",
        help="with --expert-memory, which experts stay: lru (default), lfu or least_stale; turnout cache compares them "
        "on a trace",
    )
    parser.add_argument(
        "--n-cpu-moe",
        type=int,
        metavar="N",
        help="as in llama.cpp: the experts of the first N layers stay with the CPU; on a CPU it changes nothing",
    )


def experts_of(arguments: argparse.Namespace) -> "ExpertRoom | None":
    """What these flags say; None where none was given.

    Raises:
        UsageError: a policy for experts that all stay.
    """
    if arguments.expert_policy is not None and arguments.expert_memory is None:
        allowed, fix = "go with --expert-memory", "add --expert-memory 2GB, or leave it out: all experts stay"
        where = f"turnout {arguments.command}"
        raise UsageError(word("--expert-policy", got=arguments.expert_policy, allowed=allowed, where=where, fix=fix))
    if arguments.expert_memory is None and arguments.n_cpu_moe is None:
        return None
    from turnout.recipes.expert_room import ExpertRoom

    return ExpertRoom(arguments.expert_memory, arguments.expert_policy or "lru", arguments.n_cpu_moe)
