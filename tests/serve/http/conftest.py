"""One server for all tests that only ask it, and its model as a folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import TEMPLATE, Served, make_lm, make_tokenizer, serving


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def served(tokenizer) -> Iterator[Served]:
    with serving(tokenizer) as found:
        yield found


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer) -> Path:
    """The same model as a folder of transformers, with its tokenizer and template."""
    from turnout.models import checkpoint

    place = tmp_path_factory.mktemp("serve") / "moe"
    checkpoint.to_hf(make_lm(), place)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "chat_template.jinja").write_text(TEMPLATE)
    (place / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return place
