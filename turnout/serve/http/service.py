"""Service: a model, its texts and its limits, as the endpoints share them."""

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from turnout.errors import UsageError
from turnout.reading import parse_json
from turnout.serve.engine import Engine, QueueFull, Request, Ticket
from turnout.serve.http.errors import ApiError, unknown_model
from turnout.serve.http.gate import TICKETS, read_body
from turnout.serve.http.limits import Door, Limits
from turnout.serve.http.metrics import Meters
from turnout.serve.http.sampling import requests
from turnout.serve.http.schema_check import checked
from turnout.serve.http.texts import Texts

__all__ = ["Asked", "Service"]

T = TypeVar("T")
# Work on more characters than this is done in a thread: others are answered meanwhile.
_INLINE = 1 << 14


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request whose fields are checked.

    Args:
        body: its fields.
        model: the name that it is answered by.
        adapter: that name, where it is not the model's own.
        tenant: whose it is.
        where: the endpoint.
        arrived_s: when, by ``time.perf_counter``.
        size: of its body, in bytes.
    """

    body: Mapping[str, Any]
    model: str
    adapter: str | None
    tenant: str
    where: str
    arrived_s: float
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Service:
    """What the endpoints share.

    Args:
        engine: which answers.
        texts: of its model.
        door: who may come.
        limits: what they may take.
        meters: what is counted.
        created: when it began to serve, in seconds since 1970.

    Source: none; plain bookkeeping.
    """

    engine: Engine
    texts: Texts
    door: Door
    limits: Limits
    meters: Meters
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> tuple[str, ...]:
        """By which a request may be answered, the model's own first."""
        return self.engine.models()

    async def asked(self, request: Any, schema: Mapping[str, Any], where: str) -> Asked:
        """A request's fields, checked against the schema of its endpoint.

        Raises:
            ApiError: it is no JSON, or says something that is not taken.
        """
        arrived_s = time.perf_counter()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            # A page elsewhere may send other kinds here without asking first: nothing else is read.
            message = f"The body must be application/json; got {kind or 'no Content-Type'!r:.80}."
            message += " Nearest fix: send the header Content-Type: application/json."
            raise ApiError(message, 415, code="unsupported_media_type")
        raw = await read_body(request.receive, self.limits)
        body = await self.aside(len(raw), lambda: checked(parse_json(raw, _no_json), schema, "", where))
        name = self.names[0] if body.get("model") is None else body["model"]
        if name not in self.names:
            raise unknown_model(name, self.names)
        tenant = self.door.tenant(request.headers.get("authorization", ""))
        adapter = None if name == self.names[0] else name
        return Asked(body, name, adapter, tenant, where, arrived_s, len(raw))

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """What the work gives; in a thread of its own where it is long."""
        return work() if size < _INLINE else await asyncio.to_thread(work)

    async def wanted(
        self,
        asked: Asked,
        prompts: Sequence[tuple[int, ...]],
        *,
        tokens: Sequence[int],
        logprobs: int | None,
        form: Mapping[str, Any] | None,
        form_param: str = "response_format",
    ) -> list[Request]:
        """What the engine is asked: see ``sampling.requests``. A form is made ready in a thread of its own.

        Raises:
            ApiError: a setting that cannot be.
        """
        how: dict[str, Any] = {"adapter": asked.adapter, "tenant": asked.tenant, "where": asked.where}
        how |= {"tokens": tokens, "logprobs": logprobs, "form": form, "form_param": form_param}
        size = asked.size if form is None else _INLINE
        return await self.aside(size, lambda: requests(asked.body, prompts, self.texts, **how))

    def submit(self, wanted: Sequence[Request], request: Any) -> list[Ticket]:
        """Tickets for all of them, or none; they are let go when the request is over, however it ends.

        Raises:
            ApiError: the queue is full, the engine does not run, or they can never be answered.
        """
        stats = self.engine.stats()
        if not stats.alive:
            raise ApiError(f"The engine does not run: {stats.trouble or 'it has not begun'}.", 503, code="engine_dead")
        tickets: list[Ticket] = request.scope[TICKETS]
        try:
            for one in wanted:
                tickets.append(self.engine.submit(one))
        except QueueFull as error:
            later = str(max(1, math.ceil(error.retry_after_s)))
            message = f"Too many requests wait already. Nearest fix: come again in {later} s."
            raise ApiError(message, 429, code="queue_full", headers={"Retry-After": later}) from error
        except UsageError as error:
            raise ApiError(str(error), 400, code="invalid_value") from error
        return list(tickets)


def _no_json(problem: str) -> ApiError:
    message = f"The body must be a JSON object; got {problem:.300}. Nearest fix: send one."
    return ApiError(message, 400, code="invalid_json")
