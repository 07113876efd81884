"""What a model makes of text that nobody looked at: bits per byte, and how much each expert gets of it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.measure.evaluate import IGNORE, rows_mix
from turnout.models import LM
from turnout.recipes.calibration import Calibration
from turnout.reshape.calibrate import blocks, evaluating
from turnout.reshape.resumable import by_batch

__all__ = ["measured"]


@torch.no_grad()
def measured(lm: LM, text: Calibration) -> dict[str, Any] | None:
    """Bits per byte on the held-out rows, and by layer the share of each expert; None where none are held out.

    bits per byte = -sum ln p(token) / ln 2 / bytes, over all tokens of the text but the first of each row. What opens a
    document is seen and not predicted, as in a run's own evaluation.

    Args:
        lm: the model.
        text: its ``held_out`` is read.

    Source: Gao et al., 2020, "The Pile", for bits per byte; documents see what stands before them in their row.
    """
    if not text.held_out or not text.held_out_bytes:
        return None
    nats = torch.zeros((), dtype=torch.float64)
    layers = [layer for layer in range(len(blocks(lm))) if lm.config.is_routed(layer)]
    load_LE = [torch.zeros(lm.config.experts_of(layer), dtype=torch.int64) for layer in layers]

    def add(pair_2BS: Tensor) -> None:
        id_BS, target_BS = pair_2BS.to(lm.embedding.device)
        rows = 1 if rows_mix(lm) else len(id_BS)
        for some_BS, wanted_BS in zip(id_BS.split(rows), target_BS.split(rows), strict=True):
            output = lm(some_BS)
            for logits_SV, target_S in zip(output.logits_BSV, wanted_BS, strict=True):
                nats.add_(F.cross_entropy(logits_SV[:-1].float(), target_S[1:], reduction="sum").cpu().double())
            for row, routing in enumerate(output.routings):
                load_LE[row] += routing.load_E.cpu()

    with evaluating(lm):
        pairs = zip(text.held_out, text.predicted, strict=True)
        pairs_N2BS = [torch.stack([id_BS, id_BS.masked_fill(~text_BS, IGNORE)]) for id_BS, text_BS in pairs]
        sums = {f"load {row}": load_E for row, load_E in enumerate(load_LE)}
        by_batch("held-out text", pairs_N2BS, {"nats": nats, **sums}, add)
    return {
        "bits_per_byte": float(nats) / math.log(2) / text.held_out_bytes,
        "layers": layers,
        "load": [(load_E.double() / load_E.sum().clamp_min(1)).tolist() for load_E in load_LE],
    }
