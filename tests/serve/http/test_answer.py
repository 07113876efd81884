"""Streams: what was heard is sent, also where an error follows in the same moment."""

import asyncio
import types

from turnout.serve.engine import Finished, Token
from turnout.serve.http.answer import _Run
from turnout.serve.http.heard import Heard
from turnout.serve.http.made import Made


class Plain:
    """Says who spoke."""

    def opening(self):
        return [b"open "]

    def piece(self, made, token):
        return [b"piece%d " % made.index]

    def ended(self, made):
        return [b"end%d " % made.index]

    def closing(self, texts):
        return [b"close"]

    def failed(self, error):
        return [b"failed"]


def run(*batches):
    one = object.__new__(_Run)
    one._texts = [Made(0, 0), Made(1, 0)]
    one._asked, one._last_s = types.SimpleNamespace(arrived_s=0.0), [None, None]
    meters = types.SimpleNamespace(ended=lambda *_: None, first=lambda *_: None, next=lambda *_: None)
    one._service = types.SimpleNamespace(meters=meters)
    one._listener = types.SimpleNamespace(close=lambda: None)
    left = list(batches)

    async def more():
        return left.pop(0)

    one._more = more
    return one


async def said(one):
    return [each async for each in one.events(Plain())]


def heard(index, event):
    return Heard(index, event, 1.0)


TOKEN = Token(id=3, text="a", logprob=0.0)
LOST = Finished("error", prompt_tokens=1, cached_tokens=0, output_tokens=1, message="its file is gone")
DONE = Finished("length", prompt_tokens=1, cached_tokens=0, output_tokens=1)


def test_what_came_with_an_error_of_another_text_is_sent_once():
    found = asyncio.run(said(run([heard(0, TOKEN)], [heard(0, TOKEN), heard(0, DONE), heard(1, LOST)])))
    assert found == [b"open ", b"piece0 ", b"piece0 end0 failed"]


def test_without_one_it_ends_in_peace():
    found = asyncio.run(said(run([heard(0, DONE)], [], [heard(1, TOKEN), heard(1, DONE)])))
    assert found == [b"open ", b"end0 ", b": here\n\n", b"piece1 end1 ", b"close"]
