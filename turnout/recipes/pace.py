"""How long a run will take on this machine, told before it begins."""

import time

import torch

from turnout.models.lm import LM
from turnout.models.placed import placed
from turnout.recipes.run import Run
from turnout.types.device import find_precision

__all__ = ["estimate_s"]

_HELD_OUT_TOKENS = 300_000  # what a run of the built-in text is measured on at its end
_FORWARD = 0.4  # the part of a step that measuring does again


def estimate_s(run: Run) -> float:
    """About how many seconds the training and the measuring of a run take here, by three steps on random tokens.

    The first warms up, the faster of the other two counts. Preparing the text is not in it.

    Args:
        run: of which neither text nor folder is touched.

    Source: none; a stopwatch.
    """
    train = run.train
    model = placed(LM(run.model, seed=0), train.device)
    device = model.embedding.device
    half = find_precision(train.dtype, device) == "bf16"
    generator = torch.Generator().manual_seed(0)
    id_BS = torch.randint(run.model.vocab_size, (train.batch, train.seq), generator=generator).to(device)
    steps = []
    for _ in range(3):
        began = time.monotonic()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            nats = model.loss(id_BS, id_BS, generator=torch.Generator().manual_seed(0)).nats
        nats.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        float(torch.nn.utils.get_total_norm(grads))  # waits for an accelerator
        steps.append(time.monotonic() - began)
        model.zero_grad()
    evaluated = -(-train.steps // train.eval_every) * (train.eval_tokens or _HELD_OUT_TOKENS) + _HELD_OUT_TOKENS
    measured = _FORWARD * evaluated / (train.batch * train.seq)
    return min(steps[1:]) * (train.steps * train.accumulate + measured)
