"""The viewer at ``/``: the page, and what it asks of the server beside the API itself."""

from collections.abc import Sequence
from typing import Any

from turnout.errors import MissingExtraError
from turnout.serve.engine import Engine
from turnout.serve.viewer.page import document, policy
from turnout.serve.viewer.state import Shared

__all__ = ["viewer_routes"]

_HEADERS = {
    "Content-Security-Policy": f"{policy()}; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def viewer_routes(engine: Engine, *, live: bool = False) -> Any:
    """A FastAPI router with ``/`` and ``/viewer/state``; prompts go to ``/v1/completions``, as everybody's do.

    The page itself holds names alone. Routes of a text reach only whoever asked for that text, in its own stream
    (``routes`` of a completion); the state has sums.

    Args:
        engine: the server's.
        live: whether the state's counts of experts are shown as they are: for a server with one user. Otherwise they go
            on in steps of many tokens.

    Returns:
        A ``fastapi.APIRouter``.

    Raises:
        MissingExtraError: what ``turnout[serve]`` brings is not installed.

    >>> from turnout.models.lm import LM, LMConfig
    >>> engine = Engine(LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2)))
    >>> [route.path for route in viewer_routes(engine).routes]
    ['/', '/viewer/state']

    Source: none; plain bookkeeping.
    """
    try:
        import fastapi
    except ImportError as error:
        raise MissingExtraError("the viewer needs FastAPI. Nearest fix: pip install 'turnout[serve]'.") from error
    router, shared = fastapi.APIRouter(include_in_schema=False), Shared(live=live)

    async def page() -> Any:
        names = engine.models()
        data = {"model": names[0], "models": names, "experts": _experts(engine), "layers": None}
        return fastapi.responses.HTMLResponse(document(data), headers=_HEADERS)

    async def state() -> Any:
        return fastapi.responses.JSONResponse(shared.of(engine.stats()), headers={"Cache-Control": "no-store"})

    router.add_api_route("/", page, methods=["GET"])
    router.add_api_route("/viewer/state", state, methods=["GET"])
    return router


def _experts(engine: Engine) -> Sequence[int]:
    """How many experts each routed layer has, where that is counted; the page learns of others from routes."""
    return [len(row) for row in engine.stats().expert_load]
