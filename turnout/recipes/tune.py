"""Train a model on: the recipe for a run that starts from weights that exist, whoever trained them."""

from pathlib import Path
from typing import Literal

import torch

from turnout.models import checkpoint
from turnout.models.checkpoint.own import outline
from turnout.models.lm import LMConfig
from turnout.recipes.certify import model_folder
from turnout.recipes.run import DataConfig, Run
from turnout.recipes.start import look
from turnout.train.config import TrainConfig

__all__ = ["tune"]

# The rate of Llama 2's fine-tuning, at the width of its 7B model; narrower ones take more, but never above the last.
_RATE, _WIDTH, _MOST = 2e-5, 4096, 1e-3
# What little is trained when the rest is frozen takes a higher one.
_TIMES = 10.0
_SEQ, _STEPS, _BATCH, _RANK = 512, 200, 8, 8


def tune(path: str | Path, *, only: Literal["all", "router", "adapters"] = "all") -> Run:
    """A run that starts from a model, dense or sparse: its weights, its tokenizer, a low rate, and a warm-up.

    The highest learning rate is 2e-5 · 4096 / width, at most 1e-3; ten times that where only routers or adapters are
    trained. What is trained is kept in fp32, whatever the folder holds. Embeddings, norms and biases do not decay.

    Args:
        path: a run's output folder, a folder of transformers, one that ``checkpoint.save`` or a conversion wrote, or a
            model of the hub, ``org/name``.
        only: what to train: "all", the "router" of each layer, or "adapters" of rank 8 on linear maps.

    Returns:
        The run, for ``turnout.recipes.execute``; with fields of data and train changed by ``Run.override``.

    Raises:
        TurnoutError: no model there that can be read exactly, or none with a tokenizer that fits it.

    >>> import tempfile
    >>> from turnout.models import LM
    >>> from turnout.train.data import train_tokenizer
    >>> folder = tempfile.mkdtemp()
    >>> checkpoint.save(folder, LM(LMConfig(vocab_size=300, width=8, layers=1, heads=2, max_seq=64)))
    >>> train_tokenizer(["a cat, a cat"], vocab_size=258).save(folder + "/tokenizer.json")
    >>> run = tune(folder)
    >>> run.train.seq, run.model.width, run.start.path == folder
    (64, 8, True)

    Source: Touvron et al., 2023, "Llama 2", for the rate, the decay and the schedule; that the best rate falls as
    1 / width is of Yang et al., 2022, "Tensor Programs V"; ten times it for adapters of Schulman et al., 2025, "LoRA
    Without Regret".
    """
    start = look(path)
    model = checkpoint.peek(model_folder(path), dtype=torch.float32).config
    lr = _rate(model) * (1.0 if only == "all" else _TIMES)
    train = TrainConfig(
        steps=_STEPS,
        batch=_BATCH,
        seq=min(_SEQ, model.max_seq),
        lr=lr,
        min_lr=lr / 10,
        warmup=_STEPS // 10,
        schedule="cosine",
        weight_decay=0.1,
        decay_embeddings=False,
        aux_weight=0.0 if _balanced(model) else 0.01,
        z_weight=0.0 if model.moe is None else 0.001,
        eval_first=True,
        eval_every=50,
        eval_tokens=32_768,
        only=only,
        rank=_RANK if only == "adapters" else None,
    )
    return Run("tune", DataConfig(held_out=0.1, limit_mb=8.0), model, train, start)


def _rate(model: LMConfig) -> float:
    """To two digits, so that what is shown is what is used."""
    return float(f"{min(_MOST, _RATE * _WIDTH / model.width):.1e}")


def _balanced(model: LMConfig) -> bool:
    """Whether there is nothing for a balance loss to do: no routers, or such as balance themselves by a bias."""
    routers = outline(model).routers
    return not routers or any(getattr(router, "bias_E", None) is not None for router in routers)
