"""Those that benchmarks.decoding compares, each in a process of its own that does what it is told.

    python -m benchmarks.decoding_peers NAME THREADS

A line of JSON in, a line of JSON out: ``load`` a model, ``memory``, the ``logits`` of the check, ``begin`` (streams,
and how many tokens they have read), then ``steps``, ``prefill`` or ``generate``, which give CPU and wall seconds. The
tokens of a step are drawn beforehand and are the same for all, so that the experts change as they do in texts; the
likeliest next token is found all the same.
"""

import abc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decoding_models import SHAPES, forced

__all__ = ["PEERS", "Peer", "Server"]

# As many tokens as llama.cpp reads at once by default.
_ONCE = 512


class Peer(abc.ABC):
    """One library with a model."""

    weights_bytes: int

    @abc.abstractmethod
    def __init__(self, folder: Path, shape: str, kind: str, threads: int) -> None:
        """Loads it."""

    @abc.abstractmethod
    def begin(self, streams: int, room: int) -> None:
        """Makes ready for so many streams of so many tokens."""

    @abc.abstractmethod
    def read(self, id_BS: np.ndarray) -> np.ndarray:
        """Forgets all, reads the prompts, and gives (B, V) what comes after each."""

    @abc.abstractmethod
    def step(self, id_B: np.ndarray) -> np.ndarray:
        """(B, V) after one more token of each stream."""

    @abc.abstractmethod
    def generate(self, id_S: np.ndarray, tokens: int) -> list[int]:
        """So many of the likeliest tokens after a prompt, as users ask for them."""

    def fill(self, id_S: np.ndarray, streams: int) -> None:
        """Every stream has read these tokens."""
        self.read(np.repeat(id_S[None], streams, 0))


class Turnout(Peer):
    """turnout's own LM."""

    def __init__(self, folder: Path, shape: str, kind: str, threads: int) -> None:
        import torch

        from turnout.models import checkpoint

        self.torch = torch
        torch.set_num_threads(threads)
        read = checkpoint.from_hf if kind in ("fp32", "bf16") else checkpoint.load
        self.lm = read(folder / kind).eval()
        parts = [*self.lm.parameters(), *self.lm.buffers()]
        self.weights_bytes = sum({one.data_ptr(): one.nbytes for one in parts}.values())

    def begin(self, streams: int, room: int) -> None:
        """A decoder."""
        from turnout.models.decoding import Decoder

        self.decoder = Decoder(self.lm, streams, room)

    def read(self, id_BS: np.ndarray) -> np.ndarray:
        """By its prefill."""
        return self.decoder.prefill(self.torch.from_numpy(id_BS)).float().numpy()

    def step(self, id_B: np.ndarray) -> np.ndarray:
        """By its step."""
        return self.decoder.step(self.torch.from_numpy(id_B)).float().numpy()

    def fill(self, id_S: np.ndarray, streams: int) -> None:
        """One stream reads, the others have a copy of its pages."""
        from turnout.models.decoding.pages import PAGE

        length_B = self.torch.tensor([len(id_S)] + [1] * (streams - 1))
        self.decoder.prefill(self.torch.from_numpy(np.repeat(id_S[None], streams, 0)), length_B)
        steps = self.decoder._steps  # users have no need of copies
        pages, (first, *others) = steps._pages, steps._texts
        for text in others:
            steps._extend([text], first.length, steps=False)
            for layer in range(len(self.lm.blocks)):
                window = self.lm.config.window_of(layer) or first.length
                start = max(0, first.length - window + 1) // PAGE * PAGE
                pages.write(text, layer, start, pages.read(first, layer, start, first.length))
            text.length = first.length
        self.decoder.length_B[:] = len(id_S)

    def read_bytes(self) -> dict[str, Any]:
        """What a step reads: of ``rest`` all, of the embedding a row for each stream, experts, positions of a cache."""
        config, tied = self.lm.config, self.lm.config.tie_embeddings
        banks = [block.ff.bank for block in self.lm.blocks if hasattr(block.ff, "bank")]
        held = [sum(part.nbytes for part in (*bank.parameters(), *bank.buffers())) for bank in banks]
        embedding = self.lm.embedding
        rest = self.weights_bytes - sum(held) - (0 if tied else embedding.nbytes)
        position = 2 * config.layers * config.key_heads * config.head_width * embedding.element_size()
        each = [size / bank.num_experts for size, bank in zip(held, banks, strict=True)]
        return {"rest": rest, "row": embedding[0].nbytes, "expert": each, "position": position}

    def generate(self, id_S: np.ndarray, tokens: int) -> list[int]:
        """By ``turnout.generate``."""
        from turnout.models.generation import generate

        return list(generate(self.lm, [id_S.tolist()], tokens=tokens, temperature=0.0, eos=None).rows[0])[-tokens:]


class Transformers(Peer):
    """transformers, as it comes."""

    def __init__(self, folder: Path, shape: str, kind: str, threads: int) -> None:
        import torch
        import transformers

        self.torch, self.cache = torch, transformers.DynamicCache
        torch.set_num_threads(threads)
        kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
        of = getattr(transformers, f"{SHAPES[shape].family}ForCausalLM")
        self.model = of.from_pretrained(folder / kind, dtype=kept).eval()
        self.weights_bytes = sum(one.nbytes for one in (*self.model.parameters(), *self.model.buffers()))

    def begin(self, streams: int, room: int) -> None:
        """Nothing: its cache grows."""

    def read(self, id_BS: np.ndarray) -> np.ndarray:
        """With a new cache."""
        self.held = self.cache(config=self.model.config)
        return self._scores(id_BS)

    def step(self, id_B: np.ndarray) -> np.ndarray:
        """With the cache."""
        return self._scores(id_B[:, None])

    def fill(self, id_S: np.ndarray, streams: int) -> None:
        """One stream reads, the others have a copy."""
        self.read(id_S[None])
        self.held.batch_repeat_interleave(streams)

    def generate(self, id_S: np.ndarray, tokens: int) -> list[int]:
        """By its own."""
        id_1S = self.torch.from_numpy(id_S)[None]
        asked = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        made = self.model.generate(id_1S, attention_mask=self.torch.ones_like(id_1S), **asked)
        return made[0, -tokens:].tolist()

    def _scores(self, id_BS: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            id_BS = self.torch.from_numpy(id_BS)
            out = self.model(id_BS, past_key_values=self.held, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].float().numpy()


class Adopted(Transformers):
    """transformers with turnout's experts."""

    def __init__(self, folder: Path, shape: str, kind: str, threads: int) -> None:
        super().__init__(folder, shape, kind, threads)
        from turnout import adopt

        adopt(self.model)


class LlamaCpp(Peer):
    """llama.cpp, through its C interface."""

    def __init__(self, folder: Path, shape: str, kind: str, threads: int) -> None:
        from benchmarks.llama_cpp import Llama

        path = folder / f"{kind}.gguf"
        self.llama, self.threads, self.weights_bytes = Llama(path, threads=threads), threads, path.stat().st_size

    def begin(self, streams: int, room: int) -> None:
        """A cache of its own for each stream, which is its fastest way with several."""
        self.llama.renew(context=streams * room, streams=streams, threads=self.threads, apart=True)

    def read(self, id_BS: np.ndarray) -> np.ndarray:
        """As many at once as it takes."""
        self.llama.clear()
        for start in range(0, id_BS.shape[1], once := max(1, _ONCE // len(id_BS))):
            found = self.llama.feed(id_BS[:, start : start + once].tolist())
        return found

    def step(self, id_B: np.ndarray) -> np.ndarray:
        """One token a stream."""
        return self.llama.feed(id_B[:, None].tolist())

    def fill(self, id_S: np.ndarray, streams: int) -> None:
        """One stream reads, the others have a copy."""
        self.llama.clear()
        for start in range(0, len(id_S), _ONCE):
            self.llama.feed([id_S[start : start + _ONCE].tolist()] + [[]] * (streams - 1))
        self.llama.copy_first()

    def generate(self, id_S: np.ndarray, tokens: int) -> list[int]:
        """A loop: it has no function for it."""
        self.begin(1, len(id_S) + tokens)
        found = [int(self.read(id_S[None])[0].argmax())]
        while len(found) < tokens:
            found.append(int(self.step(np.array(found[-1:]))[0].argmax()))
        return found


PEERS: dict[str, type[Peer]] = {
    "turnout": Turnout, "transformers": Transformers, "adopted": Adopted, "llama.cpp": LlamaCpp,
}  # fmt: skip


class Server:
    """What a process does when it is told to.

    Args:
        name: of ``PEERS``.
        threads: how many it may use.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What comes of one request: ``do`` names a method, the rest are its arguments."""
        return getattr(self, asked.pop("do"))(**asked)

    def load(self, folder: str, shape: str, kind: str) -> dict[str, Any]:
        """Loads a model; another one before it is forgotten."""
        self.peer: Any = None
        self.vocabulary = SHAPES[shape].keys["vocab_size"]
        self.peer = PEERS[self.name](Path(folder), shape, kind, self.threads)
        return {"weights_bytes": self.peer.weights_bytes}

    def read_bytes(self) -> dict[str, Any]:
        """What one of turnout's steps reads."""
        return self.peer.read_bytes()

    def memory(self) -> dict[str, Any]:
        """Bytes of this process now, and at most so far."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        status = Path("/proc/self/status")
        lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
        said = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
        # VmHWM is of this program alone: getrusage begins with what the benchmark itself held when it started it.
        return {"resident_bytes": said.get("VmRSS", most), "peak_bytes": said.get("VmHWM", most)}

    def logits(self, path: str) -> dict[str, Any]:
        """Writes (1 + N, B, V): after the prompts of the check, and after each of its steps."""
        prompt_BS, step_NB = forced(self.vocabulary)
        self.peer.begin(len(prompt_BS), prompt_BS.shape[1] + len(step_NB))
        found = [self.peer.read(prompt_BS).copy()] + [self.peer.step(id_B).copy() for id_B in step_NB]
        np.save(path, np.stack(found))
        return {}

    def begin(self, streams: int, context: int, room: int) -> dict[str, Any]:
        """Streams that have read so many tokens, and come to ``room``; none are read for a context of 0."""
        self.streams = streams
        self.peer.begin(streams, room)
        if context:
            self.peer.fill(self._drawn(1, (context,)), streams)
        return {}

    def steps(self, tokens: int, seed: int) -> dict[str, Any]:
        """Goes on for so many tokens a stream."""
        drawn = self._drawn(seed, (tokens, self.streams))
        return self._timed(lambda: [self.peer.step(id_B).argmax(1) for id_B in drawn])

    def prefill(self, tokens: int, seed: int) -> dict[str, Any]:
        """Reads so many."""
        drawn = self._drawn(seed, (self.streams, tokens))
        return self._timed(lambda: self.peer.read(drawn).argmax(1))

    def generate(self, prompt: int, tokens: int, seed: int) -> dict[str, Any]:
        """As users do; gives the tokens too."""
        drawn, found = self._drawn(seed, (prompt,)), list[int]()
        return self._timed(lambda: found.extend(self.peer.generate(drawn, tokens))) | {"tokens": found}

    def _drawn(self, seed: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, self.vocabulary, shape)

    def _timed(self, work: Callable[[], object]) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def main() -> None:
    """Answers until nobody asks."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    name, threads = sys.argv[1], int(sys.argv[2])
    if name == "limit":
        from benchmarks.decoding_limit import Limit

        server: Any = Limit(threads)
    else:
        server = Server(name, threads)
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
