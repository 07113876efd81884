"""PHATGOOSE's gates: for one adapter at a time, where it likes to be used; nothing else is trained."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import linear
from turnout.errors import UsageError, word
from turnout.expects import PATH, expects
from turnout.layers import Adapter
from turnout.models.checkpoint.peft import GATES_FILE, read_adapter, write_gates
from turnout.reshape.adapters.attach import attach, detach
from turnout.reshape.adapters.routers import Site
from turnout.train.adapters.router import train_routers
from turnout.types import Report, Routing

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["train_gates"]

_WHERE = "turnout.reshape.train_gates"


class SigmoidGate(nn.Module):
    """One adapter, with the weight sigmoid(<v, u>) for the token u.

    Source: Muqeeth et al., 2024, "Learning to Route Among Specialized Experts for Zero-Shot Generalization".
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_experts = 1
        self.weight = nn.Parameter(torch.zeros(1, width))

    def forward(self, x_TD: Tensor) -> Routing:
        """The routing in which every token takes the adapter."""
        weight_T1 = linear(x_TD, self.weight).sigmoid()
        return Routing.from_dense(weight_T1, mask_TE=torch.ones_like(weight_T1, dtype=torch.bool))


@expects(model=nn.Module, adapter=PATH)
def train_gates(
    model: Model,
    adapter: str | Path,
    batches: Iterable[Any],
    *,
    steps: int = 100,
    rate: float = 5e-3,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    any_base: bool = False,
) -> tuple[Model, Report]:
    """The same model; the gates of one adapter are trained on its own data and written into its folder.

    At every linear map y = W u + sigmoid(<v, u>) * scale * B A u, with v from 0; only the v are trained. Each adapter
    is trained alone, by whoever has its data: ``attach(model, folders, router="phatgoose")`` needs only the folders.

    Args:
        model: the base model, without adapters; it is as it was afterwards.
        adapter: the folder of PEFT, which gains ``phatgoose.safetensors``.
        batches: of the data that the adapter was trained on, taken again from the start when they end; by default
            keywords of a transformers model, with ``labels``.
        steps: optimizer steps, at least 1.
        rate: the learning rate of Adam.
        loss: from model and batch to a scalar; None is ``model(**batch).loss``.
        any_base: as in ``attach``.

    Returns:
        ``model`` itself, and a report: the loss of the first and the last tenth of the steps, and the gates' file.

    Raises:
        UsageError: no batch, or no step.
        CheckpointError: the adapter's folder is not whole.
        TrainingError: the loss is not a number.

    >>> import tempfile
    >>> from turnout.models.checkpoint import PeftAdapter, read_adapter, write_adapter
    >>> place = Path(tempfile.mkdtemp()) / "one"
    >>> write_adapter(place, PeftAdapter("one", None, {"0": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}))
    >>> target = lambda model, x: (model(x) - 1).square().mean()
    >>> _, report = train_gates(nn.Sequential(nn.Linear(8, 4)), place, [torch.ones(3, 8)], steps=5, loss=target)
    >>> report["modules"], read_adapter(place).gate["0"].shape
    (1, torch.Size([8]))

    Source: Muqeeth et al., 2024, "Learning to Route Among Specialized Experts for Zero-Shot Generalization". 100 steps
    of AdamW there, with the adapter's own learning rate, 5e-3.
    """
    found, data = read_adapter(adapter), list(batches)
    if not data or steps < 1:
        got, fix = f"{len(data)} batches and {steps} steps", "pass batches of the adapter's own data, and steps=100"
        raise UsageError(word("batches and steps", got=got, allowed="be at least one each", where=_WHERE, fix=fix))
    attach(model, [found], router=_gated, any_base=any_base)
    try:
        losses = train_routers(model, islice(cycle(data), steps), loss=loss, rate=rate)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Adapter)}
        gate = {name: layer.router.weight.detach()[0].clone() for name, layer in layers.items()}  # pyrefly: ignore
    finally:
        detach(model)
    write_gates(adapter, gate)
    return model, _report(found.name, losses, gate, Path(adapter) / GATES_FILE)


def _gated(site: Site) -> nn.Module:
    return SigmoidGate(site.width)


def _report(name: str, losses: Sequence[float], gate: Mapping[str, Tensor], file: Path) -> Report:
    tenth = max(1, len(losses) // 10)
    values = {
        "adapter": name,
        "steps": len(losses),
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss_last": sum(losses[-tenth:]) / tenth,
        "modules": len(gate),
        "params": sum(one.numel() for one in gate.values()),
        "file": str(file),
    }
    return Report("train_gates", values)
