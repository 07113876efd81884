"""LiteLLM's client judges the server as a second one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turnout import generate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("litellm") is None, reason="LiteLLM is not installed"),
]


def wanted(served, ids: list[int], tokens: int) -> str:
    made = generate(served.lm, [ids], tokens=tokens, temperature=0, eos=0, tokenizer=served.tokenizer)
    return made.text_B[0]


def test_it_reads_what_generate_makes(served):
    script = Path(__file__).with_name("litellm_client.py")
    local = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [sys.executable, "-W", "ignore", str(script), f"{served.url}/v1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=local, timeout=120)
    line = next((one for one in done.stdout.splitlines() if one.startswith("FOUND ")), None)
    assert line is not None, done.stderr
    found = json.loads(line.removeprefix("FOUND "))
    chat = served.tokenizer.encode("<user>line 3\n<assistant>").ids
    assert found["whole"] == found["streamed"] == wanted(served, chat, 20)
    assert found["tokens"] > 0
    assert found["text"] == wanted(served, [0, *served.tokenizer.encode("the cat").ids], 9)
    assert found["several"] == [wanted(served, chat, 12)] * 4
    assert "maximum context length" in found["long"]
    assert "does not exist here" in found["other"]
