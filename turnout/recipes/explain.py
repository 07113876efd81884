"""What ``turnout train RECIPE --show`` prints: every field of a run, its value and what it means."""

import inspect
import json
import re
from collections.abc import Iterator

from turnout.fields import plain
from turnout.models.config import MLAConfig, MoEConfig
from turnout.models.lm import LMConfig
from turnout.recipes.run import DataConfig, Run, Start
from turnout.train.config import TrainConfig

_SECTIONS = {
    "data": DataConfig,
    "model": LMConfig,
    "model.moe": MoEConfig,
    "model.mla": MLAConfig,
    "train": TrainConfig,
    "start": Start,
    "teacher": Start,
}
_ARGUMENT = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def explain(run: Run) -> Iterator[str]:
    """The fields line by line, as ``field=value``, each with what it means.

    >>> from turnout.recipes import tiny
    >>> print(next(line for line in explain(tiny()) if "train.clip" in line))
      train.clip=1.0                    the largest gradient norm; None leaves gradients alone.

    Source: none; the words are those of the documentation.
    """
    section, meaning = None, {}
    for dotted, value in run.fields().items():
        above, _, name = dotted.rpartition(".")
        if above != section:
            section = above
            meaning = dict(_ARGUMENT.findall(inspect.getdoc(_SECTIONS[section]) or ""))
            yield section
        said = " ".join(meaning.get(name, "").split())
        yield f"  {f'{dotted}={json.dumps(plain(value))}':<33} {said}".rstrip()
