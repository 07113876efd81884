"""Going on from prompts with a model of ours, or one of transformers that is one of ours."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from turnout.expects import Kind, expects
from turnout.models.c3po import C3PO
from turnout.models.c3po.remixed import Remixed
from turnout.models.checkpoint.live import lm_or_itself
from turnout.models.contrast import Contrast
from turnout.models.decoding import Contrasted, Decoder
from turnout.models.decoding.sides import Sides
from turnout.models.draw import Drawing
from turnout.models.ends import own_ends
from turnout.models.generated import WHERE, Asked, Generated, Piece, refusal
from turnout.models.going_on import Steps, go_on
from turnout.models.lm import LM
from turnout.models.prompts import Given
from turnout.models.wishes import own_wishes, say_unmet
from turnout.wrappers import unwrapped

__all__ = ["foreign_steps", "generate"]


def _one_of(kind: type, article: str, fix: str) -> Kind:
    return Kind(lambda value: value is None or isinstance(value, kind), f"{article} {kind.__name__}", f"pass {fix}")


_CONTRAST = _one_of(Contrast, "a", "turnout.models.Contrast(beta=0.5)")
_REMIX = _one_of(C3PO, "a", "turnout.models.C3PO(pathways)")


@expects(model=nn.Module, contrast=_CONTRAST, remix=_REMIX)
def generate(
    model: nn.Module,
    prompts: Given,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    eos: int | Sequence[int] | Literal["model"] | None = "model",
    stop: str | Sequence[str] | None = None,
    keep_stop: bool = False,
    tokenizer: Any = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    pad: int | None = None,
    stream: Callable[[Piece], object] | None = None,
    logprobs: bool = False,
    fallback: bool = False,
    contrast: Contrast | None = None,
    remix: C3PO | None = None,
) -> Generated:
    """What a model makes of prompts, each as it would alone; at temperature 0, token for token what transformers makes.

    Args:
        model: an ``LM``, or a causal language model of transformers, wrapped or not, which is computed as the LM that
            it is exactly (``turnout.models.checkpoint.from_live`` makes that once).
        prompts: token ids: (B, S), or a list of B prompts of any lengths, each a list or a tensor (S,).
        attention_mask: of prompts (B, S): (B, S), true at tokens, padding before them; or (B,) how many tokens each row
            begins with, which come out moved to its end. None for no padding.
        fallback: whether a model of transformers that is no LM is run as it is, with a warning.
        contrast: scores of self-contrast (SCMoE) in place of the model's, as ``logprobs`` too; None or beta=0 for none.
        remix: routes the last token of each prompt as ``turnout.models.C3PO`` finds best; None or alpha=1 for none.

    The other arguments are those of ``turnout.models.Drawing`` and ``turnout.models.Asked``.

    Raises:
        ShapeError: no prompt, one without a token, or prompts and tokens longer than the model takes.
        UsageError: a setting out of its range, padding after a prompt, a model that is no LM (with the reasons).

    >>> from turnout.models.lm import LMConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2))
    >>> generate(lm, [[3, 1, 4], [1]], tokens=3, seed=0).rows[1] == generate(lm, [[1]], tokens=3, seed=0).rows[0]
    True

    Source: ``generate`` of transformers; Li et al., 2025, "C3PO" (``remix``).
    """
    penalties = (repetition_penalty, frequency_penalty, presence_penalty, logit_bias)
    drawn = Drawing(temperature, top_k, top_p, min_p, *penalties)
    asked = Asked(tokens, drawn, eos, stop, keep_stop, tokenizer, seed, generator, pad, stream, logprobs)
    say_unmet(own_wishes(inside := unwrapped(model)), drawn, WHERE)
    run = inside if isinstance(inside, LM) else lm_or_itself(inside, fallback=fallback)
    own = own_ends(inside) if eos == "model" else ()
    return go_on(run, _steps(run, contrast, remix), prompts, asked, attention_mask=attention_mask, own=own)


def _steps(run: Any, contrast: Contrast | None, remix: C3PO | None) -> Any:
    """What makes the steps of a generation."""
    # What would change nothing is left out, so that nothing changes.
    asked = [] if contrast is None or contrast.beta == 0 else ["contrast"]
    asked += [] if remix is None or remix.alpha == 1 else ["remix"]
    if asked and not isinstance(run, LM):
        fix = f"pass a model that turnout computes itself, or leave {asked[0]} out"
        raise refusal(asked[0], "a model that is run as it is", "go with an LM", fix)
    if len(asked) > 1:
        raise refusal("contrast and remix", "both", "be one", "leave one of them out")
    if contrast is not None and asked == ["contrast"]:
        return functools.partial(Contrasted, run, contrast=contrast)
    if remix is not None and asked == ["remix"]:
        return functools.partial(Remixed, run, remix=remix)
    return functools.partial(Decoder if isinstance(run, LM) else foreign_steps, run)


def foreign_steps(model: Any, batch: int, room: int) -> Steps:
    """The steps of a model of transformers, as it is."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return _Foreign(model, batch, room)
    name = "original_max_position_embeddings"  # beside the others, or in them
    return Sides(lambda rows: _Foreign(model, rows, room), getattr(config, name, None) or rope[name])


class _Foreign:
    """The steps of a model of transformers, as it is."""

    def __init__(self, model: nn.Module, batch: int, room: int) -> None:
        self._model: Any = model
        self._cache: Any = None
        self._real_BT = torch.empty(batch, 0, dtype=torch.bool)

    def prefill(self, id_BS: Tensor, lengths: Tensor | None = None) -> Tensor:
        """As ``Steps``; the padding goes before the prompts, where transformers wants it."""
        new = id_BS.shape[1]
        real_BS = torch.ones_like(id_BS, dtype=torch.bool)
        if lengths is not None:
            before_BS = torch.arange(new, device=id_BS.device) - (new - lengths.to(id_BS.device))[:, None]
            real_BS, id_BS = before_BS >= 0, id_BS.gather(1, before_BS.clamp(min=0))
        self._real_BT = real_BS
        return self._scores(id_BS)

    def step(self, id_B: Tensor) -> Tensor:
        """As ``Steps``."""
        self._real_BT = nn.functional.pad(self._real_BT, (0, 1), value=True)
        return self._scores(id_B[:, None])

    def keep(self, row_N: Tensor) -> None:
        """As ``Steps``."""
        self._real_BT = self._real_BT[row_N]
        self._cache.batch_select_indices(row_N)

    def _scores(self, id_BS: Tensor) -> Tensor:
        place_BT = (self._real_BT.long().cumsum(1) - 1).clamp(min=0)
        told = {"attention_mask": self._real_BT.long(), "position_ids": place_BT[:, -id_BS.shape[1] :]}
        out = self._model(input_ids=id_BS, past_key_values=self._cache, use_cache=True, **told)
        self._keep(out)
        return out.logits[:, -1]

    def _keep(self, out: Any) -> None:
        """Takes the cache of what was read so far; without one each step would see its own token alone."""
        self._cache, got = getattr(out, "past_key_values", None), f"a {type(self._model).__name__}"
        kind, fix = type(self._cache).__name__, "call its own generate"
        if not hasattr(self._cache, "batch_select_indices"):
            allowed = "keep a cache of keys and values (past_key_values) from step to step"
            raise refusal("a model that is run as it is", got, allowed, fix)
        if kind != "DynamicCache" and not bool(self._real_BT.all()):
            # Nobody knows what else than attention would see the padding.
            allowed = f"be given prompts of one length, because it keeps a {kind}"
            raise refusal("a model that is run as it is", got, allowed, "generate from each prompt by itself")
