"""What an answer must keep to in order to be worth anything to its user."""

import dataclasses
import math
import re

from turnout.errors import UsageError, word

__all__ = ["Slo"]

_KEYS = {"ttft": "the first token", "tpot": "a token after it, on average", "itl": "the longest gap", "e2e": "all"}


@dataclasses.dataclass(frozen=True)
class Slo:
    """Limits in seconds for one answer; all of them must be kept. None does not count.

    Args:
        ttft_s: until the first token, from when the request was due.
        tpot_s: from the first token to the last, for each token after the first.
        itl_s: the longest gap between two pieces.
        e2e_s: until the end.

    >>> Slo.parse("ttft=0.5s,itl=50ms")
    Slo(ttft_s=0.5, tpot_s=None, itl_s=0.05, e2e_s=None)

    Source: Zhong et al., "DistServe", 2024, for goodput; where we differ: `itl` bounds each gap, `tpot` their mean.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    e2e_s: float | None = None

    @staticmethod
    def parse(text: str) -> "Slo":
        """Reads ``NAME=TIME,...`` with times in ``ms`` or ``s``.

        Args:
            text: what the user wrote.

        Raises:
            UsageError: an unknown name, a time without a unit, nothing at all.
        """
        found: dict[str, float] = {}
        for part in text.split(","):
            fits = re.fullmatch(r"\s*(\w+)\s*=\s*(\d*\.?\d+)\s*(ms|s)\s*", part)
            if not fits or fits[1] not in _KEYS or f"{fits[1]}_s" in found or not float(fits[2]) > 0:
                names = ", ".join(f"{key} ({says})" for key, says in _KEYS.items())
                allowed, fix = (
                    f"be NAME=TIME, each once, of {names}; times in ms or s",
                    "write --slo ttft=0.5s,itl=50ms",
                )
                raise UsageError(word("--slo", got=text, allowed=allowed, where="turnout bench-serve", fix=fix))
            found[f"{fits[1]}_s"] = float(fits[2]) / (1000 if fits[3] == "ms" else 1)
        return Slo(**found)

    def keeps(self, *, ttft_s: float, tpot_s: float, itl_s: float, e2e_s: float) -> bool:
        """Whether an answer with these times is within all limits.

        Args:
            ttft_s: until its first token.
            tpot_s: for each token after it.
            itl_s: its longest gap.
            e2e_s: until its end.
        """
        took = {"ttft_s": ttft_s, "tpot_s": tpot_s, "itl_s": itl_s, "e2e_s": e2e_s}
        return all(took[name] <= (math.inf if limit is None else limit) for name, limit in vars(self).items())

    def __str__(self) -> str:
        given = {name.removesuffix("_s"): limit for name, limit in vars(self).items() if limit is not None}
        return ", ".join(f"{name} <= {limit:g} s" for name, limit in given.items()) or "none"
