"""OpenAI's API over an engine: completions, chat and responses, streamed or whole, with limits and numbers.

engine = Engine(lm, tokenizer=tokenizer, name="moe")
app = build_app(engine, Texts.load(folder / "tokenizer.json", vocab_size=..., eos=..., own=False))
run_server(app, listen("127.0.0.1", 8000))
"""

from turnout.serve.http.app import build_app
from turnout.serve.http.limits import Door, Limits
from turnout.serve.http.server import listen, run_server
from turnout.serve.http.texts import Texts

__all__ = ["Door", "Limits", "Texts", "build_app", "listen", "run_server"]
