"""Placement: which device holds which expert of each layer, in how many copies."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from turnout.errors import CheckpointError, UsageError, word
from turnout.fields import build, plain
from turnout.reading import read_json
from turnout.storage import check_seal, sealed, write_whole

__all__ = ["Moves", "Placement"]

_FORMAT, _WHERE = "turnout.placement/1", "turnout.types.Placement"


@dataclasses.dataclass(frozen=True)
class Moves:
    """What has to be copied between devices for one placement to become another; what is dropped costs nothing.

    Args:
        copies: (layer, expert, device that has it, device that gets it) of each copy.
        bytes: of all of them.
        slots: copies that the new placement holds in all.

    >>> Moves(copies=((0, 3, 0, 1),), bytes=12.0, slots=4).share
    0.25

    Source: none; plain bookkeeping.
    """

    copies: tuple[tuple[int, int, int, int], ...]
    bytes: float
    slots: int

    @property
    def share(self) -> float:
        """Copies that travel, of all that the new placement holds."""
        return len(self.copies) / self.slots


@dataclasses.dataclass(frozen=True)
class Placement:
    """The device of every copy of every expert. A copy has a slot; a layer's slots are in the order of their devices.

    In the words that EPLB gave the field: ``phy2log`` is the expert (logical) of each slot (physical), ``log2phy`` the
    slots of each expert, ``count`` how many it has. Devices may hold different numbers of copies, layers different
    numbers of experts. Two copies of an expert on one device would be one copy that takes the room of two: refused.

    Args:
        devices: G.
        num_experts_L: experts in each layer.
        phy2log: for each layer the expert of each slot.
        device: for each layer the device of each slot, never falling.
        nodes: machines, of equally many devices; device g is in node g // (G / nodes).
        layers: the names of the layers, as a trace has them; empty for unnamed ones.

    Raises:
        UsageError: an expert that is nowhere, twice on one device, or no expert; a device that is none.

    >>> placement = Placement.contiguous([4], devices=2)
    >>> placement.phy2log, placement.device, placement.on(0, 1)
    (((0, 1, 2, 3),), ((0, 0, 1, 1),), (2, 3))
    >>> other = Placement(2, (4,), ((0, 1, 3, 2, 3),), ((0, 0, 0, 1, 1),))
    >>> other.count(0).tolist(), other.log2phy(0).tolist()
    ([1, 1, 1, 2], [[0, -1], [1, -1], [3, -1], [2, 4]])
    >>> placement.moved(other, expert_bytes=10).copies  # layer 0, expert 3, from device 1 to device 0
    ((0, 3, 1, 0),)

    Source: the three tables are those of DeepSeek-AI, 2025, "Expert Parallelism Load Balancer".
    """

    devices: int
    num_experts_L: tuple[int, ...]
    phy2log: tuple[tuple[int, ...], ...]
    device: tuple[tuple[int, ...], ...]
    nodes: int = 1
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.devices < 1 or self.nodes < 1 or self.devices % self.nodes:
            got, allowed = f"{self.nodes} nodes of {self.devices} devices", "be equal parts of at least one device"
            raise _wrong("nodes", got, allowed, "pass nodes=1")
        lengths = {len(self.num_experts_L), len(self.phy2log), len(self.device), *({len(self.layers)} - {0})}
        if len(lengths) > 1 or not self.num_experts_L:
            got = f"{len(self.num_experts_L)}, {len(self.phy2log)}, {len(self.device)} and {len(self.layers)} layers"
            raise _wrong(
                "the placement", got, "have the same layers in all its tables", "leave layers out, or name each"
            )
        for layer, experts in enumerate(self.num_experts_L):
            self._check(layer, experts, np.asarray(self.phy2log[layer]), np.asarray(self.device[layer]))

    def _check(self, layer: int, experts: int, phy2log: np.ndarray, device: np.ndarray) -> None:
        what, fix = f"layer {layer} of the placement", "place it again with turnout place"
        if phy2log.shape != device.shape or not len(device):
            raise _wrong(what, f"{phy2log.size} experts on {device.size} devices", "have a device for each slot", fix)
        if device.min() < 0 or device.max() >= self.devices or (np.diff(device) < 0).any():
            got = f"devices {np.unique(device).tolist()}" if (np.diff(device) >= 0).all() else "slots in another order"
            raise _wrong(what, got, f"have slots on devices 0..{self.devices - 1}, in their order", fix)
        if phy2log.min() < 0 or phy2log.max() >= experts:
            strange = next(int(e) for e in phy2log if not 0 <= e < experts)
            raise _wrong(what, f"expert {strange}", f"hold its {experts} experts", fix)
        held = np.bincount(device * experts + phy2log, minlength=self.devices * experts).reshape(-1, experts)
        if held.max() > 1:
            g, e = (int(one) for one in np.unravel_index(held.argmax(), held.shape))
            raise _wrong(what, f"expert {e} twice on device {g}", "have each expert at most once on a device", fix)
        if (held.sum(0) == 0).any():
            raise _wrong(what, f"none of expert {int(held.sum(0).argmin())}", "hold a copy of each expert", fix)

    @classmethod
    def contiguous(
        cls, num_experts_L: Sequence[int], *, devices: int, nodes: int = 1, layers: Sequence[str] = ()
    ) -> Self:
        """One copy of each expert, in order: what expert parallelism does unless told otherwise.

        Args:
            num_experts_L: experts in each layer; where the devices do not divide them, some hold one more.
            devices: G.
            nodes: machines.
            layers: their names.

        Raises:
            UsageError: fewer experts than 1.
        """
        device = tuple(tuple(e * devices // experts for e in range(experts)) for experts in num_experts_L)
        phy2log = tuple(tuple(range(experts)) for experts in num_experts_L)
        return cls(devices, tuple(num_experts_L), phy2log, device, nodes, tuple(layers))

    @classmethod
    def of(
        cls,
        held_LGE: Sequence[np.ndarray],
        *,
        nodes: int = 1,
        layers: Sequence[str] = (),
    ) -> Self:
        """The placement of tables (G, E), one a layer, that say which device holds which expert.

        Raises:
            UsageError: an expert that is nowhere.
        """
        pairs = [np.nonzero(np.asarray(held_GE)) for held_GE in held_LGE]
        return cls(
            len(held_LGE[0]),
            tuple(held_GE.shape[1] for held_GE in held_LGE),
            tuple(tuple(expert.tolist()) for _, expert in pairs),
            tuple(tuple(device.tolist()) for device, _ in pairs),
            nodes,
            tuple(layers),
        )

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.num_experts_L)

    @property
    def slots(self) -> int:
        """Copies in all layers."""
        return sum(map(len, self.phy2log))

    def node_of(self, device: int) -> int:
        """The machine that a device is in."""
        return device * self.nodes // self.devices

    def held(self, layer: int) -> np.ndarray:
        """(G, E) bool, which device holds which expert."""
        held_GE = np.zeros((self.devices, self.num_experts_L[layer]), dtype=bool)
        held_GE[np.asarray(self.device[layer]), np.asarray(self.phy2log[layer])] = True
        return held_GE

    def on(self, layer: int, device: int) -> tuple[int, ...]:
        """The experts that a device holds, in the order of its slots."""
        pairs = zip(self.device[layer], self.phy2log[layer], strict=True)
        return tuple(expert for where, expert in pairs if where == device)

    def count(self, layer: int) -> np.ndarray:
        """(E,) copies of each expert."""
        return np.bincount(self.phy2log[layer], minlength=self.num_experts_L[layer])

    def log2phy(self, layer: int) -> np.ndarray:
        """(E, most copies) the slots of each expert, in order; -1 where it has fewer."""
        count_E = self.count(layer)
        slots = np.full((len(count_E), count_E.max()), -1, dtype=np.int64)
        order = np.argsort(self.phy2log[layer], kind="stable")
        slots[np.arange(count_E.max())[None] < count_E[:, None]] = order
        return slots

    def moved(self, other: "Placement", *, expert_bytes: float | Sequence[float] = 0.0) -> Moves:
        """What to copy for this placement to become the other; from a device of the same node where one has it.

        Args:
            other: of the same layers, experts, devices and nodes.
            expert_bytes: of one expert, with its optimizer's state where that moves too; or of one of each layer.

        Raises:
            UsageError: they are not of one model and cluster.
        """
        kind = (self.devices, self.nodes, self.num_experts_L)
        if kind != (other.devices, other.nodes, other.num_experts_L):
            got = f"{self.devices} devices with {self.num_experts_L} experts, and {other.devices} with "
            got = f"{got}{other.num_experts_L}"
            fix = "place the same model on the same devices"
            raise _wrong("the placements", got, "be of one model and one cluster", fix)
        size_L = [expert_bytes] * self.num_layers if isinstance(expert_bytes, int | float) else list(expert_bytes)
        copies: list[tuple[int, int, int, int]] = []
        for layer in range(self.num_layers):
            here_GE = self.held(layer)
            for device, expert in np.argwhere(other.held(layer) & ~here_GE).tolist():
                have = np.nonzero(here_GE[:, expert])[0].tolist()
                source = min(have, key=lambda g: (self.node_of(g) != self.node_of(device), g))
                copies.append((layer, expert, source, device))
        return Moves(tuple(copies), float(sum(size_L[layer] for layer, *_ in copies)), other.slots)

    def to_json_dict(self) -> dict[str, object]:
        """The placement as plain JSON values."""
        return {"format": _FORMAT, **plain(self)}

    @classmethod
    def from_json_dict(cls, body: Mapping[str, object], where: str = "placement.json") -> Self:
        """The placement that ``to_json_dict`` gave.

        Raises:
            CheckpointError: not a placement.
            UsageError: a field that is not right.
        """
        if body.get("format") != _FORMAT:
            got, allowed = f"format {body.get('format')!r:.40}", f"have format {_FORMAT!r}"
            fix = "write it with turnout place"
            raise CheckpointError(word(where, got=got, allowed=allowed, where=_WHERE, fix=fix))
        return build(cls, {name: value for name, value in body.items() if name != "format"}, where)

    @property
    def digest(self) -> str:
        """A hash of all of it, which ranks compare before they begin."""
        return hashlib.sha256(json.dumps(self.to_json_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path, *, stated: Mapping[str, object] | None = None) -> None:
        """Writes the JSON with its hash, whole or not at all.

        Args:
            path: the file.
            stated: what is said of it, for ``turnout certify`` to check.
        """
        body = self.to_json_dict() | ({"stated": plain(stated)} if stated is not None else {})
        write_whole(path, json.dumps(sealed(body)) + "\n")

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The placement in a file.

        Raises:
            CheckpointError: there is none, or it was altered.
        """
        return cls.read(path)[0]

    @classmethod
    def read(cls, path: str | Path) -> tuple[Self, dict[str, object] | None]:
        """The placement in a file, and what is said of it there.

        Raises:
            CheckpointError: there is none, or it was altered.
        """
        path = Path(path)

        def refuse(problem: str) -> CheckpointError:
            allowed, fix = (
                "be a placement as it was written",
                "write one with: turnout place TRACE --out placement.json",
            )
            what = "the placement"
            return CheckpointError(word(what, got=f"{path} ({problem})", allowed=allowed, where=_WHERE, fix=fix))

        try:
            body = read_json(path, refuse=refuse, any_link=True)
        except OSError as error:
            raise refuse(error.strerror or "unreadable") from error
        if body.get("format") != _FORMAT:
            raise refuse(f"format {body.get('format')!r:.40}")
        check_seal(body, refuse)
        body.pop("sha256")
        stated = body.pop("stated", None)
        if stated is not None and not isinstance(stated, dict):
            raise refuse("what is stated of it is no object")
        return cls.from_json_dict(body, str(path)), stated


def _wrong(what: str, got: object, allowed: str, fix: str) -> UsageError:
    return UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))
