"""What policies learn from a recorded trace, in a file: a profile, the recorded texts, and a predictor of paths."""

import dataclasses
from pathlib import Path
from typing import Self

import numpy as np
import torch

from turnout.decide.device.cache.route_predictor import RoutePredictor, learn_routes
from turnout.decide.device.cache.trace_matching import recorded_texts
from turnout.errors import CheckpointError, ShapeError, word
from turnout.storage import load_tensors, save_tensors
from turnout.types.accesses import Accesses
from turnout.types.expert_cache import CacheShape

__all__ = ["Learnt"]

FORMAT = "turnout-expert-profile-1"
_WHERE = "turnout.decide.device.cache.Learnt"
_OF = "predictor."


@dataclasses.dataclass(frozen=True, eq=False)
class Learnt:
    """What ``Static``, ``TraceMatching`` and ``ExpertFlow`` go by, of the same recorded texts.

    Args:
        profile_LE: (L, E) how often each expert was used.
        library_NLE: (N, L, E) the uses of each recorded text.
        predictor: of paths.

    >>> import tempfile
    >>> told = Accesses.of_paths(np.array([[[0], [1]], [[1], [0]]] * 20), experts=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Learnt.of(told, seed=0, steps=5).save(Path(folder, "learnt"))
    ...     Learnt.open(Path(folder, "learnt")).profile_LE.tolist()
    [[20.0, 20.0], [20.0, 20.0]]

    Source: see the three; the file format of safetensors.
    """

    profile_LE: np.ndarray
    library_NLE: np.ndarray
    predictor: RoutePredictor

    @classmethod
    def of(cls, accesses: Accesses, *, seed: int, steps: int = 300) -> Self:
        """From recorded texts.

        Args:
            accesses: what they asked for.
            seed: of the predictor's start.
            steps: of its training.
        """
        profile_LE = accesses.used().sum(0).astype(np.float64)
        library_NLE = recorded_texts(accesses).astype(np.float64)
        return cls(profile_LE, library_NLE, learn_routes(accesses, seed=seed, steps=steps))

    def check(self, shape: CacheShape) -> None:
        """Whether it was learnt from a model of these sizes.

        Raises:
            ShapeError: from one of others.
        """
        layers, experts = self.profile_LE.shape
        if (layers, experts) != (shape.layers, shape.experts):
            got, allowed = f"{layers} layers of {experts}", f"be of {shape.layers} layers of {shape.experts} experts"
            fix = "record a trace of this model, and learn from that: turnout cache TRACE --save FILE"
            raise ShapeError(word("what was learnt", got=got, allowed=allowed, where=_WHERE, fix=fix))

    def save(self, path: str | Path) -> None:
        """Writes it to a safetensors file, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        predictor = self.predictor
        arrays = {"profile": self.profile_LE, "library": self.library_NLE, "affinity": predictor.affinity_MEE}
        arrays |= {"uses": predictor.uses_L, "half": np.array(predictor.half)}
        arrays |= {f"{_OF}{name}": weight for name, weight in predictor.weights.items()}
        tensors = {name: torch.from_numpy(np.array(array, np.float64)) for name, array in arrays.items()}
        save_tensors(Path(path), tensors, {"format": FORMAT})

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """What is in such a file.

        Raises:
            CheckpointError: it is not there, is no such file, or was altered.
        """
        path = Path(path)

        def refuse(problem: str) -> CheckpointError:
            fix = "make it: turnout eval RUN --trace TRACE, then turnout cache TRACE --save FILE"
            allowed = "be what turnout cache --save wrote"
            got = f"{path} ({problem})"
            return CheckpointError(word("what policies learnt", got=got, allowed=allowed, where=_WHERE, fix=fix))

        about, tensors = load_tensors(path, refuse, {"format"}, any_link=True)
        if about.get("format") != FORMAT:
            raise refuse(f"format {about.get('format')!r:.40}")
        found = {name: tensor.numpy() for name, tensor in tensors.items()}
        if problem := _problem(found):
            raise refuse(problem)
        weights = {name.removeprefix(_OF): found[name] for name in found if name.startswith(_OF)}
        predictor = RoutePredictor(weights, found["affinity"], found["uses"], float(found["half"]))
        return cls(found["profile"], found["library"], predictor)


def _problem(found: dict[str, np.ndarray]) -> str | None:
    """What keeps these arrays from being what was learnt; None where nothing does."""
    profile = found.get("profile")
    if profile is None or profile.ndim != 2 or not profile.size:
        return "no profile (L, E)"
    (layers, experts), pages = profile.shape, profile.size
    b_H, t_VH = found.get(f"{_OF}A", profile), found.get(f"{_OF}t", profile)
    hidden, words, texts = b_H.shape[-1], len(t_VH), len(found.get("library", profile))
    shapes: dict[str, tuple[int, ...]] = {
        "profile": (layers, experts), "library": (texts, layers, experts), "uses": (layers,), "half": (),
        "affinity": (max(0, layers - 1), experts, experts), f"{_OF}A": (pages, hidden), f"{_OF}C": (pages, hidden),
        f"{_OF}W": (hidden, pages), f"{_OF}b": (pages,), f"{_OF}d_p": (pages,), f"{_OF}d_w": (pages,),
        f"{_OF}t": (words, hidden),
    }  # fmt: skip
    if set(found) != set(shapes):
        return f"tensors {', '.join(sorted(set(found) ^ set(shapes)))} too many or too few"
    for name, shape in shapes.items():
        array = found[name]
        if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
            return f"{name} of shape {array.shape} and {array.dtype}, or with numbers that are not finite"
    return None if texts and words and found["half"] > 0 else "no texts, no tokens, or a half-life that is not above 0"
