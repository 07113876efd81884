"""A bank of experts of which some are in memory: the others are in files, and come when a pass asks for them."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.run import experts_by_slots
from turnout.run.slots import Slots
from turnout.run.swap import ExpertCache, Part
from turnout.types import Cost, ExpertWeights, Packed, PackedWeights, Routing
from turnout.types.called import Called
from turnout.types.weights import GATED, Activation

__all__ = ["OffloadedBank", "bank_parts"]

_WHERE = "turnout.paths.OffloadedBank"


def bank_parts(
    width: int,
    hidden: int,
    *,
    activation: Activation,
    dtype: torch.dtype,
    packs: dict[str, Any] | None = None,
    bias: bool = False,
) -> tuple[Part, ...]:
    """The tensors of one expert as slots hold them: the matrices, or codes and scales, then biases in fp32.

    Args:
        width: D, of the tokens.
        hidden: F.
        activation: as in ``turnout.paths.Bank``.
        dtype: of whole matrices.
        packs: as in ``turnout.paths.PackedBank``; None for whole ones.
        bias: whether both products add a bias.

    >>> [part.name for part in bank_parts(8, 16, activation="swiglu", dtype=torch.bfloat16)]
    ['up', 'down']

    Source: none; plain bookkeeping.
    """
    wide = hidden * (2 if activation in GATED else 1)
    parts: list[Part] = []
    for name, outs, ins in (("up", wide, width), ("down", width, hidden)):
        if packs is None:
            parts.append(Part(name, (outs, ins), dtype))
            continue
        bits, group = packs["bits"], packs["group"] or ins
        code = Part(f"{name}.code", (outs, ins * bits // 8), torch.int8 if bits == 8 else torch.uint8)
        parts += [code, Part(f"{name}.scale", (outs, ins // group), packs.get("scale", torch.bfloat16))]
    if bias:
        parts += [Part("up_bias", (wide,), torch.float32), Part("down_bias", (width,), torch.float32)]
    return tuple(parts)


class OffloadedBank(Called):
    """E feed-forward experts, as ``Bank`` or ``PackedBank``, whose matrices come into slots when they are used.

    Its outputs have the bits of the bank that holds all of them. It is run, and not trained, written or brought to
    another dtype: its experts are in files.

    Args:
        cache: the slots, of all layers of a model.
        layer: which of the cache's layers this is.
        width: D, of the tokens.
        hidden: F, of each expert.
        activation: as in ``Bank``.
        packs: as in ``PackedBank``; None for whole matrices.
        levels: (16,) each, what codes of four bits stand for in both matrices, where that is said.
        up_bias: (E, H), in memory; None without biases.
        down_bias: (E, D), likewise.

    >>> from turnout.types import CacheShape, Decision
    >>> class Zeros:
    ...     parts = bank_parts(8, 16, activation="swiglu", dtype=torch.float32)
    ...     def read(self, layer, expert, into):
    ...         return sum(tensor.zero_().nbytes for tensor in into)
    ...     def close(self):
    ...         pass
    >>> class First:
    ...     def init(self, sizes):
    ...         return ()
    ...     def update(self, held, access):
    ...         wanted = tuple((access.layer, expert) for expert in access.experts)
    ...         return wanted, Decision(evict=held, fetch=wanted)
    >>> bank = OffloadedBank(ExpertCache(Zeros(), CacheShape(1, 4, 2), First()), 0, width=8, hidden=16)
    >>> bank(torch.ones(1, 8), Routing.from_topk(torch.tensor([[3]]), torch.ones(1, 1), num_experts=4)).shape
    torch.Size([1, 8])

    Source: Eliseev & Mazur, 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading".
    """

    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    up_levels: Tensor | None
    down_levels: Tensor | None

    def __init__(
        self,
        cache: ExpertCache,
        layer: int,
        *,
        width: int,
        hidden: int,
        activation: Activation = "swiglu",
        packs: dict[str, Any] | None = None,
        levels: tuple[Tensor, Tensor] | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.cache, self.layer, self.num_experts = cache, layer, cache.num_experts_L[layer]
        self.width, self.hidden, self.activation, self.packs = width, hidden, activation, packs
        for name, bias in (("up_bias", up_bias), ("down_bias", down_bias)):
            setattr(self, name, None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        for name, level in zip(("up_levels", "down_levels"), levels or (None, None), strict=True):
            self.register_buffer(name, level)

    def stacks(self) -> tuple[Tensor | Packed, Tensor | Packed]:
        """(S, H, D) and (S, D, F), the matrices of all slots."""
        return self._pair(self.cache.stacks)

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """(S, H) and (S, D), the biases of all slots in fp32; None without any."""
        found = {part.name: stack for part, stack in zip(self.cache.parts, self.cache.stacks, strict=True)}
        return found.get("up_bias"), found.get("down_bias")

    def _pair(self, stacks: tuple[Tensor, ...]) -> tuple[Tensor | Packed, Tensor | Packed]:
        if self.packs is None:
            return stacks[0], stacks[1]
        group, bits = self.packs["group"], self.packs["bits"]
        up, down = (
            Packed(code, scale, group or inner, bits, levels)
            for code, scale, inner, levels in (
                (*stacks[:2], self.width, self.up_levels),
                (*stacks[2:4], self.hidden, self.down_levels),
            )
        )
        return up, down

    def _weights(self, stacks: tuple[Tensor, ...], *, bias: bool) -> ExpertWeights | PackedWeights:
        up, down = self._pair(stacks)
        biases = (self.up_bias, self.down_bias) if bias else (None, None)
        if isinstance(up, Packed) and isinstance(down, Packed):
            return PackedWeights(up, down, *biases, self.activation)
        assert isinstance(up, Tensor) and isinstance(down, Tensor)
        return ExpertWeights(up.transpose(1, 2), down.transpose(1, 2), *biases, activation=self.activation)

    def slots(self) -> Slots:
        """The experts as executors see them, for one pass."""
        cache = self.cache

        def take(experts: list[int], more: bool) -> list[int]:
            return cache.take(self.layer, experts, more=more)

        outline = cache.outline
        if self.num_experts < cache.shape.experts:
            outline = tuple(stack[: self.num_experts] for stack in outline)
        like, held = self._weights(outline, bias=True), self._weights(cache.stacks, bias=False)
        return Slots(like, held, cache.limit, take)

    def forward(self, x_TD: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        """(T, D), each token's weighted sum of its experts' outputs.

        Args:
            x_TD: (T, D), the tokens.
            routing: which experts each takes, and with what weight.
            backend: "auto" or "sort".

        Raises:
            UsageError: another backend, gradients that are asked for, a device that is no CPU, or a closed cache.
            TurnoutError: an expert cannot be read.
        """
        with self.cache.turn():
            return experts_by_slots(x_TD, routing, self.slots(), backend=backend)

    def merged(self, x_TD: Tensor, routing: Routing, sequence_T: Tensor) -> Tensor:
        """Refused: an average expert takes all of them at once.

        Raises:
            UsageError: always.
        """
        raise self.refusal("averaged")

    def cost(self, tokens: int, entries: float) -> Cost:
        """What a forward pass over ``tokens`` tokens with ``entries`` routed entries takes (products only)."""
        wide = self.hidden * (2 if self.activation in GATED else 1)
        products = wide * self.width + self.hidden * self.width
        each = products + sum(parameter[0].numel() for parameter in self.parameters())
        return Cost(
            params=each * self.num_experts,
            params_active=round(each * entries / max(tokens, 1)),
            flops=2.0 * entries * products,
        )

    def check(self, fn: Any) -> None:
        """Refuses what would bring the experts to another dtype or device, before anything is brought there.

        Raises:
            UsageError: it would.
        """
        for stack in self.cache.stacks:
            probe = stack.new_empty(0)
            after = fn(probe)
            if after.dtype != probe.dtype or after.device != probe.device:
                raise self.refusal(f"brought to {after.dtype} on {after.device}")

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.check(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise self.refusal("written, or copied as a state dict")

    def refusal(self, what: str) -> UsageError:
        """What is to be raised where all experts would be needed; ``what`` follows "to be"."""
        fix = "read the model again without expert_memory"
        got = "a bank whose experts are in files"
        return UsageError(word("the experts", got=got, allowed=f"be in memory to be {what}", where=_WHERE, fix=fix))

    def __getattr__(self, name: str) -> Any:
        """What other banks have of all experts is refused by name.

        Raises:
            UsageError: the matrices of all experts were asked for.
        """
        if name in ("up", "down", "up_EDH", "down_EFD", "weights"):
            raise self.refusal(f"looked at ({name})")
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        sizes = f"{self.num_experts}, width={self.width}, hidden={self.hidden}, activation={self.activation!r}"
        return f"{sizes}, {len(self.cache.stacks[0])} slots for all layers"
