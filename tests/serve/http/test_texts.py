"""Reading a text takes nothing from others: no thread waits for it, and no vocabulary is gone through for it."""

import random
import string
import threading
from typing import Any

import pytest
from serving import TEMPLATE, VOCAB
from tokenizers import Tokenizer, decoders, models, normalizers

from turnout.serve.http import Texts
from turnout.serve.http.chat_template import ChatTemplate

WHERE = "/v1/here"


def spelt() -> Tokenizer:
    """One of SentencePiece's kind, over letters."""
    vocab = {"<unk>": 0, "▁": 1} | {letter: place + 2 for place, letter in enumerate(string.ascii_letters)}
    found = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return found


@pytest.mark.parametrize("kind", ["prompt", "chat"])
def test_other_threads_go_on_while_a_long_text_is_read(tokenizer, kind):
    texts = Texts(tokenizer, vocab_size=VOCAB, eos=(0,), own=True, template=ChatTemplate(TEMPLATE, {}))
    long = "".join(random.Random(0).choices(string.ascii_letters, k=400_000))
    over, seen = threading.Event(), [0]

    def look() -> None:
        while not over.wait(0.001):
            seen[0] += 1

    other = threading.Thread(target=look)
    other.start()
    try:
        if kind == "prompt":
            found = texts.prompt(long, param="prompt", where=WHERE)
        else:
            found = texts.chat([{"role": "user", "content": long}], None, param="messages", where=WHERE)
    finally:
        over.set()
        other.join()
    assert len(found) > 100_000
    assert seen[0] > 20  # a second of work, in which it was its turn a few times at most


def test_the_vocabulary_is_gone_through_once_for_all_prompts():
    class Counted:
        looks = 0

        def __init__(self, tokenizer: Tokenizer) -> None:
            self._tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tokenizer, name)

        def get_vocab(self, **how: Any) -> dict[str, int]:
            self.looks += 1
            return self._tokenizer.get_vocab(**how)

    counted: Any = Counted(spelt())
    texts = Texts(counted, vocab_size=60, eos=(0,), own=False)
    before = counted.looks
    ids = texts.prompt("a cat", param="prompt", where=WHERE)
    assert ids == (1, 2, 1, 4, 2, 21) and texts.prompt("a cat", param="prompt", where=WHERE) == ids
    assert counted.looks == before
