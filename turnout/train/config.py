"""TrainConfig and TrainResult: what a training run is told, and what it says at the end."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from turnout.errors import UsageError, nearest, word
from turnout.train.schedule import cosine, wsd
from turnout.types.device import check_name

__all__ = ["TrainConfig", "TrainResult"]

_ONLY = ("all", "router", "adapters")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimisation of one run.

    Args:
        steps: optimizer steps.
        batch: rows of one micro-batch.
        seq: tokens of one row.
        accumulate: micro-batches of one optimizer step.
        lr: the highest learning rate.
        min_lr: the learning rate at the end.
        warmup: steps of linear warm-up.
        schedule: "cosine", or "wsd" (warm-up, stable, decay).
        decay: with "wsd", the share of the steps that decays.
        weight_decay: decoupled; for matrices only, never for norms and biases.
        decay_embeddings: whether the table of embeddings decays too, as other matrices do.
        clip: the largest gradient norm; None leaves gradients alone.
        betas: of AdamW.
        dtype: "bf16" computes in bfloat16 under autocast; weights and optimizer stay in fp32. "auto" is bf16 on a CUDA
            device that computes in it, else fp32.
        aux_weight: weight of the load-balance loss, averaged over the routed layers; 0 only reports it.
        balance_scope: over what the load-balance loss asks for evenness: each "micro"-batch, of all processes together;
            or the whole optimizer "step", which lets a micro-batch of one domain have experts of its own and costs a
            second forward pass where ``accumulate`` is above 1.
        penalty_weight: weight of what routers ask to be minimised themselves (``Routing.penalty``: ReMoE's sparsity,
            SAM's alignment), averaged over the layers that ask, each with the method's own weight inside; 0 only
            reports it.
        z_weight: weight of the router z-loss, averaged over the routed layers; 0 only reports it.
        kd_weight: weight of KL(teacher || student), per token as the loss, where there is a teacher; 0 for none.
        kd_share: the first share of the steps that have one; after it the loss is of the text alone.
        only: what is trained: "all", the "router" of each routed layer, or "adapters"; the rest is frozen.
        rank: with only="adapters", that of each adapter; else None.
        alpha: with only="adapters", what they add is scaled by alpha / rank; None for 2 · rank.
        eval_first: also evaluate before the first step: what a model that exists already can do.
        eval_every: steps between evaluations; there is always one at the end.
        eval_tokens: about how many held-out tokens an evaluation predicts; None takes all.
        checkpoint_every: steps between checkpoints; there is always one at the end.
        keep_checkpoints: how many of them stay.
        log_every: steps between lines of metrics.jsonl, whose losses are means over those steps.
        seed: of the order of the data and of everything drawn in training.
        device: where the model is put: "cpu", "cuda", "cuda:1" or "mps". "auto": a recipe and the command line take
            CUDA where it is there, else the CPU; ``train`` itself leaves the model where it is.

    Raises:
        UsageError: a value out of range.

    >>> TrainConfig(steps=100, batch=8, seq=64, lr=1e-3, warmup=10).lr_at(0)
    0.0001

    Source: Hoffmann et al., 2022, "Training Compute-Optimal Large Language Models", for the usual defaults; balance
    weights of Muennighoff et al., 2024, "OLMoE".
    """

    steps: int
    batch: int
    seq: int
    accumulate: int = 1
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup: int = 0
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: float = 0.2
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    aux_weight: float = 0.01
    balance_scope: Literal["micro", "step"] = "micro"
    penalty_weight: float = 1.0
    z_weight: float = 0.001
    kd_weight: float = 0.0
    kd_share: float = 0.7
    only: Literal["all", "router", "adapters"] = "all"
    rank: int | None = None
    alpha: float | None = None
    eval_first: bool = False
    eval_every: int = 100
    eval_tokens: int | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd"):
            raise nearest(self.schedule, ("cosine", "wsd"), kind="schedule", where="TrainConfig")
        if self.balance_scope not in ("micro", "step"):
            raise nearest(self.balance_scope, ("micro", "step"), kind="balance_scope", where="TrainConfig")
        check_name(self.device, "TrainConfig")
        if self.dtype not in ("auto", "fp32", "bf16"):
            raise nearest(self.dtype, ("auto", "fp32", "bf16"), kind="dtype", where="TrainConfig")
        if self.only not in _ONLY:
            raise nearest(self.only, _ONLY, kind="value of only", where="TrainConfig")
        counts = (
            "steps",
            "batch",
            "seq",
            "accumulate",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        )
        for name in counts:
            self._check(name, getattr(self, name) >= 1, "be 1 or more", 1)
        self._check("lr", 0 < self.lr < math.inf, "be above 0 and finite", 1e-3)
        self._check("min_lr", 0 <= self.min_lr <= self.lr, f"be in [0, lr={self.lr}]", self.lr / 10)
        self._check(
            "warmup",
            0 <= self.warmup <= self.steps,
            f"be between 0 and steps={self.steps}",
            min(max(self.warmup, 0), self.steps),
        )
        self._check("kd_share", 0 < self.kd_share <= 1, "be above 0 and at most 1", 0.7)
        self._check("decay", 0 <= self.decay <= 1, "be in [0, 1]", 0.2)
        self._check("clip", self.clip is None or self.clip > 0, "be above 0, or None", None)
        self._check("betas", all(0 <= beta < 1 for beta in self.betas), "be in [0, 1)", (0.9, 0.95))
        self._check("eval_tokens", self.eval_tokens is None or self.eval_tokens >= 1, "be 1 or more, or None", None)
        self._check("seed", 0 <= self.seed < 2**63, "be in [0, 2^63)", 0)
        adapted, rank = self.only == "adapters", self.rank
        fits = (rank is not None and rank >= 1) if adapted else rank is None
        allowed = "be 1 or more where adapters are trained" if adapted else "go with only=adapters"
        self._check("rank", fits, allowed, 8, fix="" if adapted else "add only=adapters, or leave rank out")
        fits = self.alpha is None or (adapted and 0 < self.alpha < math.inf)
        fix = "leave alpha out, for 2 · rank" if adapted else "add only=adapters, or leave alpha out"
        self._check("alpha", fits, "go with only=adapters, above 0 and finite", None, fix=fix)
        for name in ("weight_decay", "aux_weight", "penalty_weight", "z_weight", "kd_weight"):
            self._check(name, getattr(self, name) >= 0, "be 0 or more", 0.0)

    def _check(self, name: str, fits: bool, allowed: str, instead: object, *, fix: str = "") -> None:
        if not fits:
            fix = fix or f"pass {name}={instead!r}"
            raise UsageError(word(name, got=getattr(self, name), allowed=allowed, where="TrainConfig", fix=fix))

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        sizes = {"steps": self.steps, "lr": self.lr, "min_lr": self.min_lr, "warmup": self.warmup}
        return cosine(step, **sizes) if self.schedule == "cosine" else wsd(step, **sizes, decay=self.decay)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.batch * self.seq * self.accumulate


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run says.

    Args:
        steps: optimizer steps done in all.
        loss: nats per token, the mean over the last log window.
        evaluations: the eval lines of metrics.jsonl, earliest first, those before a resume included.
        tokens_per_s: of training alone, in this process; 0 when there was nothing left to do.
        seconds: training, evaluations and checkpoints, over all the processes that worked on the run.
        peak_memory_bytes: of the accelerator where the model is on one, else of the process; the most of all those that
            worked on the run, 0 where the system does not say.

    >>> TrainResult(1, 7.0, ({"bits_per_byte": 3.5},), 1e3, 2.0, 1).evaluations[-1]["bits_per_byte"]
    3.5

    Source: none; plain bookkeeping.
    """

    steps: int
    loss: float
    evaluations: tuple[Mapping[str, Any], ...]
    tokens_per_s: float
    seconds: float
    peak_memory_bytes: int
