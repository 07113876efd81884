"""Text through a model that is being changed: what its layers see, and what the change does to its output."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from turnout.errors import DataError, UsageError, word
from turnout.layers import Routed
from turnout.models import LM
from turnout.models.lm import Block
from turnout.models.packed import refuse_packed
from turnout.reshape.resumable import by_batch
from turnout.types import Routing

__all__ = ["blocks", "checked", "difference", "evaluating", "probe", "reach", "refuse_no_text", "watch"]

Look = Callable[[int, Tensor, Routing | None], None]


def blocks(lm: LM) -> list[Block]:
    """The layers of a model, as what they are."""
    return cast(list[Block], list(lm.blocks))


def reach(lm: LM, layer: int) -> float:
    """The most that the root mean square of what a layer's feed-forward takes can be.

    It is what the norm before it lets through. Without one it is the stream of all that was added up: the longest
    embedding, and what each norm before let through.
    """
    block = blocks(lm)[layer]
    if block.ff_norm is not None:
        return block.ff_norm.gain
    longest = _longest(lm.embedding) * abs(lm.config.embedding_scale)
    longest += 0 if lm.positions is None else _longest(lm.positions)
    before = [norm for done in blocks(lm)[:layer] for norm in (done.attention_out_norm, done.ff_out_norm)]
    added = sum(norm.gain for norm in (*before, block.attention_out_norm) if norm is not None)
    return longest + abs(lm.config.residual_scale) * added


def _longest(row_ND: Tensor) -> float:
    """The largest root mean square of a row."""
    return float(row_ND.detach().float().square().mean(1).max().sqrt())


def checked(
    batches: Iterable[Tensor | Mapping[str, Tensor]] | None, lm: LM, where: str, *, packed: bool = False
) -> tuple[Tensor, ...]:
    """The batches as a tuple of (B, S) ids on the model's device, without padding; () for None.

    A mapping with ``input_ids`` and an ``attention_mask``, as tokenizers give it, becomes rows of its tokens alone.
    Unless ``packed``, a model with weights in few bits, or with experts of zero computation, is refused: whoever looks
    at text reshapes whole ones.

    Raises:
        DataError: no batch at all, or something that is not a tensor of (B, S) ids.
        UsageError: the model's weights are in few bits, or some of its experts compute next to nothing.
    """
    if not packed:
        refuse_packed(lm, "reshaped", where=where)
        moe = lm.config.moe
        if moe is not None and moe.zero_computation is not None:
            got, fix = f"one with zero_computation={dict(moe.zero_computation)}", "train it with zero_computation=None"
            raise UsageError(word("the model", got=got, allowed="have experts of one kind", where=where, fix=fix))
    if batches is None:
        return ()
    given = (batches,) if isinstance(batches, Tensor | Mapping) else tuple(batches)
    found = tuple(part for item in given for part in _tokens(item, where))
    wrong = [item for item in found if not isinstance(item, Tensor) or item.ndim != 2 or item.is_floating_point()]
    if wrong or not found:
        got = f"a {type(wrong[0]).__name__}" + _shape(wrong[0]) if wrong else "none"
        fix = "pass [batch.id_BS for batch in ...], or what a tokenizer gives, at least one, or batches=None"
        raise DataError(word("batches", got=got, allowed="be tensors (B, S) of token ids", where=where, fix=fix))
    if not any(item.numel() for item in found):
        got, fix = f"{len(found)} without a token", "pass ids of shape (B, S) with B and S of 1 or more"
        raise DataError(word("batches", got=got, allowed="hold at least one token", where=where, fix=fix))
    return tuple(item.to(lm.embedding.device) for item in found)


def _tokens(item: Any, where: str) -> Iterator[Any]:
    """The rows of a padded batch without their padding, those of one length that stand beside each other together."""
    if not isinstance(item, Mapping):
        yield item
        return
    id_BS, mask_BS = item.get("input_ids"), item.get("attention_mask")
    if not isinstance(id_BS, Tensor) or not isinstance(mask_BS, Tensor) or mask_BS.shape != id_BS.shape:
        got, allowed = f"a mapping of {', '.join(map(str, item))}", "hold input_ids and attention_mask of one shape"
        fix = "pass what tokenizer(..., padding=True, return_tensors='pt') gives"
        raise DataError(word("a batch", got=got, allowed=allowed, where=where, fix=fix))
    rows = [row_S[real_S] for row_S, real_S in zip(id_BS, mask_BS.bool(), strict=True) if bool(real_S.any())]
    for _, group in itertools.groupby(rows, key=len):
        yield torch.stack(list(group))


def _shape(item: object) -> str:
    return f" of shape {tuple(item.shape)}" if isinstance(item, Tensor) else ""


def refuse_no_text(batches: tuple[Tensor, ...], why: str, where: str) -> None:
    """Refuses to go on without calibration text.

    Raises:
        UsageError: there is none.
    """
    if not batches:
        fix = "pass batches=[id_BS, ...], a few thousand tokens of text"
        raise UsageError(word("batches", got=None, allowed=f"be given: {why}", where=where, fix=fix))


def probe(lm: LM, seed: int) -> tuple[Tensor, ...]:
    """Random token ids, to compare outputs on where the caller gives no text."""
    generator = torch.Generator().manual_seed(seed)
    id_BS = torch.randint(lm.config.vocab_size, (4, min(64, lm.config.max_seq)), generator=generator)
    return (id_BS.to(lm.embedding.device),)


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the mode before again."""
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.train(training)


def watch(lm: LM, batches: Iterable[Tensor], look: Look) -> None:
    """Runs the batches and shows ``look`` each feed-forward layer's input: (layer, x_TD, routing or None)."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def show(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            routing = output.routing if isinstance(output, Routed) else None
            look(layer, args[0].detach().flatten(0, -2), routing)

        return show

    handles = [block.ff.register_forward_hook(hook(layer)) for layer, block in enumerate(blocks(lm))]
    try:
        with torch.no_grad(), evaluating(lm):
            for id_BS in batches:
                lm(id_BS)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def difference(before: LM, after: LM, batches: Iterable[Tensor]) -> dict[str, float | int]:
    """How far the logits moved: the largest over batches of |after - before| / |before|, and of any one logit."""
    batches = tuple(batches)
    relative, largest = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def compare(id_BS: Tensor) -> None:
        apart = size = 0.0
        # Row by row: logits in double precision take more memory than many a model.
        for old_SV, new_SV in zip(before(id_BS).logits_BSV, after(id_BS).logits_BSV, strict=True):
            gap_SV = new_SV.double() - old_SV.double()
            apart, size = apart + float(gap_SV.square().sum()), size + float(old_SV.double().square().sum())
            torch.maximum(largest, gap_SV.abs().max().cpu(), out=largest)
        torch.maximum(
            relative, torch.tensor(math.sqrt(apart) / max(math.sqrt(size), 1e-300), dtype=torch.float64), out=relative
        )

    with evaluating(before, after):
        by_batch("comparing", batches, {"relative": relative, "largest": largest}, compare)
    tokens = sum(id_BS.numel() for id_BS in batches)
    return {"relative_difference": float(relative), "largest_difference": float(largest), "compared_tokens": tokens}
