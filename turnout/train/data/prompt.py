"""A prompt as the tokens that a model goes on from."""

from tokenizers import Tokenizer

from turnout.train.data.spaced import Spaced
from turnout.train.data.tokenizer import encode, opening_ids, own_opening

__all__ = ["prompt_ids"]


def prompt_ids(prompt: str, tokenizer: Tokenizer, *, own: bool, table: Spaced | None) -> list[int]:
    """The tokens of a prompt, behind those that open a text. Other threads go on while it is read.

    Args:
        prompt: the text; an empty one opens a new document.
        tokenizer: the model's.
        own: whether turnout trained the model: then a document began with the separator; others are opened as their
            tokenizer does it.
        table: ``spaced`` of the tokenizer, which goes through its whole vocabulary: made once for all prompts.

    Raises:
        DataError: an empty prompt, and a tokenizer that says nothing of how documents begin.

    >>> from turnout.train.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["a cat, a cat"], vocab_size=258)
    >>> prompt_ids("c", tokenizer, own=True, table=None), prompt_ids("c", tokenizer, own=False, table=None)
    ([0, 67], [67])

    Source: none; what each tokenizer says.
    """
    (ids,) = encode(tokenizer, [prompt]) if table is None else table.encode([prompt], [False])
    return [*(opening_ids(tokenizer) if own or not ids else own_opening(tokenizer)), *ids]
