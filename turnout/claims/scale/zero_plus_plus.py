"""Claim: parameters gathered in int8 and gradients reduced in int4 cut what travels by four, at no cost in quality."""

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import score
from turnout.claims.trial import SEQ, VOCAB, text
from turnout.models.lm import LM, LMConfig
from turnout.run.ranks.zero_plus_plus import pack, unpack
from turnout.train.data import Stream
from turnout.train.step import adamw

_RANKS, _ROWS, _STEPS, _LR = 4, 2, 60, 3e-3
_WEIGHT_BLOCK, _GRADIENT_BLOCK = 256, 128
_WHOLE = 1 << 30  # a block that everything fits into


def zero_plus_plus() -> Claim:
    """Blockwise int8 gathers and int4 sums of four ranks' gradients learn as whole ones do, for a quarter of the bytes.

    The off arm gives every tensor one scale in place of one for each block. Ranks are played one after the other; that
    real ones send these bytes is tested on gloo.

    >>> zero_plus_plus().off
    'one scale a tensor'

    Source: Wang et al., 2023, "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training".
    """
    off, bits = "one scale a tensor", "held-out bits per byte"
    return Claim(
        name="zero_plus_plus",
        statement="Blockwise int8 gathers, a second copy in the node and int4 sums send a quarter, and learn as well.",
        source="Wang et al., 2023, ZeRO++",
        off=off,
        switched={"weights": "weights, one scale", "gradients": "gradients, one scale", "bytes": "bytes, whole"},
        rows=(
            Row("error of gathered weights, relative", "below", "weights", "weights, one scale", off),
            Row("error of summed gradients, relative", "below", "gradients", "gradients, one scale", off),
            Row(
                "bytes between nodes, relative to ZeRO-3 in bf16",
                "within",
                "bytes",
                "bytes, whole",
                "ZeRO-3",
                bound=0.27,
                headline=True,
            ),
            Row(
                bits, "no_worse", "loss", "loss, whole", "whole numbers", margin=0.02, why="a few steps", headline=True
            ),
        ),
        measure=_measure,
        seconds=15,
        note=f"{_RANKS} ranks of {_ROWS} x {SEQ} tokens, {_STEPS} steps, 2 layers of width 64; no time is measured",
        simulated=True,
    )


def _measure(seed: int) -> Values:
    whole, _ = _trained(seed, wire=False)
    learnt, errors = _trained(seed, wire=True)
    number = 1 << 16
    sent = sum(pack(torch.zeros(1, number), *how).numel() for how in ((8, _WEIGHT_BLOCK), (4, _GRADIENT_BLOCK)))
    bytes_ = {"bytes": sent / (3 * 2 * number), "bytes, whole": 1.0}
    return {"loss": score(learnt), "loss, whole": score(whole), **errors, **bytes_}


def _rounded(x: Tensor, bits: int, block: int) -> Tensor:
    block = min(block, x.numel() + x.numel() % 2)
    return unpack(pack(x.reshape(1, -1), bits, block), x.numel(), bits, block).view_as(x)


class _Errors:
    """Sums of squares of what rounding does to tensors, by name."""

    def __init__(self) -> None:
        self.off = dict[str, float]()
        self.of = dict[str, float]()

    def sent(self, what: str, x: Tensor, bits: int, block: int) -> Tensor:
        """The tensor as it arrives; what it would be with one scale is looked at beside."""
        rounded = _rounded(x, bits, block)
        for name, other in ((what, rounded), (f"{what}, one scale", _rounded(x, bits, _WHOLE))):
            self.off[name] = self.off.get(name, 0.0) + float((other - x).square().sum())
            self.of[name] = self.of.get(name, 0.0) + float(x.square().sum())
        return rounded

    def relative(self) -> dict[str, float]:
        """Root mean square errors over root mean squares."""
        return {name: (off / self.of[name]) ** 0.5 for name, off in self.off.items()}


def _trained(seed: int, *, wire: bool) -> tuple[LM, dict[str, float]]:
    """A model after its steps, and the mean relative errors of its weights and gradients on the wire."""
    config = LMConfig(vocab_size=VOCAB, width=64, layers=2, heads=4, hidden=176, max_seq=SEQ, tie_embeddings=True)
    lm = LM(config, seed=seed).train()
    stream = Stream(text().train, batch=_RANKS * _ROWS, seq=SEQ, seed=seed)
    adam, errors = adamw(lm, weight_decay=0.1, betas=(0.9, 0.95)), _Errors()
    for step in range(_STEPS):
        for group in adam.param_groups:
            group["lr"] = _LR * min(1.0, (step + 1) / 10) * (1 - step / _STEPS)
        batch = stream.batch(step)
        if wire:
            _step(lm, batch.id_BS, batch.target_BS, errors)
        else:
            (lm.loss(batch.id_BS, batch.target_BS).nats / batch.target_BS.numel()).backward()
        adam.step()
        adam.zero_grad()
    return lm, errors.relative()


def _step(lm: LM, id_BS: Tensor, target_BS: Tensor, errors: _Errors) -> None:
    """Leaves in ``grad`` what the ranks' gradients sum up to, of weights as they were gathered."""
    parameters = list(lm.parameters())
    stored = [p.detach().clone() for p in parameters]
    for parameter, whole in zip(parameters, stored, strict=True):
        parameter.data = errors.sent("weights", whole, 8, _WEIGHT_BLOCK)
    sums = [torch.zeros_like(p) for p in stored]
    for rank in range(_RANKS):
        rows = slice(rank * _ROWS, (rank + 1) * _ROWS)
        loss = lm.loss(id_BS[rows], target_BS[rows]).nats / target_BS.numel()
        gradients = torch.autograd.grad(loss, parameters)
        sums = [a + errors.sent("gradients", b, 4, _GRADIENT_BLOCK) for a, b in zip(sums, gradients, strict=True)]
    for parameter, whole, total in zip(parameters, stored, sums, strict=True):
        parameter.data, parameter.grad = whole, total
