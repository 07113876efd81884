"""The flags that say how much memory experts may take: the same of every command that runs a model."""

import argparse
from typing import TYPE_CHECKING

from turnout.errors import UsageError, word

if TYPE_CHECKING:
    from turnout.recipes.expert_room import ExpertRoom

__all__ = ["POLICIES", "add_experts", "experts_of"]

# turnout.decide.device.cache.named.NAMES, which would load torch; a test compares them.
POLICIES = ("lru", "lfu", "lfru", "least_stale", "static", "trace_matching", "expert_flow", "pre_gated")


def add_experts(parser: argparse.ArgumentParser) -> None:
    """Adds ``--expert-memory``, ``--expert-policy``, ``--expert-profile`` and ``--n-cpu-moe``."""
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="memory that experts may take, as 2GB or 500MiB; the others stay in the model's files (default: all)",
    )
    parser.add_argument(
        "--expert-policy",
        metavar="NAME",
        help=f"with --expert-memory, which experts stay: {', '.join(POLICIES)} (default lru); turnout cache compares "
        "them on a trace",
    )
    parser.add_argument(
        "--expert-profile",
        metavar="FILE",
        help="what static, trace_matching and expert_flow go by: turnout cache TRACE --save FILE",
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
        UsageError: a policy, or its profile, for experts that all stay.
    """
    for flag, got in (("--expert-policy", arguments.expert_policy), ("--expert-profile", arguments.expert_profile)):
        if got is not None and arguments.expert_memory is None:
            allowed, fix = "go with --expert-memory", "add --expert-memory 2GB, or leave it out: all experts stay"
            raise UsageError(word(flag, got=got, allowed=allowed, where=f"turnout {arguments.command}", fix=fix))
    if arguments.expert_memory is None and arguments.n_cpu_moe is None:
        return None
    from turnout.recipes.expert_room import ExpertRoom

    policy = arguments.expert_policy or "lru"
    return ExpertRoom(arguments.expert_memory, policy, arguments.n_cpu_moe, arguments.expert_profile)
