"""What a compiled step's tables say of a language model."""

import contextlib
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from turnout.decide import token
from turnout.errors import ShapeError, word
from turnout.layers import MoE
from turnout.models.attention import Attention, LatentAttention, Projection
from turnout.models.block import Block
from turnout.models.lm import LM
from turnout.models.norm import LayerNorm, Norm
from turnout.paths import Bank, FeedForward, OffloadedBank, PackedBank, PackedFeedForward, PackedLinear, PackedWeight
from turnout.run.compiled.curves import ACTIVATIONS
from turnout.run.compiled.kept import Kept
from turnout.run.compiled.tables import CODES, COLUMNS, LAYER, MODEL, NORM
from turnout.run.swap.ready import Ready
from turnout.types import Packed
from turnout.types.weights import GATED

__all__ = ["Entries", "router_entries"]


Router = token.TopK | token.LossFree | token.GroupLimited | token.Switch | token.GShard


class Entries:
    """The tables of a model, and the tensors that they point to; of one that ``why_plain`` has nothing against.

    Weights are read where they lie. Vectors in 16 bits, norms that store their weight less one among them, are copied
    to fp32: thousandths of a model.
    """

    def __init__(self, lm: LM) -> None:
        self.ready: Ready | None = None  # where experts come into slots
        self.kept, self._border = Kept(lm.embedding.dtype), lm.rope.border
        self._matrices: list[tuple[int, ...]] = []
        self._norms: list[tuple[int, int, int, float]] = []
        layers = [self._layer(lm, number, block) for number, block in enumerate(lm._blocks())]
        self.models = np.zeros(1, MODEL)
        self._model(lm, self.models[0])
        self.layers = np.concatenate(layers)
        for name in ("keys", "values"):  # rows that are filled in by whoever has caches
            self.layers[name] = range(len(self._matrices), len(self._matrices) + len(layers))
            self._matrices += [(0,) * COLUMNS] * len(layers)
        self.norms, self.matrices = np.array(self._norms, NORM), np.array(self._matrices, np.int64)

    @contextlib.contextmanager
    def turn(self, id_R: np.ndarray, text: int = 0) -> Iterator[None]:
        """One step of these tokens, of the text of this number or of several (0).

        Where experts come into slots, what kept it from its end is raised.
        """
        if self.ready is None:
            yield
            return
        with self.ready.cache.turn(id_R.tolist(), text=text):
            yield
            self.ready.check()

    def of_texts(self, length: int) -> None:
        """From here on all rows are of texts on the same side of longrope's border as one of so many tokens."""
        border = self._border
        self.models[0]["frequencies"] = self._sides[border is not None and length > border]

    def _norm(self, norm: Norm | None) -> int:
        if norm is None:
            return -1
        if isinstance(norm, LayerNorm):
            found = self.kept.wide(norm.weight), self.kept.wide(norm.bias), 1, norm.eps
        else:
            found = self.kept.wide(norm.weight, float(norm.plus_one)), 0, 0, norm.eps
        self._norms.append(found)
        return len(self._norms) - 1

    def _matrix(self, name: str, held: Tensor | Packed | PackedWeight, bias: Tensor | None, *shape: int) -> int:
        stack: Tensor | Packed = held.packed if isinstance(held, PackedWeight) else held
        self._fits(name, stack, bias, *shape)
        self._matrices.append(self.kept.matrix(stack, bias))
        return len(self._matrices) - 1

    def _fits(self, name: str, stack: Tensor | Packed, bias: Tensor | None, *shape: int) -> None:
        if tuple(stack.shape) != shape or not (bias is None or bias.shape[-1] == shape[-2]):
            fix = "build the model with the sizes of its weights"
            raise ShapeError(word(name, got=tuple(stack.shape), allowed=f"be {shape}", where="the model", fix=fix))

    def _model(self, lm: LM, of: np.void) -> None:
        config, size = lm.config, (lm.config.vocab_size, lm.config.width)
        table = lm.embedding.detach().contiguous()
        of["width"], of["vocab"], of["norm"] = size[1], size[0], self._norm(lm.norm)
        of["embedding"], of["embedding_code"] = self.kept.at(table), CODES[table.dtype]
        scale = table.new_tensor(config.embedding_scale) if config.embedding_rounded else config.embedding_scale
        of["embedding_scale"] = float(scale)
        if lm.positions is not None:
            at = lm.positions.detach().contiguous()
            of["positions"], of["positions_code"] = self.kept.at(at), CODES[at.dtype]
        of["head"] = self._matrix("head.weight", lm.embedding if lm.head is None else lm.head.weight, None, *size)
        of["divisor"], of["softcap"] = config.logit_divisor, config.logit_softcap or 0
        of["pairs"] = lm.rope.frequency_P.numel()
        of["frequencies"] = self.kept.wide(lm.rope.frequency_P)
        self._sides = int(of["frequencies"]), self.kept.wide(lm.rope.long_P)
        of["magnitude"] = lm.rope.magnitude
        if lm.local_rope is not None:
            of["local_frequencies"] = self.kept.wide(lm.local_rope.frequency_P)

    def _layer(self, lm: LM, number: int, block: Block) -> np.ndarray:
        made, attention = np.zeros(1, LAYER), block.attention
        of, config, D = made[0], lm.config, lm.config.width
        of["window"], of["softcap"] = attention.window or 0, attention.softcap or 0
        of["heads"], of["scale"] = attention.heads, attention.scale
        of["local"] = lm.local_rope is not None and config.window_of(number) is not None
        of["norm"], of["out_norm"] = self._norm(block.attention_norm), self._norm(block.attention_out_norm)
        of["q_norm"], of["k_norm"] = -1, -1
        name = f"blocks.{number}.attention"
        if isinstance(attention, LatentAttention):
            self._latent(of, attention, name, D)
        else:
            assert isinstance(attention, Attention)
            self._grouped(of, attention, name, D)
        of["ff_norm"], of["ff_out_norm"] = self._norm(block.ff_norm), self._norm(block.ff_out_norm)
        of["residual"], of["shared_up"] = block.scale, -1
        ff, name = block.ff, f"blocks.{number}.ff"
        if isinstance(ff, MoE):
            self._routed(of, ff, name, D)
        else:
            of["activation"] = ACTIVATIONS.index(ff.activation)
            of["up"], of["down"] = self._dense(ff, name, D)
        return made

    def _grouped(self, of: np.void, attention: Attention, name: str, D: int) -> None:
        q, kv = attention.heads * attention.head_width, attention.key_heads * attention.head_width
        for key in ("key_heads", "head_width", "rotated"):
            of[key] = getattr(attention, key)
        of["qkv"] = self._map(f"{name}.qkv", attention.qkv, q + 2 * kv, D)
        of["out"] = self._map(f"{name}.out", attention.out, D, q)
        of["q_norm"], of["k_norm"] = self._norm(attention.q_norm), self._norm(attention.k_norm)
        of["qk_full"], of["sinks"] = attention.qk_norm == "full", self.kept.wide(attention.sinks)

    def _latent(self, of: np.void, attention: LatentAttention, name: str, D: int) -> None:
        mla, H = attention.mla, attention.heads
        of["latent"], of["rotated"], of["neighbours"] = mla.kv_rank, mla.rope_dim, mla.interleaved
        of["key_heads"], of["head_width"], of["q_down"], inner = 1, mla.kv_rank + mla.rope_dim, -1, D
        of["k_norm"] = self._norm(attention.kv_norm)
        if attention.q_down is not None and attention.q_norm is not None:
            inner = attention.q_norm.weight.numel()
            of["q_down"] = self._map(f"{name}.q_down", attention.q_down, inner, D)
            of["q_norm"] = self._norm(attention.q_norm)
        of["q_up"] = self._map(f"{name}.q_up", attention.q_up, H * (mla.nope_dim + mla.rope_dim), inner)
        of["kv_down"] = self._map(f"{name}.kv_down", attention.kv_down, mla.kv_rank + mla.rope_dim, D)
        of["out"] = self._map(f"{name}.out", attention.out, D, H * mla.v_dim)
        # Of each head first what makes keys, which queries meet from the other side, then what makes values.
        held, wide = attention.kv_up.weight, mla.nope_dim + mla.v_dim
        both = held.detach() if isinstance(held, Tensor) else held.packed
        self._fits(f"{name}.kv_up.weight", both, None, H * wide, mla.kv_rank)
        self._matrices += self.kept.parted(both, H, mla.nope_dim)
        of["k_up"], of["v_up"] = len(self._matrices) - 2, len(self._matrices) - 1

    def _map(self, name: str, of: Projection | PackedLinear, *shape: int) -> int:
        return self._matrix(f"{name}.weight", of.weight, of.bias, *shape)

    def _dense(self, ff: FeedForward | PackedFeedForward, name: str, D: int) -> tuple[int, int]:
        wide = ff.hidden * (2 if ff.activation in GATED else 1)
        return (
            self._matrix(f"{name}.up", ff.up, ff.up_bias, wide, D),
            self._matrix(f"{name}.down", ff.down, ff.down_bias, D, ff.hidden),
        )

    def _routed(self, of: np.void, moe: MoE, name: str, D: int) -> None:
        bank, router = moe.bank, moe.router
        assert isinstance(bank, Bank | PackedBank | OffloadedBank) and isinstance(router, Router)
        E, F, wide = bank.num_experts, bank.hidden, bank.hidden * (2 if bank.activation in GATED else 1)
        held, biases = E, (bank.up_bias, bank.down_bias)
        if isinstance(bank, OffloadedBank):
            (up, down), biases, held = bank.stacks(), bank.biases(), len(bank.cache.stacks[0])
            self.ready = self.ready or Ready(bank.cache)
            assert self.ready.cache is bank.cache
            of["ready"], of["number"] = self.ready.address, bank.layer
        else:
            up, down = (bank.up, bank.down) if isinstance(bank, PackedBank) else _lying(bank)
        of["routed"], of["activation"] = 1, ACTIVATIONS.index(bank.activation)
        of["up"] = self._matrix(f"{name}.bank.up", up, biases[0], held, wide, D)
        of["down"] = self._matrix(f"{name}.bank.down", down, biases[1], held, D, F)
        if moe.label_E is not None:
            of["labels"] = self.kept.at(moe.label_E.long().contiguous())
        bias = router.bias if isinstance(router, token.TopK) else None
        of["router"] = self._matrix(
            f"{name}.router.weight", router.weight, bias, E if moe.label_E is None else len(moe.label_E), D
        )
        router_entries(of, router, self.kept)
        if moe.shared is not None:
            of["shared_up"], of["shared_down"] = self._dense(moe.shared, f"{name}.shared", D)
            assert moe.shared.activation == bank.activation
            of["shared_gate"] = self.kept.wide(None if moe.shared_gate is None else moe.shared_gate[0])


def _lying(bank: Bank) -> tuple[Tensor, Tensor]:
    """(E, H, D) and (E, D, F) the experts' matrices."""
    return bank.up_EDH.detach().transpose(1, 2), bank.down_EFD.detach().transpose(1, 2)


def router_entries(of: np.void, router: Router, kept: Kept) -> None:
    """How a router chooses, but for its weight."""
    of["top_k"], of["weight_scale"], of["groups"], of["top_groups"] = router.top_k, 1, 1, 1
    of["renormalize"] = getattr(router, "renormalize", isinstance(router, token.GShard))
    if isinstance(router, token.LossFree | token.GroupLimited):
        of["sigmoid"], of["floor"] = router.scores == "sigmoid", 1e-20
        of["correction"] = kept.wide(router.bias_E)
    if isinstance(router, token.GroupLimited):
        of["groups"], of["top_groups"] = router.num_groups, router.top_groups
        of["best_two"], of["weight_scale"] = router.group_score == "top2", router.scale
