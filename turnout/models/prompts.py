"""The prompts of a batch, however they are given: one matrix, each row ending with its prompt's last token."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.models.padding import real_tokens

__all__ = ["Prompts", "read_prompts"]

Given = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """B prompts, side by side.

    Args:
        id_BS: (B, S) int64, padding before shorter ones.
        real_BS: (B, S) bool, false at padding; None where there is none.

    Source: none; plain bookkeeping.
    """

    id_BS: Tensor
    real_BS: Tensor | None

    @property
    def rows(self) -> list[list[int]]:
        """The tokens of each prompt."""
        if self.real_BS is None:
            return self.id_BS.tolist()
        return [id_S[real_S].tolist() for id_S, real_S in zip(self.id_BS, self.real_BS, strict=True)]

    def packed(self, pad: int) -> tuple[Tensor, Tensor | None]:
        """(B, S) the tokens of each prompt, with padding after shorter ones, and (B,) how many; None for S each."""
        if self.real_BS is None:
            return self.id_BS, None
        texts = [id_S[real_S] for id_S, real_S in zip(self.id_BS, self.real_BS, strict=True)]
        return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad), self.real_BS.sum(1)


def read_prompts(
    prompts: Given, attention_mask: Tensor | None, *, vocab_size: int, pad: int, device: torch.device, where: str
) -> Prompts:
    """The prompts as one matrix; every one has a token, and every token is of the vocabulary.

    Args:
        prompts: (B, S) token ids, or a list of prompts, each a list or a tensor (S,).
        attention_mask: of a matrix: (B, S), 1 or true at tokens, padding before them; or (B,) how many tokens each row
            begins with, which then move to its end.
        vocab_size: V.
        pad: what stands in the padding that is added here.
        device: where the model is.
        where: the function that was given them, for errors.

    Raises:
        ShapeError: another shape, no prompt at all, or one without a token.
        UsageError: no whole numbers, ids outside the vocabulary or on another device, or padding after a prompt.

    >>> read_prompts([[1, 2, 3], [4]], None, vocab_size=8, pad=0, device=torch.device("cpu"), where="here").id_BS
    tensor([[1, 2, 3],
            [0, 0, 4]])

    Source: none; plain bookkeeping.
    """
    if isinstance(prompts, Tensor):
        found = _of_matrix(prompts, attention_mask, pad, where)
    else:
        if attention_mask is not None:
            allowed, fix = "go with one matrix of ids (B, S)", "leave it out: a list says how long each prompt is"
            got = "one beside a list of prompts"
            raise UsageError(word("attention_mask", got=got, allowed=allowed, where=where, fix=fix))
        found = _of_list(prompts, pad, device, where)
    _check(found, vocab_size, device, where)
    return found


def _of_matrix(id_BS: Tensor, attention_mask: Tensor | None, pad: int, where: str) -> Prompts:
    if id_BS.ndim != 2 or id_BS.is_floating_point() or 0 in id_BS.shape:
        got = f"{id_BS.dtype} of shape {tuple(id_BS.shape)}"
        fix = "pass a prompt of a token or more"
        if id_BS.numel():
            fix = "pass id[None] for one prompt" if id_BS.ndim == 1 else "pass what the tokenizer gives, as integers"
        raise ShapeError(
            word("the prompts", got=got, allowed="be whole numbers (B, S), B and S > 0", where=where, fix=fix)
        )
    id_BS = id_BS.long()
    real_BS = None if attention_mask is None else real_tokens(attention_mask, id_BS, None, 0)
    if real_BS is None:
        return Prompts(id_BS, None)
    _refuse_empty(real_BS.sum(1).tolist(), where)
    if attention_mask is not None and attention_mask.ndim == 1:
        texts = [id_S[real_S] for id_S, real_S in zip(id_BS, real_BS, strict=True)]
        return _side_by_side(texts, pad, width=id_BS.shape[1])
    if not bool(real_BS[:, -1].all()):
        allowed = "end each row with a token"
        fix = "pad on the left (tokenizer.padding_side = 'left'), or pass the rows' lengths, (B,), as attention_mask"
        raise UsageError(word("attention_mask", got="padding after a prompt", allowed=allowed, where=where, fix=fix))
    return Prompts(id_BS, real_BS)


def _of_list(
    prompts: Sequence[Tensor] | Sequence[Sequence[int]], pad: int, device: torch.device, where: str
) -> Prompts:
    what = "a list of prompts, each a list of token ids or a tensor (S,)"
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        fix = "pass tokenizer.encode(text), in a list" if isinstance(prompts, str) else "pass [[1, 2, 3]]"
        got = repr(prompts) if isinstance(prompts, str | Sequence) else f"a {type(prompts).__name__}"
        raise ShapeError(word("the prompts", got=f"{got:.80}", allowed=f"be {what}", where=where, fix=fix))
    texts = []
    for number, prompt in enumerate(prompts):
        try:
            text = torch.as_tensor(prompt, device=device) if len(prompt) else torch.empty(0, dtype=torch.long)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _no_ids(number, prompt, what, where) from error
        if text.ndim != 1 or text.is_floating_point() or text.dtype == torch.bool:
            raise _no_ids(number, prompt, what, where)
        texts.append(text.long())
    _refuse_empty([len(text) for text in texts], where)
    return _side_by_side(texts, pad)


def _no_ids(number: int, prompt: object, what: str, where: str) -> ShapeError:
    got = f"{type(prompt).__name__} as prompt {number}"
    fix = "pass token ids: [tokenizer.encode(text)] for one text; [ids] for one prompt"
    return ShapeError(word("the prompts", got=got, allowed=f"be {what}", where=where, fix=fix))


def _side_by_side(texts: Sequence[Tensor], pad: int, width: int | None = None) -> Prompts:
    width = max(map(len, texts)) if width is None else width
    id_BS = texts[0].new_full((len(texts), width), pad)
    real_BS = torch.zeros_like(id_BS, dtype=torch.bool)
    for row, text in enumerate(texts):
        id_BS[row, width - len(text) :], real_BS[row, width - len(text) :] = text, True
    return Prompts(id_BS, None if bool(real_BS.all()) else real_BS)


def _refuse_empty(lengths: Sequence[int], where: str) -> None:
    if empty := [number for number, length in enumerate(lengths) if length == 0]:
        got = f"no token in prompt {', '.join(map(str, empty[:3]))}{', ...' if len(empty) > 3 else ''}"
        fix = "begin it with the token that opens a text: tokenizer.bos_token_id, or the separator of its documents"
        raise ShapeError(word("every prompt", got=got, allowed="have at least one token", where=where, fix=fix))


def _check(prompts: Prompts, vocab_size: int, device: torch.device, where: str) -> None:
    id_BS = prompts.id_BS
    if id_BS.device != device:
        allowed, fix = f"be on the model's {device}", f"pass them .to('{device}')"
        raise UsageError(word("the prompts", got=f"them on {id_BS.device}", allowed=allowed, where=where, fix=fix))
    if id_BS.device.type == "cpu":  # on an accelerator the look would wait for it
        least, most = (int(bound) for bound in id_BS.aminmax())
        if least < 0 or most >= vocab_size:
            allowed, fix = f"be from 0 to {vocab_size - 1}", "use the tokenizer that the model was trained with"
            raise UsageError(word("token ids", got=f"{least} to {most}", allowed=allowed, where=where, fix=fix))
