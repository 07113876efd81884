"""One small training run, the same for every claim that needs one: the demo's text, minutes become seconds."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import torch

from turnout.models.lm import LM, LMConfig, MoEConfig
from turnout.train.data import TokenSet, prepare, python_text
from turnout.train.loop import TrainConfig, train

VOCAB, SEQ = 512, 128
BYTES, HELD_OUT = 1_000_000, 65_536  # of each domain; tokens that a trial is measured on


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one run came to: held-out bits per byte, and the balance of the load on held-out text."""

    bits_per_byte: float
    max_vio: float


@functools.cache
def text() -> TokenSet:
    """The demo's three domains, a megabyte of each, as tokens of a 512-word vocabulary; prepared once a process."""
    folder = tempfile.mkdtemp(prefix="turnout-claims-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # it lives as long as the process
    return prepare(python_text(limit_bytes=BYTES), Path(folder), vocab_size=VOCAB, held_out=0.1, quiet=True)


def small(moe: MoEConfig | None, *, hidden: int, width: int = 64) -> LMConfig:
    """The network of the trials: 2 layers, heads 16 wide."""
    return LMConfig(
        vocab_size=VOCAB,
        width=width,
        layers=2,
        heads=width // 16,
        kv_heads=width // 32,
        hidden=hidden,
        max_seq=SEQ,
        tie_embeddings=True,
        moe=moe,
    )


def trial(model: LMConfig | LM, *, seed: int, steps: int, teacher: LM | None = None, **train_fields: float) -> Trial:
    """Trains ``model`` from ``seed`` and measures it on the held-out documents at the end.

    Args:
        model: the network, or one that exists, which is trained in place.
        seed: of the weights and of the order of the data.
        steps: optimiser steps of 8 x 128 tokens.
        teacher: whom it learns from too, where ``kd_weight`` says so.
        train_fields: fields of TrainConfig that are the claim's subject (``aux_weight=0.001``).
    """
    fields = {"batch": 8, "seq": SEQ, "lr": 3e-3, "min_lr": 3e-4, "warmup": steps // 10}
    every = {"eval_tokens": HELD_OUT, "eval_every": steps, "checkpoint_every": steps, "log_every": steps}
    config = TrainConfig(steps=steps, seed=seed, **(fields | every | train_fields))  # pyrefly: ignore[bad-argument-type]
    with tempfile.TemporaryDirectory(prefix="turnout-trial-") as out:
        network = LM(model, seed=seed) if isinstance(model, LMConfig) else model
        result = train(network, text(), config, Path(out) / "run", quiet=True, teacher=teacher)
    last = result.evaluations[-1]
    torch.manual_seed(seed)
    return Trial(last["bits_per_byte"], last.get("max_vio") or 0.0)
