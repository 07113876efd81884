"""What a run that goes on may change, and what must stay as it began."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turnout.errors import UsageError, word
from turnout.fields import plain
from turnout.train.config import TrainConfig

__all__ = ["FREE", "PLACE", "check_same"]

# A resumed run may change everything but these: they decide which tokens a step sees and what it draws.
_FIXED = ("batch", "seq", "accumulate", "seed", "only", "rank", "alpha")
# These do not touch the weights, so changing them is nobody's business.
FREE = ("eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints", "log_every")
# What becomes of these is told by itself.
PLACE = ("device", "dtype")


def check_same(body: Mapping[str, Any], config: TrainConfig, tokens_digest: str | None, out: Path) -> None:
    """Refuses to go on from a checkpoint of a run that another configuration or other tokens would make another run.

    Args:
        body: the checkpoint's state.json.
        config: with which it would go on.
        tokens_digest: of the tokens.
        out: the run's folder.

    Raises:
        UsageError: names what differs.

    Source: none; plain bookkeeping.
    """
    now = {**plain(config), "tokens_digest": tokens_digest}
    # What a checkpoint of before says nothing of was as it is by default.
    then = {"only": "all", "rank": None, "alpha": None, **body["config"], "tokens_digest": body["tokens_digest"]}
    for name in (*_FIXED, "tokens_digest"):
        if now[name] != then[name]:
            raise UsageError(
                word(
                    name,
                    got=now[name],
                    allowed=f"stay {then[name]!r}, as the run in {out} began",
                    where="turnout.train, resume",
                    fix=f"pass {name}={then[name]!r}, or start a new run in another --out"
                    if name in _FIXED
                    else "give the same text and tokenizer, or start a new run in another --out",
                )
            )
    if config.steps < body["step"]:
        raise UsageError(
            word(
                "steps",
                got=config.steps,
                allowed=f"be at least the {body['step']} that are done",
                where="turnout.train, resume",
                fix=f"pass steps={then['steps']}",
            )
        )
