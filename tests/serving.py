"""A tiny model with a byte-level tokenizer and a chat template, served at a port of this machine."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from turnout.models import LM, LMConfig, MoEConfig
from turnout.serve.engine import Engine, Request
from turnout.serve.http import Door, Limits, Texts, build_app, listen, run_server
from turnout.serve.http.chat_template import ChatTemplate
from turnout.train.data import train_tokenizer

VOCAB, MAX_SEQ = 300, 256
TEXT = "the cat and the dog, é 例え 🙂; " + " ".join(f"line {n}: {n * n}" for n in range(90))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@dataclasses.dataclass(frozen=True)
class Served:
    """A server under test."""

    url: str
    engine: Engine
    app: Any
    lm: LM
    tokenizer: Any

    @property
    def service(self) -> Any:
        return self.app.state.service


def make_lm(seed: int = 0, max_seq: int = MAX_SEQ) -> LM:
    torch.manual_seed(seed)
    moe = MoEConfig(4, 2, 12)
    sizes = {"vocab_size": VOCAB, "width": 16, "layers": 2, "heads": 2, "max_seq": max_seq, "init_std": 0.4}
    return LM(LMConfig(**sizes, moe=moe)).eval()


def make_tokenizer() -> Any:
    found = train_tokenizer([TEXT], vocab_size=VOCAB)
    found.encode_special_tokens = True
    return found


class serving:
    """Serves while it is open."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        door: Door | None = None,
        limits: Limits | None = None,
        template: str | None = TEMPLATE,
        eos: tuple[int, ...] = (0,),
        max_seq: int = MAX_SEQ,
        viewer: Any = None,
        **engine: Any,
    ) -> None:
        self._lm = make_lm(max_seq=max_seq)
        self._engine = Engine(self._lm, tokenizer=tokenizer, name="moe", **engine)
        made = None if template is None else ChatTemplate(template, {})
        self._texts = Texts(tokenizer, vocab_size=VOCAB, eos=eos, own=True, template=made)
        self._door, self._limits, self._tokenizer, self._viewer = door, limits, tokenizer, viewer

    def __enter__(self) -> Served:
        self._engine.start()
        self._engine.submit(Request((0,), tokens=2)).result(600)  # what is compiled on first use is compiled now
        self._app = build_app(self._engine, self._texts, door=self._door, limits=self._limits, viewer=self._viewer)
        sock, told = listen("127.0.0.1", 0), list[str]()
        self._thread = threading.Thread(target=run_server, args=(self._app, sock), kwargs={"ready": told.append})
        self._thread.start()
        wait_for(lambda: told)
        return Served(told[0], self._engine, self._app, self._lm, self._tokenizer)

    def __exit__(self, *_: object) -> None:
        self._app.state.service.door.draining = True
        self._thread.join(90)  # longer than it waits for what is under way
        assert not self._thread.is_alive(), "the server did not end"


def wait_for(fact: Callable[[], Any], seconds: float = 30.0) -> None:
    """Waits until something is so."""
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.005)
