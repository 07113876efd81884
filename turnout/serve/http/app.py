"""The application: the endpoints of OpenAI's API over one engine, as FastAPI serves them."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from turnout import __version__
from turnout.errors import MissingExtraError
from turnout.serve.engine import Engine
from turnout.serve.http import chat, completions, responses, schemas
from turnout.serve.http.errors import ApiError, error_body, unknown_model
from turnout.serve.http.gate import Gate
from turnout.serve.http.limits import Door, Limits
from turnout.serve.http.metrics import Meters
from turnout.serve.http.service import Service
from turnout.serve.http.texts import Texts
from turnout.serve.viewer import viewer_routes

__all__ = ["build_app"]

_ABOUT = "One sparse model, by the API that OpenAI's clients speak."
_POSTED: Mapping[str, tuple[Callable[[Service, Any], Awaitable[Any]], Mapping[str, Any], str]] = {
    completions.WHERE: (completions.completions, schemas.COMPLETIONS, "Go on from prompts"),
    chat.WHERE: (chat.chat, schemas.CHAT, "Say what the assistant says next"),
    responses.WHERE: (responses.responses, schemas.RESPONSES, "Answer, in the newer API's words; nothing is kept"),
}
_STATUS = {404: "There is nothing at", 405: "Another method is wanted at"}


def build_app(
    engine: Engine,
    texts: Texts,
    *,
    door: Door | None = None,
    limits: Limits | None = None,
    viewer: Literal["live", "shared"] | None = None,
) -> Any:
    """An ASGI application that answers from an engine which runs.

    Args:
        engine: a started one.
        texts: of its model.
        door: who may come; by default everybody who calls it by a name of this machine.
        limits: what they may take.
        viewer: whether ``/`` is the page that shows which experts texts take, with counts of experts as they are
            ("live": for those who trust each other) or in steps of many tokens; None for no page.

    Returns:
        A ``fastapi.FastAPI``; its ``state.service`` is what the endpoints share.

    Raises:
        MissingExtraError: what ``turnout[serve]`` brings is not installed.

    >>> from turnout.models.lm import LM, LMConfig
    >>> from turnout.train.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["a cat, a cat"], vocab_size=258)
    >>> lm = LM(LMConfig(vocab_size=258, width=8, layers=1, heads=2))
    >>> with Engine(lm, tokenizer=tokenizer) as engine:
    ...     app = build_app(engine, Texts(tokenizer, vocab_size=258, eos=(0,), own=True))
    >>> "/v1/completions" in app.openapi()["paths"]
    True

    Source: OpenAI's API, as far as it is text.
    """
    try:
        import fastapi
    except ImportError as error:
        raise MissingExtraError("turnout serve needs FastAPI. Nearest fix: pip install 'turnout[serve]'.") from error
    door, limits = door or Door.at("localhost"), limits or Limits()
    service = Service(engine, texts, door, limits, Meters(engine.models()[0], engine.stats, live=viewer == "live"))
    # The pages that would show the schema load scripts from elsewhere: the schema itself is enough.
    app = fastapi.FastAPI(
        title="turnout", version=__version__, description=_ABOUT, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    always = ("/health", "/metrics")
    app.add_middleware(Gate, door=door, limits=limits, meters=service.meters, free=("/", "/health"), always=always)
    _say_errors(app, fastapi)
    _add_posted(app, fastapi, service)
    _add_looks(app, fastapi, service)
    if viewer is not None:
        app.include_router(viewer_routes(engine, live=viewer == "live"))
    return app


def _add_posted(app: Any, fastapi: Any, service: Service) -> None:
    """The endpoints that make something, with the schemas that they check."""
    failed = {"description": "An error, as OpenAI has it", "content": {"application/json": {"schema": _error_schema()}}}

    def posting(endpoint: Callable[[Service, Any], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def posted(request: fastapi.Request) -> Any:
            return await endpoint(service, request)

        return posted

    for path, (endpoint, schema, summary) in _POSTED.items():
        content = {"application/json": {"schema": schema}}
        app.add_api_route(
            path,
            posting(endpoint),
            methods=["POST"],
            summary=summary,
            name=path,
            response_model=None,
            openapi_extra={"requestBody": {"required": True, "content": content}},
            responses=dict.fromkeys((400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504), failed),
        )


def _add_looks(app: Any, fastapi: Any, service: Service) -> None:
    """What can be looked at: the models, whether the server is well, and its numbers."""
    responses = fastapi.responses

    def shown(name: str) -> dict[str, Any]:
        body = {"id": name, "object": "model", "created": service.created, "owned_by": "turnout"}
        parent = None if name == service.names[0] else service.names[0]
        return {**body, "root": service.names[0], "parent": parent, "max_model_len": service.engine.max_seq}

    async def models() -> Any:
        return responses.JSONResponse({"object": "list", "data": [shown(name) for name in service.names]})

    async def model(name: str) -> Any:
        if name not in service.names:
            raise unknown_model(name, service.names)
        return responses.JSONResponse(shown(name))

    async def health(request: fastapi.Request) -> Any:
        stats = service.engine.stats()
        state = "draining" if service.door.draining else "ready" if stats.alive else "dead"
        body = {"status": state, "running": stats.running, "waiting": stats.waiting, "trouble": stats.trouble}
        if stats.trouble and not service.door.knows(request.headers.get("authorization", "")):
            body["trouble"] = "the engine ended"  # an exception's words are for those who have a key
        return responses.JSONResponse(body, status_code=200 if state == "ready" else 503)

    async def metrics() -> Any:
        page, kind = service.meters.page()
        return responses.Response(page, media_type=kind)

    def failed(*codes: int) -> dict[int | str, Any]:
        content = {"application/json": {"schema": _error_schema()}}
        return {code: {"description": "An error, as OpenAI has it", "content": content} for code in codes}

    not_well = {503: {"description": "It ends, or its engine has", "content": {"application/json": {"schema": {}}}}}
    add = app.add_api_route
    add("/v1/models", models, methods=["GET"], response_model=None, summary="What is served")
    add("/v1/models/{name:path}", model, response_model=None, summary="One of them", responses=failed(404))
    add("/health", health, response_model=None, summary="Whether it is well", responses=not_well)
    page = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    add("/metrics", metrics, response_model=None, summary="Its numbers, for Prometheus", responses=page)


def _say_errors(app: Any, fastapi: Any) -> None:
    """Whatever goes wrong is said in OpenAI's format."""

    def said(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Any:
        return fastapi.responses.JSONResponse(body, status_code=status, headers=dict(headers or {}))

    async def refused(request: fastapi.Request, error: Any) -> Any:
        return said(error.status, error.body, error.headers)

    async def http(request: fastapi.Request, error: Any) -> Any:
        words = _STATUS.get(error.status_code, f"{error.detail}:")
        known = ", ".join(sorted(("/v1/models", *_POSTED)))
        allowed = (error.headers or {}).get("Allow") if error.status_code == 405 else None
        fix = f"send {allowed}" if allowed else f"use {known}"
        message = f"{words} {request.method} {request.url.path:.200}. Nearest fix: {fix}."
        body = error_body(message, kind="invalid_request_error", code=f"http_{error.status_code}")
        return said(error.status_code, body, error.headers)

    async def invalid(request: fastapi.Request, error: Any) -> Any:
        message = f"The request must be as /openapi.json says; got {error.errors()!s:.300}. Nearest fix: correct it."
        return said(422, error_body(message, kind="invalid_request_error", code="invalid_request"))

    async def broken(request: fastapi.Request, error: Exception) -> Any:
        message = f"The server made a mistake ({type(error).__name__}). Nearest fix: ask again, and report it."
        return said(500, error_body(message, kind="server_error", code="internal_error"))

    app.add_exception_handler(ApiError, refused)
    for status in (404, 405):
        app.add_exception_handler(status, http)
    app.add_exception_handler(fastapi.HTTPException, http)
    app.add_exception_handler(fastapi.exceptions.RequestValidationError, invalid)
    app.add_exception_handler(Exception, broken)


def _error_schema() -> dict[str, Any]:
    texts = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": texts, "code": texts}
    inside = {"type": "object", "required": list(fields), "properties": fields}
    return {"type": "object", "required": ["error"], "properties": {"error": inside}}
