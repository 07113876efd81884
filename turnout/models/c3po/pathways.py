"""Pathways: what a model was right about, how it was routed there, and how to find what is alike."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.errors import CheckpointError, ShapeError, UsageError, word
from turnout.models.c3po.rerouted import batch_of, own_scores
from turnout.models.contrast import by_score
from turnout.models.lm import LM
from turnout.reading import read_json
from turnout.storage import load_tensors, save_tensors, write_whole

__all__ = ["Encoder", "Pathways", "embedded"]

# Token ids of prompts in, (N, any) numbers out: those of like prompts lie close to each other.
Encoder = Callable[[Sequence[Sequence[int]]], Tensor]
_FORMAT = "turnout.pathways/1"
_WHERE = "turnout.models.Pathways"
_ROWS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Pathways:
    """A reference set: prompts that a model went on from rightly, and the experts that each one's last token took.

    Args:
        prompts: N of them, token ids.
        answers: what comes after each.
        score_NLE: (N, L, E) the routers' scores at the last token of each prompt, in all routed layers.
        embedding_ND: (N, D) of length 1, by which like prompts are found.
        encoder: "model" for the mean of the model's own last hidden states over a prompt, "given" for another.
        routers: SHA-256 of the routers that the scores are of.
        asked: how many prompts there were, with those that the model was wrong about.

    >>> from turnout.models import LMConfig, MoEConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, moe=MoEConfig(4, 2, 8))).eval()
    >>> right = lm.generate([[3, 1, 4], [1, 5]], tokens=1, temperature=0)[:, -1:].tolist()
    >>> found = Pathways.record(lm, [[3, 1, 4], [1, 5], [2]], [*right, [15]])
    >>> found.score_NLE.shape, found.asked
    (torch.Size([2, 2, 4]), 3)

    Source: Li et al., 2025, "C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for Test-Time Expert
    Re-Mixing". Its embeddings are NV-Embed-v2's; pass that, or another, as ``encoder``.
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    score_NLE: Tensor
    embedding_ND: Tensor
    encoder: str
    routers: str
    asked: int

    @classmethod
    def record(
        cls,
        lm: LM,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        *,
        encoder: Encoder | None = None,
    ) -> Self:
        """Reads prompts with their answers, and keeps those whose answer is what the model says, greedily.

        Args:
            lm: in evaluation mode.
            prompts: token ids.
            answers: one of at least a token for each.
            encoder: gives (N, D) of N prompts; None for the model's own hidden states.

        Raises:
            ShapeError: not as many answers as prompts, or an empty one.
            UsageError: routers that do not choose by a token's own scores, or nothing that the model is right about.
        """
        by_score(lm, _WHERE)
        if len(prompts) != len(answers) or not all(map(len, prompts)) or not all(map(len, answers)):
            got = (
                f"{len(prompts)} prompts and {len(answers)} answers" if len(prompts) != len(answers) else "an empty one"
            )
            allowed, fix = "be one answer for each prompt, all of a token or more", "leave what is empty out"
            raise ShapeError(word("prompts and answers", got=got, allowed=allowed, where=f"{_WHERE}.record", fix=fix))
        kept, scores, states = [], [], []
        for start in range(0, len(prompts), _ROWS):
            rows = range(start, min(start + _ROWS, len(prompts)))
            batch = batch_of([prompts[row] for row in rows], [answers[row] for row in rows], lm.embedding.device)
            score_BLE, hidden_BSD, _ = own_scores(lm, batch)
            with torch.no_grad():
                said_BS = lm.scores(hidden_BSD).argmax(2)
            for place, row in enumerate(rows):
                first = int(batch.last_B[place])
                if said_BS[place, first : first + len(answers[row])].tolist() == list(answers[row]):
                    kept.append(row)
                    scores.append(score_BLE[place])
                    states.append(hidden_BSD[place, : first + 1].mean(0))
        if not kept:
            fix = "record what it can do, or train it first"
            got = f"{len(prompts)} prompts that it answers otherwise"
            raise UsageError(word("the answers", got=got, allowed="hold some that are right", where=_WHERE, fix=fix))
        right = [tuple(map(int, prompts[row])) for row in kept]
        state_ND = torch.stack(states) if encoder is None else embedded(lm, right, encoder)
        return cls(
            prompts=tuple(right),
            answers=tuple(tuple(map(int, answers[row])) for row in kept),
            score_NLE=torch.stack(scores).float(),
            embedding_ND=F.normalize(state_ND.float(), dim=1),
            encoder="model" if encoder is None else "given",
            routers=of_routers(lm),
            asked=len(prompts),
        )

    def check(self, lm: LM, encoder: Encoder | None) -> None:
        """Refuses a model or an encoder other than those that these were recorded with.

        Raises:
            UsageError: another one.
        """
        if of_routers(lm) != self.routers:
            allowed, fix = "be the model that the pathways are of: their scores are its routers'", "record them with it"
            raise UsageError(word("the model", got="one with other routers", allowed=allowed, where=_WHERE, fix=fix))
        if (encoder is None) != (self.encoder == "model"):
            got = "none" if encoder is None else "one"
            fix = "pass encoder=..., the one that they were recorded with" if encoder is None else "leave it out"
            allowed = f"be that of the pathways, which is {self.encoder!r}"
            raise UsageError(word("encoder", got=got, allowed=allowed, where=_WHERE, fix=fix))

    def save(self, folder: str | Path) -> None:
        """Writes ``pathways.safetensors`` and ``pathways.json``, the tokens.

        Raises:
            StorageError: they cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"score_NLE": self.score_NLE, "embedding_ND": self.embedding_ND}
        save_tensors(folder / "pathways.safetensors", tensors, {"format": _FORMAT, "routers": self.routers})
        body = {"format": _FORMAT, "encoder": self.encoder, "routers": self.routers, "asked": self.asked}
        body |= {"prompts": self.prompts, "answers": self.answers}
        write_whole(folder / "pathways.json", json.dumps(body) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What ``save`` wrote.

        Raises:
            CheckpointError: missing, damaged, or not what it says.
        """
        folder = Path(folder)

        def refuse(problem: object) -> CheckpointError:
            allowed, fix = "hold what Pathways.save wrote", "record them again"
            got = f"{folder} ({problem})"
            return CheckpointError(word("the folder", got=got, allowed=allowed, where=f"{_WHERE}.load", fix=fix))

        try:
            body: Any = read_json(folder / "pathways.json", refuse=refuse)
        except OSError as error:
            raise refuse(error) from error
        meta, tensors = load_tensors(folder / "pathways.safetensors", refuse, ("format", "routers"))
        if body.get("format") != _FORMAT or meta.get("routers") != body.get("routers"):
            raise refuse("two files that do not belong together")
        try:
            prompts, answers = (tuple(tuple(map(int, one)) for one in body[name]) for name in ("prompts", "answers"))
            told: dict[str, Any] = {name: body[name] for name in ("encoder", "routers", "asked")}
            made = cls(prompts, answers, tensors["score_NLE"], tensors["embedding_ND"], **told)
            fits = len(prompts) == len(answers) == len(made.score_NLE) == len(made.embedding_ND)
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(error) from error
        if not fits or made.score_NLE.ndim != 3 or made.embedding_ND.ndim != 2:
            raise refuse("prompts, answers and tensors of different numbers")
        return made


def embedded(lm: LM, prompts: Sequence[Sequence[int]], encoder: Encoder | None) -> Tensor:
    """(N, D) of length 1, what prompts are compared by.

    Raises:
        ShapeError: the encoder gives something else.
    """
    if encoder is None:
        batch = batch_of(prompts, [(0,)] * len(prompts), lm.embedding.device)
        _, hidden_BSD, real_BS = own_scores(lm, batch)
        found = (hidden_BSD * real_BS[..., None]).sum(1) / batch.length_B[:, None]
    else:
        found = encoder(prompts)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(prompts):
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            fix, allowed = "return a tensor (N, D)", f"give one row for each of {len(prompts)} prompts"
            raise ShapeError(word("the encoder", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return F.normalize(found.float(), dim=1)


def of_routers(lm: LM) -> str:
    """SHA-256 over the weights of all routers, in fp32."""
    sums = hashlib.sha256()
    for router in lm.routers:
        for name, tensor in sorted({**router.state_dict()}.items()):
            sums.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sums.hexdigest()
