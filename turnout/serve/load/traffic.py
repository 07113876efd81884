"""What is asked: prompts of given lengths, some with the same beginning, and when each is due; all from one seed."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal

import numpy as np

from turnout.errors import UsageError, word
from turnout.serve.load.exchange import Target
from turnout.serve.load.lengths import LengthMix

__all__ = ["Asked", "Traffic", "arrivals"]

# Short words of everyday English: most tokenizers have one token for each, with the space before it.
WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part"
).split()


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request, ready to be sent: its bytes, and the most tokens that it may answer.

    Source: none; plain bookkeeping.
    """

    request: bytes
    tokens: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What requests look like.

    Args:
        prompt: tokens of the prompts.
        output: tokens of the answers.
        shared: tokens at the beginning of each prompt that other requests share, of the prompt's own.
        prefixes: how many such beginnings there are.
        endpoint: which of OpenAI's.
        fixed: asks for exactly so many tokens (``ignore_eos``, which some servers know), and takes nothing less.
        tokens_per_word: of the model, as measured.
        overhead_tokens: that every prompt has beyond its words: of a chat template, of a beginning.

    Raises:
        UsageError: a beginning that is longer than all of a prompt, or fewer than one of them.

    >>> Traffic(LengthMix.parse("64"), LengthMix.parse("16"), endpoint="chat").path
    'chat/completions'

    Source: none; plain bookkeeping.
    """

    prompt: LengthMix
    output: LengthMix
    shared: int = 0
    prefixes: int = 1
    endpoint: Literal["completions", "chat"] = "completions"
    fixed: bool = False
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.shared < min(self.prompt.lengths):
            allowed, fix = f"be 0 to {min(self.prompt.lengths) - 1}, less than every prompt has,", "make prompts longer"
            what = word("--shared-prefix", got=self.shared, allowed=allowed, where="turnout bench-serve", fix=fix)
            raise UsageError(what)
        if self.prefixes < 1:
            fix = "pass --prefixes 1"
            what = word("--prefixes", got=self.prefixes, allowed="be at least 1", where="turnout bench-serve", fix=fix)
            raise UsageError(what)

    def draw(self, count: int, target: Target, model: str, *, seed: int) -> list[Asked]:
        r"""So many requests.

        Args:
            count: how many.
            target: where they go.
            model: the name that they ask for.
            seed: of all chance.

        >>> mix = LengthMix.parse("5")
        >>> one = Traffic(mix, mix).draw(1, Target("http://localhost"), "m", seed=0)[0]
        >>> json.loads(one.request.partition(b"\r\n\r\n")[2])["prompt"].count(" ")
        4
        """
        generator = np.random.default_rng(seed)
        starts = [self._words(self._count(self.shared, 0), generator) for _ in range(self.prefixes)]
        found = []
        for prompt, tokens in zip(self.prompt.draw(count, generator), self.output.draw(count, generator), strict=True):
            start = starts[int(generator.integers(self.prefixes))]
            rest = max(1, self._count(prompt, self.overhead_tokens) - len(start))
            text = " ".join([*start, *self._words(rest, generator)])
            body = self.body(model, text, tokens)
            found.append(Asked(target.request(self.path, json.dumps(body).encode()), tokens))
        return found

    def body(self, model: str, text: str, tokens: int) -> dict[str, object]:
        """The JSON of one request: greedy, streaming, with the counts at its end.

        Args:
            model: the name to ask for.
            text: the prompt.
            tokens: the most that it may answer.
        """
        said: dict[str, object] = {"prompt": text}
        if self.endpoint == "chat":
            said = {"messages": [{"role": "user", "content": text}]}
        said |= {"model": model, "max_tokens": tokens, "temperature": 0, "stream": True}
        return said | {"stream_options": {"include_usage": True}} | ({"ignore_eos": True} if self.fixed else {})

    @property
    def path(self) -> str:
        """Behind ``/v1/``."""
        return "chat/completions" if self.endpoint == "chat" else "completions"

    def _count(self, tokens: int, overhead: float) -> int:
        return max(0, round((tokens - overhead) / self.tokens_per_word))

    @staticmethod
    def _words(count: int, generator: np.random.Generator) -> list[str]:
        return [WORDS[index] for index in generator.integers(len(WORDS), size=count)]


def arrivals(rate: float, count: int, *, seed: int) -> Sequence[float]:
    """When each of a stream of independent users comes: (N,) seconds after the start, the first at once.

    Gaps are exponential with mean ``1 / rate``.

    Args:
        rate: requests a second, above 0.
        count: how many.
        seed: of the chance.

    >>> times = arrivals(10.0, 1000, seed=0)
    >>> round(times[-1] / 100, 1), times[0]
    (1.0, 0.0)

    Source: none; a Poisson process.
    """
    gaps = np.random.default_rng((seed, 1)).exponential(1 / rate, count - 1)
    return [0.0, *(float(at) for at in np.cumsum(gaps))]
