"""Whether a step of training fits into memory, known before the first one: the machine is not killed by a batch."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.measure import quantity
from turnout.measure.memory import free_memory
from turnout.models import LM
from turnout.train.config import TrainConfig
from turnout.train.data import Batch
from turnout.wrappers import unwrapped

__all__ = ["Need", "check_room", "step_need"]

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
    own = {tensor.untyped_storage().data_ptr() for tensor in (*lm.parameters(), *lm.buffers())}
    kept: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(0)
    with (
        torch.random.fork_rng(devices=[]),
        torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"),
    ):
        done = lm.loss(row.id_BS, row.target_BS, generator=generator)  # what it keeps is alive until here
    # The output layer keeps its gradient, whatever the rows.
    of_head = lm.config.vocab_size * lm.config.width * 4
    share = max(0, sum(kept.values()) - of_head)
    del done
    layers = (_LAYERS_BF16 if dtype == "bf16" else _LAYERS) / lm.config.layers
    logits = row.id_BS.numel() * lm.config.vocab_size * 4
    row_bytes = max(share * (1 + layers), share * layers + logits) + 16 * row.id_BS.numel()
    return Need(3 * trained + of_head + _BESIDE, math.ceil(row_bytes))


def check_room(model: nn.Module, row: Batch, config: TrainConfig, *, free_bytes: int | None = None) -> None:
    """Refuses a batch that does not fit into the memory that is free; only on a CPU, and of an LM, wrapped or not.

    Accelerators say so themselves, and other models have no configuration to count by.

    Args:
        model: that is going to be trained.
        row: a batch of one row, of the length of all.
        config: of the training.
        free_bytes: what there is; None asks the machine.

    Raises:
        UsageError: it does not fit; says which batch would.
    """
    lm, free = unwrapped(model), free_memory() if free_bytes is None else free_bytes
    if free is None or not isinstance(lm, LM) or lm.embedding.device.type != "cpu":
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
    allowed = f"fit into the {quantity(free)}B of memory that are free"
    raise UsageError(word("batch", got=got, allowed=allowed, where="turnout.train", fix=fix))
