"""A prompt as the tokens that a model goes on from."""

from tokenizers import Tokenizer

from turnout.train.data.spaced import spaced
from turnout.train.data.tokenizer import opening_ids, own_opening

__all__ = ["prompt_ids"]


def prompt_ids(prompt: str, tokenizer: Tokenizer, *, own: bool) -> list[int]:
    """The tokens of a prompt, behind those that open a text.

    Args:
        prompt: the text; an empty one opens a new document.
        tokenizer: the model's.
        own: whether turnout trained the model: then a document began with the separator; others are opened as their
            tokenizer does it.

    Raises:
        DataError: an empty prompt, and a tokenizer that says nothing of how documents begin.

    >>> from turnout.train.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["a cat, a cat"], vocab_size=258)
    >>> prompt_ids("c", tokenizer, own=True), prompt_ids("c", tokenizer, own=False)
    ([0, 67], [67])

    Source: none; what each tokenizer says.
    """
    table = spaced(tokenizer)
    ids = (
        tokenizer.encode(prompt, add_special_tokens=False).ids if table is None else table.encode([prompt], [False])[0]
    )
    return [*(opening_ids(tokenizer) if own or not ids else own_opening(tokenizer)), *ids]
