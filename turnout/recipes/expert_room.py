"""How much memory a model's experts may take, as commands are told it: what is made of it, and what is said of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from turnout.decide.device.cache import Learnt, named_policy
from turnout.decide.device.cache.named import LEARNING, NAMES
from turnout.errors import UsageError, nearest, word
from turnout.fields import byte_size
from turnout.models import LM
from turnout.models.checkpoint import load_offloaded
from turnout.types import CachePolicy, CacheShape
from turnout.types.device import find_device, shown

__all__ = ["ExpertRoom"]

_MAKE = "turnout eval RUN --trace TRACE, then turnout cache TRACE --save FILE"


@dataclasses.dataclass(frozen=True)
class ExpertRoom:
    """What ``--expert-memory``, ``--expert-policy``, ``--expert-profile`` and ``--n-cpu-moe`` say.

    Args:
        memory: how many bytes experts may take in memory, as "2GB"; None for as many as there are.
        policy: which of them stay: a name that ``named_policy`` knows, with - or _ between its words.
        profile: the file that ``turnout cache --save`` wrote, for a policy that goes by what it learnt.
        n_cpu_moe: llama.cpp's: the experts of so many layers, from the first, stay with the CPU where an accelerator
            computes the rest.

    Raises:
        UsageError: no size, no such policy, one that has learnt nothing, or a negative number.

    >>> ExpertRoom("2GB").policy
    'lru'

    Source: llama.cpp, ``--n-cpu-moe``; the rest as ``turnout.models.checkpoint.load_offloaded``.
    """

    memory: str | int | None = None
    policy: str = "lru"
    n_cpu_moe: int | None = None
    profile: str | Path | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            self._bytes(self.memory)
        if self._name not in NAMES:
            raise nearest(self.policy, list(NAMES), kind="policy", where="--expert-policy")
        if self._name in LEARNING and self.profile is None:
            got, allowed = f"{self.policy} alone", "go with --expert-profile, what such a policy goes by"
            fix = f"add --expert-profile FILE, made by {_MAKE}; or take lru"
            raise UsageError(word("--expert-policy", got=got, allowed=allowed, where="turnout", fix=fix))
        if self.n_cpu_moe is not None and self.n_cpu_moe < 0:
            fix, allowed = "leave it out", "be the number of layers whose experts stay with the CPU"
            raise UsageError(word("--n-cpu-moe", got=self.n_cpu_moe, allowed=allowed, where="turnout", fix=fix))

    def load(self, folder: Path, where: str, device: str | torch.device) -> tuple[LM | None, tuple[str, ...]]:
        """The model with so much of its experts in memory, None where all may be; and what is to be said of it.

        Args:
            folder: of the model.
            where: the command that asks.
            device: where the model is to run.

        Raises:
            UsageError: an accelerator was asked for, or a policy that this model has nothing for.
            TurnoutError: as ``load_offloaded``.
        """
        on = torch.device("cpu") if device == "auto" and self.memory is not None else find_device(device)
        asked = self.memory is not None or bool(self.n_cpu_moe)
        if asked and on.type != "cpu":
            flag = "--expert-memory" if self.memory is not None else "--n-cpu-moe"
            allowed = "go with --device cpu: experts come into the CPU's memory alone, and are computed there"
            fix = "add --device cpu; past one machine's memory export the model to llama.cpp or vLLM"
            raise UsageError(word(flag, got=f"--device {shown(on)}", allowed=allowed, where=where, fix=fix))
        notes: tuple[str, ...] = ()
        if self.n_cpu_moe is not None:
            notes += (
                f"--n-cpu-moe {self.n_cpu_moe} changes nothing on a CPU, which computes the experts of all layers "
                "already; --expert-memory says how much memory they may take",
            )
        if self.memory is None:
            return None, notes
        if self.profile is not None and self._name not in LEARNING:
            notes += (f"--expert-profile {self.profile} has no effect: {self.policy} goes by what is used alone",)
        lm = load_offloaded(folder, expert_memory=self.memory, policy=self._policy())
        if self._name == "pre_gated" and lm.pre_gate is None:
            assert lm.experts is not None
            lm.experts.close()
            allowed = "be asked of a model whose one router decides for all layers before the first (router=PreGate)"
            fix = "take lru, or expert_flow, which foresees what any router will do"
            raise UsageError(word("--expert-policy", got="pre_gated", allowed=allowed, where=where, fix=fix))
        return lm, (self._understood(lm, folder), *notes)

    @property
    def _name(self) -> str:
        return self.policy.replace("-", "_")

    def _policy(self) -> Callable[[CacheShape], CachePolicy]:
        learnt = None if self.profile is None or self._name not in LEARNING else Learnt.open(self.profile)
        return lambda shape: named_policy(self._name, shape, learnt)

    @staticmethod
    def _bytes(memory: str | int) -> int:
        return byte_size(memory, what="--expert-memory", where="turnout")

    def _understood(self, lm: LM, folder: Path) -> str:
        assert lm.experts is not None and self.memory is not None
        made, shape = lm.experts.stats(), lm.experts.shape
        most = "up to " if len(set(lm.experts.num_experts_L)) > 1 else ""
        each = "" if shape.shared else f", {shape.slots} of {most}{shape.experts} in each of {shape.layers} layers"
        return (
            f"--expert-memory {self.memory}: {self._bytes(self.memory):,} bytes hold {made.slots:,} of "
            f"{made.experts:,} experts of {made.expert_bytes:,} bytes{each}; the others come from {folder} when used"
        )
