"""Prompts that were read before: whole parts of them, with their pages, for whoever begins with the same tokens."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from turnout.models.decoding.pages import PAGE, Pages, Text, pages_of

__all__ = ["Node", "Prefixes"]


@dataclasses.dataclass(eq=False)
class Node:
    """One part of a prompt after those before it.

    Args:
        before: the part before it; None for a root.
        key: its tokens.
        held_G: for each group of layers the pages that whoever goes on from its end sees, by their place in the text,
            without those that the parts before it hold.
        used: when it was used last, in turns.
        after: the parts that are known to follow, by their tokens.
        kept: whether it is still to be found; nothing is kept after one that is not.

    Source: none; plain bookkeeping.
    """

    before: "Node | None"
    key: tuple[int, ...]
    held_G: list[dict[int, int]]
    used: int = 0
    after: dict[tuple[int, ...], "Node"] = dataclasses.field(default_factory=dict)
    kept: bool = True


class Prefixes:
    """The parts that were read of prompts, as trees, one for each owner; the tokens themselves are compared.

    A part is found only where everything before it is the same, so it has the numbers that reading it again would give.
    It holds its pages until it is let go: the least lately used first, and of a chain the end first.

    Args:
        pages: where they are.
        chunk: how many tokens a part has.

    Source: Zheng et al., 2024, "SGLang" (a radix tree of prompts), of whole parts; Kwon et al., 2023,
    "PagedAttention", for shared pages.
    """

    def __init__(self, pages: Pages, chunk: int) -> None:
        self._pages, self._chunk, self._turn = pages, chunk, itertools.count(1)
        self._roots: dict[object, Node] = {}

    def begin(self, owner: object, prompt: Sequence[int], text: Text) -> Node:
        """Lets an empty text begin with what is known of its prompt, all but the last token at most; the last part."""
        node = self._roots.setdefault(owner, Node(None, (), [{} for _ in self._pages.windows]))
        path, turn = [node], next(self._turn)
        for start in range(0, len(prompt) - self._chunk, self._chunk):
            found = node.after.get(tuple(prompt[start : start + self._chunk]))
            if found is None:
                break
            node, found.used = found, turn
            path.append(node)
        if len(path) > 1:
            held_G: list[dict[int, int]] = []
            for group, window in enumerate(self._pages.windows):
                parts = path if window is None else path[-1:]
                held_G.append({place: page for part in parts for place, page in part.held_G[group].items()})
            self._pages.share(text, held_G, self._chunk * (len(path) - 1))
        return node

    def add(self, node: Node, tokens: Sequence[int], text: Text) -> Node:
        """Keeps a part that a text has just read, after this one; the part."""
        if not node.kept:  # let go of while its text went on
            return node
        key, end = tuple(tokens), text.length
        found = node.after.get(key)
        if found is None:
            held_G: list[dict[int, int]] = []
            for group, window in enumerate(self._pages.windows):
                first = (end - self._chunk) if window is None else max(0, end - window + 1)
                places = range(first // PAGE, pages_of(end))
                held_G.append({place: text.held_G[group][place] for place in places})
                for page in held_G[-1].values():
                    self._pages.pools[group].hold(page)
            found = node.after[key] = Node(node, key, held_G)
        found.used = next(self._turn)
        return found

    def evict(self) -> bool:
        """Lets go of the part that was used least lately and gives pages free; whether there was one."""
        for owner in [owner for owner, root in self._roots.items() if not root.after]:
            self._roots.pop(owner).kept = False  # of whom nothing is left
        some = [node for node in self._nodes() if not node.after]
        for node in sorted(some, key=lambda node: node.used):
            if self._frees(node):
                self._drop(node)
                return True
        return False

    def kept_G(self) -> list[int]:
        """How many pages of each group nobody else holds."""
        found = [0] * len(self._pages.pools)
        for group, pool in enumerate(self._pages.pools):
            holds: dict[int, int] = {}
            for node in self._nodes():
                for page in node.held_G[group].values():
                    holds[page] = holds.get(page, 0) + 1
            found[group] = sum(pool.held(page) == count for page, count in holds.items())
        return found

    def clear(self) -> None:
        """Lets go of all."""
        for node in list(self._nodes()):
            self._give(node)
            node.kept = False
        for root in self._roots.values():
            root.kept = False
        self._roots = {}

    def _frees(self, node: Node) -> bool:
        """Whether a page would be free without it."""
        pools = self._pages.pools
        both = zip(pools, node.held_G, strict=True)
        return any(pool.held(page) == 1 for pool, held in both for page in held.values())

    def _drop(self, node: Node) -> None:
        self._give(node)
        node.kept = False
        if node.before is not None:
            del node.before.after[node.key]

    def _give(self, node: Node) -> None:
        for pool, held in zip(self._pages.pools, node.held_G, strict=True):
            for page in held.values():
                pool.give(page)

    def _nodes(self) -> Iterator[Node]:
        some = [node for root in self._roots.values() for node in root.after.values()]
        while some:
            node = some.pop()
            yield node
            some += node.after.values()
