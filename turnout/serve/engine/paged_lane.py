"""The lane of the compiled step: requests of one model in one batch, their keys and values in pages."""

import dataclasses
from collections.abc import Generator, Sequence

import numpy as np
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.models.decoding.chunk import Chunk
from turnout.models.decoding.paged import PagedSteps
from turnout.models.decoding.pages import PAGE, Pages, Text, pages_of
from turnout.models.lm import LM
from turnout.run.compiled.tables import OUTS
from turnout.serve.engine.answer import Answer, Routes
from turnout.serve.engine.lane import Scores
from turnout.serve.engine.prefix import Node, Prefixes

__all__ = ["PagedLane"]

# How many tokens of prompts a step takes beside those that go on, so that these do not wait for long: for each of them
# so many, and this at least. Where a layer is small a step costs more to call than its tokens to compute: more of them.
_EACH, _BESIDE, _SMALL = 2, 16, 2
# Without a budget there is room for so many positions of every slot.
_ROOM = 2048
_WHERE = "turnout.serve.Engine"


@dataclasses.dataclass(eq=False)
class _Held:
    text: Text
    node: Node


class PagedLane:
    """Requests of one LM that is compiled. A request has the bits that it has alone: see ``PagedSteps``.

    Where pages run out, first parts of prompts that nobody uses are let go; then the youngest request gives its pages
    up, waits, and is read again, its own tokens with it, which gives the same bits as going on.

    Args:
        lm: the model.
        slots: how many requests go on at once.
        cache_bytes: for keys and values; None for 2,048 positions a slot.
        sharing: whether parts of prompts are kept for others that begin with them.
    """

    def __init__(self, lm: LM, slots: int, cache_bytes: int | None, sharing: bool) -> None:
        counts = _counts(lm, slots, cache_bytes)
        try:
            self.pages = Pages(lm, counts)
        except (RuntimeError, MemoryError) as error:  # torch's word for what there is no memory for
            each = Pages.page_bytes(lm)
            got = f"{sum(count * size for count, size in zip(counts, each, strict=True)):,} bytes for {slots} slots"
            allowed, fix = "be memory that this machine has", "pass cache_bytes=1GB, or fewer slots"
            raise UsageError(word("cache_bytes", got=got, allowed=allowed, where=_WHERE, fix=fix)) from error
        self._lm, self._steps = lm, PagedSteps(lm, self.pages)
        self._prefixes = Prefixes(self.pages, self._steps.chunk)
        self._sharing, self._held = sharing, dict[Answer, _Held]()
        self.dropped: list[Answer] = []
        self.load_LE: np.ndarray | None = None
        routed_L, entries = self._steps.routed_L, self._steps.entries
        if len(routed_L):
            self._steps.tell_routes()
            experts_L = [int(entries.matrices[row, OUTS]) for row in entries.layers["router"][routed_L]]
            self.load_LE = np.zeros((len(experts_L), max(experts_L)), np.int64)

    def why_never(self, prompt: int, tokens: int) -> str | None:
        """Why such a request can never be answered; None where it can."""
        for need, pool in zip(_most(self.pages.windows, prompt + tokens), self.pages.pools, strict=True):
            if need > pool.count:
                return f"{prompt} tokens and {tokens} more, which take {need} of {pool.count} pages"
        return None

    def begin(self, answer: Answer) -> bool:
        """Takes a request on; False where there are no pages for what it is to read."""
        text, asked = self.pages.begin(), answer.request
        node = self._prefixes.begin((asked.adapter, asked.tenant), asked.prompt, text)
        lacking, kept_G = self.pages.needed(text, len(answer.ids) + 1, steps=False), self._prefixes.kept_G()
        both = zip(lacking, self.pages.pools, kept_G, strict=True)
        if any(len(places) > pool.free + kept for places, pool, kept in both):
            self.pages.free(text)
            return False
        answer.cached = max(answer.cached, text.length) if not answer.drawn else answer.cached
        self._held[answer] = _Held(text, node)
        return True

    def read(self, answer: Answer) -> Generator[bool, None, Scores | None]:
        """Reads whole parts, a layer at a time; what is left of a text is read by steps."""
        held, prompt, steps = self._held[answer], answer.request.prompt, self._steps
        text = held.text
        for start, end in steps.parts_of(text.length, len(prompt)):
            if steps.is_short(end - start):
                return None
            if not self._extend(answer, text, end, steps=False):
                return None
            reading = steps.read(text, prompt[start:end])
            chunk = yield from _slices(reading)
            if self._sharing and end - start == steps.chunk:
                held.node = self._prefixes.add(held.node, prompt[start:end], text)
            self.pages.trim(text)
            if end < len(prompt):
                yield True
            elif not answer.drawn:
                return Scores(answer, self._lm.scores(chunk.hidden_1D)[0].float(), routes=_routes(chunk, answer))
        return None

    def step(self, answers: Sequence[Answer]) -> list[Scores]:
        """One step: a token of those that go on, and some of what is left to read of others, the oldest first."""
        some: dict[Answer, list[int]] = {}
        going = sum(len(one.ids) - self._held[one].text.length == 1 for one in answers)
        more = _SMALL if self._steps.is_small else 1
        beside = min(self._steps.few, more * max(_BESIDE, _EACH * going)) if going else self._steps.few
        for answer in sorted(answers, key=lambda one: one.ticket.number):
            if answer in self.dropped:
                continue
            text = self._held[answer].text
            left = answer.ids[text.length : text.length + max(1, beside)]
            if len(left) > 1 or len(answer.ids) - text.length > 1:
                if not beside:
                    continue
                left = left[:beside]
                beside -= len(left)
            if self._extend(answer, text, text.length + len(left), steps=True):
                some[answer] = left
        some = {answer: left for answer, left in some.items() if answer not in self.dropped}
        if not some:
            return []
        texts = [self._held[answer].text for answer in some]
        score_BV = self._steps.step(texts, list(some.values()))
        for text in texts:
            self.pages.trim(text)
        return self._scores(some, score_BV)

    def _scores(self, some: dict[Answer, list[int]], score_BV: Tensor) -> list[Scores]:
        """Of those whose text is read to its end."""
        counts = [len(left) for left in some.values()]
        last_B, routes_L = np.cumsum(counts) - 1, []
        if self.load_LE is not None:
            routes_L = self._steps.routes(sum(counts))
            layers, most = self.load_LE.shape
            # One count for all layers, each layer's experts numbered on from those of the one before.
            all_I = np.concatenate([route_RK.reshape(-1) + most * layer for layer, route_RK in enumerate(routes_L)])
            self.load_LE += np.bincount(all_I, minlength=layers * most).reshape(layers, most)
        plain = [row for row, answer in enumerate(some) if answer.is_plain]
        best: dict[int, int] = {}
        if plain:
            # The first of the largest, or what is no number, as torch has it; numpy costs less to call.
            plain_NV = score_BV.numpy() if len(plain) == len(counts) else score_BV.numpy()[plain]
            best_N = plain_NV.argmax(1)
            fine_N = np.isfinite(plain_NV[np.arange(len(plain)), best_N])
            best = {row: one for row, one, fine in zip(plain, best_N.tolist(), fine_N.tolist(), strict=True) if fine}
        found = []
        for row, answer in enumerate(some):
            if self._held[answer].text.length == len(answer.ids):
                told = None
                if answer.request.routes:
                    told = tuple(tuple(route_RK[last_B[row]].tolist()) for route_RK in routes_L)
                found.append(Scores(answer, score_BV[row], best.get(row), told))
        return found

    def leave(self, answer: Answer) -> None:
        """Forgets a request and gives its pages back."""
        held = self._held.pop(answer, None)
        if held is not None:
            self.pages.free(held.text)

    def usage(self) -> tuple[int, int, int]:
        """How many pages there are, how many texts hold, and how many only parts of prompts."""
        kept, count = sum(self._prefixes.kept_G()), sum(pool.count for pool in self.pages.pools)
        return count, count - sum(pool.free for pool in self.pages.pools) - kept, kept

    def forget(self) -> None:
        """Lets go of the parts of prompts that were kept."""
        self._prefixes.clear()

    def _extend(self, answer: Answer, text: Text, end: int, *, steps: bool) -> bool:
        """Gives a text pages, if need be those of others; False where it had to give up its own."""
        while not self.pages.extend(text, end, steps=steps):
            if self._prefixes.evict():
                continue
            youngest = max(self._held, key=lambda one: one.ticket.number)
            self.leave(youngest)
            self.dropped.append(youngest)
            if youngest is answer:
                return False
        return True


def _slices(reading: Generator[None, None, Chunk]) -> Generator[bool, None, Chunk]:
    while True:
        try:
            next(reading)
        except StopIteration as done:
            return done.value
        yield False


def _routes(chunk: Chunk, answer: Answer) -> Routes | None:
    """The experts that the last token of a part took."""
    if not answer.request.routes:
        return None
    found = []
    for routing in chunk.routings:
        expert_R = routing.expert_R[routing.token_R == routing.num_tokens - 1]
        found.append(tuple(expert_R.tolist()))
    return tuple(found)


def _most(windows: Sequence[int | None], length: int) -> list[int]:
    """For each group of layers the most pages that a text takes at any time, while a part of it is read."""
    whole = pages_of(length)
    return [whole if window is None else min(whole, 2 * pages_of(window) + 3) for window in windows]


def _counts(lm: LM, slots: int, cache_bytes: int | None) -> list[int]:
    """How many pages each group of layers gets."""
    windows, bytes_G = Pages.windows_of(lm), Pages.page_bytes(lm)
    length = min(_ROOM, -(-lm.config.max_seq // PAGE) * PAGE)
    need_G = _most(windows, length)
    texts = float(slots)
    if cache_bytes is not None:
        if cache_bytes < (least := sum(bytes_G)):
            allowed, fix = f"hold a page of {PAGE} positions, {least:,} bytes", f"pass cache_bytes={least} or more"
            raise UsageError(word("cache_bytes", got=f"{cache_bytes:,} bytes", allowed=allowed, where=_WHERE, fix=fix))
        texts = cache_bytes / sum(need * size for need, size in zip(need_G, bytes_G, strict=True))
    return [max(1, int(need * texts)) for need in need_G]
