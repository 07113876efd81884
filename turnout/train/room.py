"""Whether a step of training fits into memory, known before the first one: the machine is not killed by a batch."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from turnout.errors import TrainingError, UsageError, word
from turnout.measure import quantity
from turnout.measure.memory import free_on
from turnout.models import LM
from turnout.train.config import TrainConfig
from turnout.train.data import Batch
from turnout.types.device import shown
from turnout.wrappers import unwrapped

__all__ = ["Need", "check_room", "out_of_memory", "step_need"]

# Beside what is kept for the backward pass: what the layer at work takes, in layers' worth of it (in bf16, casts of it
# too), and what allocators and threads keep of what was let go. Measured: docs/log.md.
_LAYERS, _LAYERS_BF16, _BESIDE = 2.25, 4.0, 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Need:
    """The memory that training takes on top of the model itself.

    Args:
        fixed_bytes: whatever the batch: gradients, and the state of AdamW.
        row_bytes: more for each row of a batch.

    >>> Need(100, 10).rows(free_bytes=145), Need(100, 10).bytes(4)
    (4, 140)

    Source: none; a sum.
    """

    fixed_bytes: int
    row_bytes: int

    def bytes(self, rows: int) -> int:
        """For a batch of so many rows."""
        return self.fixed_bytes + rows * self.row_bytes

    def rows(self, free_bytes: int) -> int:
        """The most rows that fit."""
        return max(0, (free_bytes - self.fixed_bytes) // max(1, self.row_bytes))


def step_need(lm: LM, row: Batch, *, dtype: str = "fp32") -> Need:
    """What optimizer steps and evaluations on rows like this one take, from what the model keeps of one.

    3 P for gradients and AdamW, P the bytes of what is trained; for each row what its forward pass keeps for the
    backward pass, which is counted on one, times 1 + 2.25 / layers (bf16: 1 + 4 / layers); or all its logits, when
    they are more; and 64 MiB. On a CPU that was 1.03 to 1.25 times the peak for steps of 0.4 to 1.5 GB.

    Args:
        lm: in training mode; left as it is.
        row: a batch of one row.
        dtype: "bf16" computes under autocast.

    Source: none; counted and measured.
    """
    trained = sum(p.numel() * p.element_size() for p in lm.parameters() if p.requires_grad)
    logits = row.id_BS.numel() * lm.config.vocab_size * 4
    layers = (_LAYERS_BF16 if dtype == "bf16" else _LAYERS) / lm.config.layers
    one = _kept(lm, row, 1, dtype)
    if lm.embedding.device.type != "cpu":
        # There the logits are held whole, in fp32, with their gradient in two dtypes; and what does not grow with the
        # rows, weights cast to bf16, is told apart by a second row.
        more = _kept(lm, row, 2, dtype) - one
        row_bytes = max(0, more - logits) * (1 + layers) + 3 * logits + 16 * row.id_BS.numel()
        return Need(3 * trained + max(0, one - more) + _BESIDE, math.ceil(row_bytes))
    # The output layer keeps its gradient, whatever the rows.
    of_head = lm.config.vocab_size * lm.config.width * 4
    share = max(0, one - of_head)
    row_bytes = max(share * (1 + layers), share * layers + logits) + 16 * row.id_BS.numel()
    return Need(3 * trained + of_head + _BESIDE, math.ceil(row_bytes))


def _kept(lm: LM, row: Batch, rows: int, dtype: str) -> int:
    """The bytes that a forward pass of so many rows keeps for the backward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*lm.parameters(), *lm.buffers())}
    kept: dict[int, int] = {}
    device = lm.embedding.device

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator(device).manual_seed(0)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"),
    ):
        id_BS, target_BS = (each.expand(rows, -1).to(device) for each in (row.id_BS, row.target_BS))
        done = lm.loss(id_BS, target_BS, generator=generator)  # what it keeps is alive until here
    del done
    return sum(kept.values())


def check_room(model: nn.Module, row: Batch, config: TrainConfig, *, free_bytes: int | None = None) -> None:
    """Refuses a batch that does not fit into the memory that is free where the model is; of an LM, wrapped or not.

    Other models have no configuration to count by. Here on an accelerator it is an estimate that nothing has measured
    yet; what it lets through and does not fit ends as ``out_of_memory`` words it.

    Args:
        model: that is going to be trained.
        row: a batch of one row, of the length of all.
        config: of the training.
        free_bytes: what there is; None asks the machine.

    Raises:
        UsageError: it does not fit; says which batch would.
    """
    lm = unwrapped(model)
    if not isinstance(lm, LM):
        return
    device = lm.embedding.device
    free = free_on(device) if free_bytes is None else free_bytes
    if free is None:
        return
    need = step_need(lm, row, dtype=config.dtype)
    if need.bytes(config.batch) <= free:
        return
    most = need.rows(free)
    got = f"{config.batch} rows of {config.seq} tokens, which take about {quantity(need.bytes(config.batch))}B"
    fix = "train a smaller model or a shorter seq, or use a larger machine"
    if most:
        more = -(-config.batch * config.accumulate // most)
        fix = f"pass batch={most}; with accumulate={more} as well a step has as many tokens as before"
    on = "" if device.type == "cpu" else f" on {shown(device)}"
    allowed = f"fit into the {quantity(free)}B of memory that are free{on}"
    raise UsageError(word("batch", got=got, allowed=allowed, where="turnout.train", fix=fix))


def out_of_memory(error: torch.OutOfMemoryError, config: TrainConfig, device: torch.device) -> TrainingError:
    """The error for a step that an accelerator had no room for."""
    got = f"batch={config.batch}, seq={config.seq} ({str(error).strip().splitlines()[0]})"
    fix = "train a smaller model or a shorter seq, or on another device"
    if config.batch > 1:
        half = config.batch // 2
        fix = f"pass batch={half}, with accumulate={-(-config.batch * config.accumulate // half)} for as many tokens"
        fix += " a step: that is another run, in another --out"
    allowed = f"fit into the memory of {shown(device)}"
    return TrainingError(word("a step", got=got, allowed=allowed, where="turnout.train", fix=fix))
