"""Checkpoints that many processes write and read: whole tensors, dealt out to the ranks that write them.

    checkpoints/step-00000100/model-00001-of-00004.safetensors        what rank 0 wrote, and so on
                              optimizer-00001-of-00004.safetensors
                              state.json, manifest.json               as in ``turnout.train.state``

Every tensor is in one piece in one file, by its name in the whole model. So a checkpoint knows nothing of the layout
that it was written under, and any other goes on from it: more ranks, fewer, or one process alone. While one is written,
a rank holds the tensors that it writes and one more; while it is read, one more than its own. The files of
torch.distributed.checkpoint are sharded too, but where each piece lies is told by a pickle there, which runs what a
stranger has put into it.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turnout import errors
from turnout.errors import TurnoutError
from turnout.reading import read_json
from turnout.run.ranks.exchange import own_part
from turnout.run.ranks.expert_parallel import Owners
from turnout.run.ranks.whole import of_experts, picked, quiet
from turnout.storage import digest, read_error, write_whole
from turnout.train import state as checkpoints
from turnout.wrappers import stripped

__all__ = ["Piece", "Writers", "gather", "load", "pieces", "save"]


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A named tensor of a model, of which this process holds a part.

    Args:
        name: as in the whole model.
        tensor: what the model holds: a DTensor, or a plain tensor that is the same on every process.
        leaf: what of it an optimizer updates here; None for buffers and what is frozen.
        owners: what its rows are of, where they are the slots of experts that processes share.

    Source: none; plain bookkeeping.
    """

    name: str
    tensor: Tensor
    leaf: nn.Parameter | None = None
    owners: Owners | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = tuple(self.tensor.shape)
        return shape if self.owners is None or self.owners.in_order else (self.owners.num_experts, *shape[1:])

    def whole(self, part: Tensor | None = None) -> Tensor:
        """All of it, or all of what is kept of each of its numbers, such as a moment; all that hold a part call it."""
        from torch.distributed.tensor import DTensor

        held = self.tensor.detach()
        if isinstance(held, DTensor):
            if part is not None:
                like = {"shape": held.shape, "stride": held.stride()}
                held = DTensor.from_local(part, held.device_mesh, held.placements, run_check=False, **like)
            held = quiet(held.full_tensor)
        elif part is not None:
            held = part
        return picked(held, self.owners)

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of what is whole."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        held = self.tensor
        if not isinstance(held, DTensor):
            return whole
        if self.owners is not None and not self.owners.in_order:
            whole = whole[self.owners.expert_S.to(whole.device)]
        whole = whole.to(held.device).contiguous()
        return own_part(distribute_tensor(whole, held.device_mesh, held.placements, src_data_rank=None))


class Writers(Protocol):
    """Who writes together; a ``turnout.train.team.Team`` that says who holds the same tensors.

    Source: none; plain bookkeeping.
    """

    @property
    def first(self) -> bool:
        """Whether this process is the one that gives a checkpoint its name."""

    @property
    def holders(self) -> tuple[int, ...]:
        """The ranks that share the tensors that this one has a part of."""

    @property
    def rank(self) -> int:
        """Of this process, among all."""

    def lead(self, action: Callable[[], Any]) -> Any:
        """What the first process gets by doing this, plain JSON, on every one."""

    def said(self, value: Any) -> list[Any]:
        """What each process says, plain JSON."""


def pieces(model: nn.Module, leaves: Mapping[int, nn.Parameter]) -> list[Piece]:
    """The parameters and persistent buffers of a model that is spread, tied ones once, in the model's order.

    Args:
        model: spread or not.
        leaves: id of a parameter -> what of it is updated here.

    Source: none; plain bookkeeping.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP2 keeps what it gathered for an evaluation
            module.reshard()  # pyrefly: ignore[not-callable]
    owners = of_experts(model)
    found = [Piece(name, p, leaves.get(id(p)), owners.get(name)) for name, p in model.named_parameters()]
    lasting = model.state_dict().keys()
    return found + [Piece(name, buffer) for name, buffer in model.named_buffers() if name in lasting]


def gather(held: Sequence[Piece], into: nn.Module | None) -> None:
    """Copies every whole tensor into a model in one piece.

    Args:
        held: of this process; all that hold parts call this.
        into: the model, or None for a process that only lends its parts.

    Source: none; plain bookkeeping.
    """
    places = {} if into is None else dict([*into.named_parameters(), *into.named_buffers()])
    for piece in held:
        whole = piece.whole()
        if into is not None:
            with torch.no_grad():
                places[piece.name].copy_(whole)


def save(
    writers: Writers,
    folder: Path,
    step: int,
    held: Sequence[Piece],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    keep: int,
) -> None:
    """Writes a whole checkpoint of this step, then removes all but the last ``keep``; all ranks call it.

    Raises:
        StorageError: a rank could not write; on all of them, and earlier checkpoints are untouched.
    """
    path = folder / checkpoints.checkpoint_name(step)
    part = path.with_name(path.name + ".part")

    def begin() -> None:
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        except OSError as error:
            raise read_error(error, path, "turnout.train") from error

    def publish() -> None:
        body = {"step": step, "optimizer": {}, **state}
        checkpoints.publish(folder, step, {name: entry for one in said for name, entry in one.items()}, body, keep=keep)

    writers.lead(begin)
    said = writers.said(_written(writers, part, held, optimizer))
    failed = next((one["error"] for one in said if "error" in one), None)
    if failed is not None:
        writers.lead(lambda: shutil.rmtree(part, ignore_errors=True))
        raise getattr(errors, failed[0])(failed[1])
    writers.lead(publish)


def _written(writers: Writers, part: Path, held: Sequence[Piece], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Gathers every tensor, keeps and writes this rank's share; size and digest of each file, or what went wrong."""
    from safetensors.torch import save_file

    share, bytes_of = writers.holders.index(writers.rank), [0] * len(writers.holders)
    weights, moments = dict[str, Tensor](), dict[str, Tensor]()
    for piece in held:
        mine = min(range(len(bytes_of)), key=bytes_of.__getitem__)
        bytes_of[mine] += piece.tensor.numel() * piece.tensor.element_size()
        kept = {piece.name: piece.whole()}
        for item, value in optimizer.state.get(piece.leaf, {}).items() if piece.leaf is not None else ():
            kept[f"{piece.name}|{item}"] = value if item == "step" else piece.whole(value)
        if mine == share:
            ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in kept.items()}
            weights[piece.name] = ready.pop(piece.name)
            moments |= ready
    found, world = dict[str, Any](), len(writers.said(None))
    try:
        for kind, tensors in (("model", weights), ("optimizer", moments)):
            name = checkpoints.part_name(kind, writers.rank, world)
            marks = {"format": checkpoints.FORMATS[1]}
            write_whole(part / name, lambda aside, t=tensors, m=marks: save_file(t, aside, metadata=m))
            found[name] = {"bytes": (part / name).stat().st_size, "sha256": digest(part / name)}
    except (OSError, TurnoutError) as error:
        known = error if isinstance(error, TurnoutError) else read_error(error, part, "turnout.train")
        return {"error": [type(known).__name__, str(known)]}
    return found


def load(
    path: Path,
    held: Sequence[Piece],
    optimizer: torch.optim.Optimizer,
    *,
    check: Callable[[Mapping[str, Any]], None] = lambda body: None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """Puts a whole checkpoint, of any number of processes, into this process's parts; as ``turnout.train.state.load``.

    Args:
        path: of the checkpoint.
        held: of this process; a name twice where it holds two copies.
        optimizer: over their leaves.
        check: as for ``turnout.train.state.load``.
        shapes: of the whole model's tensors; None where this process has a part of each.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    body = read_json(path / "state.json", finite=False)
    check(body)
    known: dict[str, list[Piece]] = {}
    for piece in held:
        known.setdefault(piece.name, []).append(piece)
    shapes = {name: ones[0].shape for name, ones in known.items()} if shapes is None else shapes

    def plain(name: str) -> str:
        return name if name in shapes else stripped(name)

    weights = {plain(name): place for name, place in checkpoints.places(path, "model").items()}
    checkpoints.check_fit(path, {name: shape for name, (_, _, shape) in weights.items()}, shapes)
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        for name, ones in known.items():
            whole = checkpoints.read(weights[name])
            for piece in ones:
                own_part(piece.tensor.detach()).copy_(piece.part(whole))
        for key, place in checkpoints.places(path, "optimizer").items():
            name, _, item = key.rpartition("|")
            for piece in known.get(plain(name), ()):
                if piece.leaf is not None:
                    value = checkpoints.read(place)
                    if item != "step":
                        value = torch.empty_like(piece.leaf).copy_(piece.part(value))
                    states.setdefault(index[id(piece.leaf)], {})[item] = value.detach()
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return body
