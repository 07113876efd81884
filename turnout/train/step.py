"""One optimizer step: micro-batches, balance losses, clipping, the update, and what routers learn from the load."""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turnout.decide.token import NoisyTopK
from turnout.errors import TrainingError, UsageError, word
from turnout.models import LM, token_loss
from turnout.train.balance import demand
from turnout.train.objective import objective
from turnout.train.place import sent
from turnout.train.taught import check_teacher, divergence, taught_until, told
from turnout.train.team import ALONE, Passed, Team, Weights
from turnout.wrappers import routers_of, takes

__all__ = ["Step", "Window", "adamw", "derived_seed"]

IGNORE = -100
# What our own models call their tables of embeddings.
_TABLES = ("embedding", "positions")


def derived_seed(*parts: int) -> int:
    """A seed for torch, below 2^63, from whole numbers: the same for the same ones, unrelated for others.

    >>> derived_seed(0, 1) == derived_seed(0, 1) != derived_seed(1, 0)
    True

    Source: none; the first bytes of a SHA-256.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def adamw(
    model: nn.Module,
    *,
    weight_decay: float,
    betas: tuple[float, float],
    embeddings: bool = True,
    held: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> torch.optim.AdamW:
    """AdamW over the trained parameters; matrices decay, vectors (norms, biases, also stacked ones) do not.

    Args:
        model: what of it asks for gradients is trained.
        weight_decay: decoupled.
        betas: of Adam.
        embeddings: whether tables of embeddings decay as other matrices do, those that are the output layer too.
        held: what of a parameter is updated here, where processes share it.

    Source: Loshchilov & Hutter, 2019, "Decoupled Weight Decay Regularization".
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name for name, p in trained.items() if p.ndim < 2 or name.endswith("bias")}
    if not embeddings:
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        kept |= {name for name, p in trained.items() if id(p) in tables or name.rpartition(".")[2] in _TABLES}
    groups = [
        {"params": [held(p) for name, p in trained.items() if name not in kept], "weight_decay": weight_decay},
        {"params": [held(p) for name, p in trained.items() if name in kept], "weight_decay": 0.0},
    ]
    fused = {p.device.type for p in trained.values()} <= {"cpu", "cuda"}
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=fused, foreach=not fused)


class Window:
    """Sums over the steps since the last line of metrics.jsonl, kept on the device so that adding waits for nothing.

    Source: none; plain bookkeeping.
    """

    def __init__(self, device: torch.device) -> None:
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Starts anew."""
        # The token loss, the load-balance loss, the z-loss, the penalty; how many steps; the load of each routed layer.
        self.sum_4 = torch.zeros(4, dtype=self._dtype, device=self._device)
        self.steps = 0
        self.load_L: list[Tensor] = []

    def add(self, losses_4: Tensor, load_L: Sequence[Tensor]) -> None:
        """One step more."""
        self.sum_4 += losses_4
        self.steps += 1
        self.load_L = [a + b for a, b in zip(self.load_L, load_L, strict=True)] if self.load_L else list(load_L)

    def means(self) -> tuple[float, float, float, float]:
        """The mean token loss, load-balance loss, z-loss and penalty."""
        loss, aux, z, penalty = (self.sum_4 / max(1, self.steps)).tolist()
        return loss, aux, z, penalty

    def to_json_dict(self) -> dict[str, Any]:
        """The sums, exactly."""
        return {"sum": self.sum_4.tolist(), "steps": self.steps, "load": [load_E.tolist() for load_E in self.load_L]}

    def restore(self, body: dict[str, Any]) -> None:
        """What ``to_json_dict`` gave."""
        known = [*body["sum"], 0.0][:4]  # before there were penalties, three
        self.sum_4 = torch.tensor(known, dtype=self._dtype, device=self._device)
        self.steps = body["steps"]
        self.load_L = [torch.tensor(load_E, device=self._device) for load_E in body["load"]]


@dataclasses.dataclass
class _Sums:
    """What one optimizer step adds up over its micro-batches."""

    losses_4: Tensor
    load_L: list[Tensor]
    tokens: int


class Step:
    """Runs optimizer steps.

    Nothing here waits for an accelerator: a step whose loss or gradient is not finite freezes the weights from then
    on, and ``check`` finds out later. On the CPU, where looking is free, every step is checked before its update.

    Args:
        model: in training mode.
        config: a TrainConfig.
        stream: ``batch(index)`` gives ``id_BS`` and ``target_BS``; micro-batch m of step s has index s·accumulate + m.
        team: who trains together; each takes its rows of every batch, and the step is that of the whole batch.
        teacher: whom the model learns from too, in the steps that ``config`` says.

    Source: none; the usual loop.
    """

    def __init__(
        self, model: nn.Module, config: Any, stream: Any, team: Team = ALONE, teacher: nn.Module | None = None
    ) -> None:
        check_teacher(config, teacher, alone=team is ALONE)
        if config.balance_scope == "step" and config.accumulate > 1 and team.schedules:
            allowed, fix = "be 'micro' where a schedule runs the model", "pass accumulate=1, or balance_scope='micro'"
            raise UsageError(word("balance_scope", got="step", allowed=allowed, where="turnout.train", fix=fix))
        self._teacher, self._taught = teacher, False  # in the step that is going
        self.model, self.config, self.stream, self.team = model, config, stream, team
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.held = {name: team.held(p) for name, p in model.named_parameters() if p.requires_grad}
        self.device = self.parameters[0].device
        decay = {"weight_decay": config.weight_decay, "embeddings": config.decay_embeddings}
        self.optimizer = adamw(model, betas=config.betas, **decay, held=team.held)
        self.window = Window(self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self._draws, self._masks = takes(model, "generator"), takes(model, "attention_mask")
        # Adapters belong beside a model that is as it was, the biases of its routers too.
        self._routers = [] if config.only == "adapters" else _learning(model)
        self._ranks = _ranks(model)
        _warn_of_ones(self._routers)
        self._generator = torch.Generator(self.device) if self._draws else None
        self._lazy = self.device.type == "cuda"
        self._frozen = torch.zeros((), device=self.device)
        self._first_bad = torch.full((), -1, dtype=torch.long, device=self.device)
        self._warned = False

    def run(self, step: int, lr: float) -> None:
        """Does optimizer step ``step``, counted from 0.

        Raises:
            TrainingError: the loss or a gradient is not finite (on an accelerator ``check`` says so, later).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._taught = step < taught_until(self.config)
        sums = self._backward(step)
        held = list(self.held.values())
        self.grad_norm = self.team.norm(held)
        finite = torch.isfinite(self.grad_norm + sums.losses_4[0])
        if self._lazy:
            bad = ~finite
            self._first_bad = torch.where(bad & (self._first_bad < 0), step, self._first_bad)
            self._frozen = torch.maximum(self._frozen, bad.float())
            # Fused AdamW leaves weights and state alone while this is set.
            self.optimizer.found_inf = self._frozen  # pyrefly: ignore[missing-attribute]
        elif not finite:
            raise self._failure(step, lr, float(sums.losses_4[0]))
        if self.config.clip is not None and (self._lazy or self.grad_norm > self.config.clip):
            torch.nn.utils.clip_grads_with_norm_(held, self.config.clip, self.grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._after_step(sums.load_L, sums.tokens)
        self.window.add(sums.losses_4, sums.load_L)

    def check(self) -> None:
        """Waits for the accelerator and stops if any step since the last check was not finite.

        Raises:
            TrainingError: says which step, and what was not finite when it is run again.
        """
        if not self._lazy:
            return
        step = int(self._first_bad)
        if step >= 0:
            # The weights are still those of before that step: run it again, to see what went wrong.
            self.optimizer.zero_grad(set_to_none=True)
            sums = self._backward(step)
            raise self._failure(step, self.config.lr_at(step), float(sums.losses_4[0]))

    def _backward(self, step: int) -> _Sums:
        config = self.config
        first = step * config.accumulate
        batches = [self.stream.batch(first + micro) for micro in range(config.accumulate)]
        # The mean is over the tokens of the whole step: micro-batches with fewer targets must not count for more.
        predicted = max(1, sum(int((batch.target_BS != IGNORE).sum()) for batch in batches))
        real_M = [_real(batch) for batch in batches]
        tokens_M = [b.id_BS.numel() if r is None else int(r.sum()) for b, r in zip(batches, real_M, strict=True)]
        sums = _Sums(torch.zeros(4, device=self.device), [], sum(tokens_M))
        chosen_L = None
        if config.balance_scope == "step" and config.accumulate > 1:
            chosen_L = self._chosen(step, batches)
        for micro, (whole, tokens) in enumerate(zip(batches, tokens_M, strict=True)):
            self.team.passing(last=micro + 1 == len(batches))
            id_BS, target_BS, real_BS, here, seed = self._micro(step, micro, whole)
            weights = Weights(
                config.aux_weight, config.z_weight, predicted, config.accumulate, config.dtype == "bf16",
                config.penalty_weight, sums.tokens, chosen_L,
            )  # fmt: skip
            done = self.team.passed(id_BS, target_BS, real_BS, weights, tokens=tokens, seed=seed)
            done = self._passed(id_BS, target_BS, real_BS, weights, here) if done is None else done
            if not self._warned:
                self._warn(len(done.load_L), done.scored, done.logged)
            sums.losses_4 += done.losses_4
            sums.load_L = [
                a + b for a, b in zip(sums.load_L or map(torch.zeros_like, done.load_L), done.load_L, strict=True)
            ]
        self.team.collect(self.parameters)
        sums.losses_4 = self.team.total(sums.losses_4)
        return sums

    def _micro(self, step: int, micro: int, whole: Any) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
        """This process's rows of a micro-batch, its tokens, and the seed that everything was given anew."""
        batch = self.team.part(whole)
        seed = derived_seed(self.config.seed, step, micro, *self.team.salt)
        torch.manual_seed(seed)
        if self._generator is not None:
            self._generator.manual_seed(seed)
        id_BS, target_BS = (sent(each, self.device) for each in (batch.id_BS, batch.target_BS))
        real_BS = _real(batch)
        tokens = batch.id_BS.numel() if real_BS is None else int(real_BS.sum())
        return id_BS, target_BS, None if real_BS is None else sent(real_BS, self.device), tokens, seed

    @torch.no_grad()
    def _chosen(self, step: int, batches: Sequence[Any]) -> list[Tensor]:
        """Of each routed layer how many tokens of the step chose each expert: a pass without gradients, as it will be
        drawn again.
        """
        found: list[Tensor] = []
        for micro, whole in enumerate(batches):
            id_BS, target_BS, real_BS, _, _ = self._micro(step, micro, whole)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bf16"):
                _, routings, _ = self._nats(id_BS, target_BS, real_BS)
            pairs = zip(routings, self.team.wholes(routings), strict=True)
            some = [demand(r) if w is None else w.chosen_E for r, w in pairs]
            found = [a + b for a, b in zip(found, some, strict=True)] if found else some
        return found

    def _passed(
        self, id_BS: Tensor, target_BS: Tensor, real_BS: Tensor | None, weights: Weights, tokens: int
    ) -> Passed:
        """Forward and backward pass of one micro-batch, of so many tokens."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=weights.bf16):
            nats, routings, apart = self._nats(id_BS, target_BS, real_BS)
        wholes = self.team.wholes(routings)
        loss, done = objective(nats / weights.predicted, routings, wholes, weights, tokens=tokens)
        loss = loss if apart is None else loss + self.config.kd_weight * apart / weights.predicted
        loss.backward()
        return done

    def _nats(
        self, id_BS: Tensor, target_BS: Tensor, real_BS: Tensor | None
    ) -> tuple[Tensor, Sequence[Any], Tensor | None]:
        """The summed token loss, the routings, and how far the model is from its teacher in this step."""
        keywords: dict[str, Any] = {"generator": self._generator} if self._draws else {}
        if real_BS is not None and self._masks:
            keywords["attention_mask"] = real_BS
        if isinstance(self.model, LM) and not self._taught:  # the logits are never whole
            done = self.model.loss(id_BS, target_BS, **keywords)
            return done.nats, done.routings, None
        output = self.model(id_BS, **keywords)
        if real_BS is not None and not self._masks and len(output.routings):
            allowed, fix = "be known to a model that routes", "give its forward a keyword attention_mask, as LM has it"
            raise UsageError(word("padding", got="a padded batch", allowed=allowed, where="turnout.train", fix=fix))
        apart = None
        if self._taught and self._teacher is not None:
            apart = divergence(output.logits_BSV, told(self._teacher, id_BS, real_BS), target_BS)
        return token_loss(output.logits_BSV, target_BS), output.routings, apart

    def _warn(self, routed: int, scored: int, logged: int) -> None:
        self._warned = True
        for name, weight, able in (
            ("aux_weight", self.config.aux_weight, scored),
            ("z_weight", self.config.z_weight, logged),
        ):
            if routed and weight > 0 and able == 0:
                warnings.warn(
                    f"{name}={weight} has no effect: the routers of this model give no scores to balance.", stacklevel=2
                )

    def _after_step(self, load_L: Sequence[Tensor], tokens: int) -> None:
        load_L = self.team.own(load_L)
        if not load_L or not self._routers:
            return
        if len(self._routers) != len(load_L):
            got, fix = f"{len(self._routers)} for {len(load_L)} routings", "name a router once for each layer it routes"
            allowed = "be one for each routing, in order"
            raise UsageError(word("model.routers", got=got, allowed=allowed, where="turnout.train", fix=fix))
        with torch.no_grad():
            if self._ranks > 1:
                counted = torch.tensor(tokens, device=self.device)
                torch.distributed.all_reduce(counted)
                tokens = int(counted)
            for router, load_E in zip(self._routers, load_L, strict=True):
                if hasattr(router, "after_step"):
                    if self._ranks > 1:
                        torch.distributed.all_reduce(load_E := load_E.clone())
                    # A frozen run must not let its biases drift on.
                    moved_E = load_E * (1 - self._frozen.long()) if self._lazy else load_E
                    learn: Any = router.after_step
                    learn(moved_E, **({"num_tokens": tokens} if takes(learn, "num_tokens") else {}))

    def _everywhere(self, names: list[str]) -> list[str]:
        """The names that any process names, in the model's order, then those that are not of this process's part."""
        found = dict.fromkeys(name for said in self.team.said(names) for name in said)
        return [*(name for name in self.held if name in found), *(name for name in found if name not in self.held)]

    def _failure(self, step: int, lr: float, loss: float) -> TrainingError:
        weights = self._everywhere(_non_finite(self.held.items()))
        gradients = self._everywhere(_non_finite((n, p.grad) for n, p in self.held.items() if p.grad is not None))
        found = [f"loss {loss}"]
        found += [f"first non-finite parameter {weights[0]} ({len(weights)} in all)"] if weights else []
        found += [f"first non-finite gradient {gradients[0]} ({len(gradients)} in all)"] if gradients else []
        if not weights and not gradients:
            found.append(f"gradient norm {float(self.grad_norm)}, every single gradient finite")
        return TrainingError(
            word(
                "loss and gradients",
                got=f"at step {step + 1} with lr {lr:.3g}: {'; '.join(found)}",
                allowed="be finite",
                where="turnout.train",
                fix=f"train with a lower lr (lr={self.config.lr / 2:g}), a longer warm-up or a smaller clip",
            )
        )


def _learning(model: nn.Module) -> list[nn.Module]:
    """The routers of the model, wherever it says what they are.

    Raises:
        UsageError: it has some that learn from the load, and nothing says which routing is whose.
    """
    found = routers_of(model)
    deaf = [name for name, module in model.named_modules() if not found and hasattr(type(module), "after_step")]
    if deaf:
        allowed, fix = "name its routers, which learn from the load,", "give the model an attribute routers, in order"
        got = f"one with {deaf[0]} ({len(deaf)} in all), and no attribute routers"
        raise UsageError(word("the model", got=got, allowed=allowed, where="turnout.train", fix=fix))
    return found


def _warn_of_ones(routers: Sequence[Any]) -> None:
    """Says that a router learns nothing from the text where each token's one weight is scaled to 1."""
    for router in routers:
        scaled = getattr(router, "renormalize", isinstance(router, NoisyTopK))
        several = getattr(router, "top_k", None) == 1 and getattr(router, "num_experts", 1) > 1
        if scaled and several and any(p.requires_grad for p in router.parameters()):
            fix = "train with top_k=2, or with another router, such as Switch" if isinstance(router, NoisyTopK) else ""
            said = f"{type(router).__name__} with top_k=1 scales each weight to 1: it learns nothing from the text. "
            warnings.warn(said + f"Nearest fix: {fix or 'pass renormalize=False'}.", stacklevel=4)
            return


def _ranks(model: nn.Module) -> int:
    """How many processes train one model together."""
    together = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
    return torch.distributed.get_world_size() if together else 1


def _real(batch: Any) -> Tensor | None:
    """(B, S) bool, false at padding: as the batch says, else after the last target of each row; None for none."""
    real_BS = getattr(batch, "real_BS", None)
    if real_BS is None:
        real_BS = (batch.target_BS != IGNORE).flip(1).cumsum(1).flip(1) > 0
    return None if bool(real_BS.all()) else real_BS


def _non_finite(tensors: Any) -> list[str]:
    return [name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())]
