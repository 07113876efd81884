"""Asks the server at a URL through LiteLLM, in a process of its own, whose loops and warnings are its own too."""

import asyncio
import json
import sys
from typing import Any

CHAT = {"messages": [{"role": "user", "content": "line 3"}], "temperature": 0}


def ask(litellm: Any, url: str) -> dict[str, Any]:
    """What it answers, and how it refuses."""
    told = {"model": "openai/moe", "api_base": url, "api_key": "none", "max_retries": 0}
    text = {**told, "model": "text-completion-openai/moe"}

    async def several() -> list[str]:
        asks = (litellm.acompletion(**told, **CHAT, max_tokens=12) for _ in range(4))
        return [found.choices[0].message.content for found in await asyncio.gather(*asks)]

    def refused(**settings: object) -> str:
        try:
            litellm.completion(**{**told, **CHAT, **settings})
        except (litellm.exceptions.BadRequestError, litellm.exceptions.NotFoundError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    whole = litellm.completion(**told, **CHAT, max_tokens=20)
    chunks = litellm.completion(**told, **CHAT, max_tokens=20, stream=True)
    return {
        "whole": whole.choices[0].message.content,
        "tokens": whole.usage.completion_tokens,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "text": litellm.text_completion(**text, prompt="the cat", max_tokens=9, temperature=0).choices[0].text,
        "several": asyncio.run(several()),
        "long": refused(max_tokens=1000),
        "other": refused(model="openai/other"),
    }


if __name__ == "__main__":
    import litellm as library

    print("FOUND", json.dumps(ask(library, sys.argv[1])))
