"""Cluster: the devices that a plan is made for, what they hold and do, and what joins them."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Self

from turnout.errors import CheckpointError, UsageError, word
from turnout.fields import build
from turnout.reading import read_text

__all__ = ["Cluster"]

_WHERE = "turnout.types.Cluster"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of like devices: a fast wire inside a node, a slower one between nodes. A message of n bytes takes
    latency + n / rate on its wire.

    Args:
        nodes: how many machines.
        devices_per_node: how many devices in each; device g is in node g // devices_per_node.
        memory_bytes: of a device.
        flops_per_s: what a device does of matrix products in practice, not on paper.
        block_s: what a block takes whatever its size, of a forward pass and of each half of a backward pass: starting
            kernels, the interpreter.
        memory_bytes_per_s: how fast a device reads its memory.
        intra_bytes_per_s: of one device's wire inside its node, each way.
        intra_latency_s: of a message inside a node.
        inter_bytes_per_s: of one device's share of the wire between nodes, each way.
        inter_latency_s: of a message between nodes.
        hides: how much of a message's time computing can hide, from 0, where the same cores do both, to 1.
        host_bytes: memory of a node's host, for what is moved off its devices; 0 for none.
        host_bytes_per_s: between a device and its host.
        disk_bytes: of a node; 0 for none.
        disk_bytes_per_s: between host and disk.
        price_per_device_hour: in any currency; 0 where it does not matter.
        name: for people.

    Raises:
        UsageError: a number that is not positive, or below 0 where 0 means none.

    >>> Cluster(nodes=2, devices_per_node=8, memory_bytes=80e9, flops_per_s=4e14).devices
    16

    Source: none; the alpha-beta model of Hockney, 1994, on two levels.
    """

    nodes: int = 1
    devices_per_node: int = 1
    memory_bytes: float = 80e9
    flops_per_s: float = 4e14
    block_s: float = 0.0
    memory_bytes_per_s: float = 3e12
    intra_bytes_per_s: float = 300e9
    intra_latency_s: float = 1e-5
    inter_bytes_per_s: float = 25e9
    inter_latency_s: float = 3e-5
    hides: float = 1.0
    host_bytes: float = 0.0
    host_bytes_per_s: float = 25e9
    disk_bytes: float = 0.0
    disk_bytes_per_s: float = 3e9
    price_per_device_hour: float = 0.0
    name: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            may_be_none = (
                field.name in ("host_bytes", "disk_bytes", "price_per_device_hour", "block_s", "hides")
                or "latency" in field.name
            )
            whole = field.name in ("nodes", "devices_per_node")
            right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not right or not (value >= 0 if may_be_none else value > 0) or value == float("inf"):
                allowed = f"be a {'whole ' if whole else ''}number {'of at least' if may_be_none else 'above'} 0"
                fix = f"write {field.name} = {field.default}, or what your machine has"
                raise UsageError(word(field.name, got=value, allowed=allowed, where=_WHERE, fix=fix))

        if self.hides > 1:
            allowed, fix = "be from 0 to 1", "write hides = 1.0 where wires work beside the chip"
            raise UsageError(word("hides", got=self.hides, allowed=allowed, where=_WHERE, fix=fix))

    @property
    def devices(self) -> int:
        """How many in all."""
        return self.nodes * self.devices_per_node

    def node_of(self, device: int) -> int:
        """The node that a device is in."""
        return device // self.devices_per_node

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The cluster of a TOML file whose keys are the fields, at the top or in a table ``[cluster]``.

        Raises:
            CheckpointError: no such file, or no TOML.
            UnknownNameError: a key that is no field.
            UsageError: a value that is not right.
        """
        path = Path(path)

        def refuse(problem: str) -> CheckpointError:
            allowed, fix = (
                "be a TOML file of a cluster's fields",
                "write nodes = 1 and what follows, see docs/guides/scale.md",
            )
            return CheckpointError(
                word("the cluster", got=f"{path} ({problem})", allowed=allowed, where=_WHERE, fix=fix)
            )

        try:
            body = tomllib.loads(read_text(path, refuse=refuse))
        except OSError as error:
            raise refuse(error.strerror or "unreadable") from error
        except tomllib.TOMLDecodeError as error:
            raise refuse(str(error)) from error
        return build(cls, body.get("cluster", body), str(path))
