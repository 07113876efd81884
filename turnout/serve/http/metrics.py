"""Metrics for Prometheus, by the names that vLLM has for them, with ``turnout_`` before."""

from collections.abc import Callable, Iterator
from typing import Any

from turnout.errors import MissingExtraError
from turnout.serve.engine import EngineStats, Finished
from turnout.serve.viewer.state import Shared

__all__ = ["Meters"]

_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NEXT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Meters:
    """Counts what is answered, and reads the engine when it is asked.

    Args:
        model: the served name, a label of all.
        stats: how the engine does.
        live: whether counts of experts in slots are told as they are, rather than of many tokens at a time: what one
            token fetched says which experts it took (``turnout.serve.viewer.Shared``).

    Raises:
        MissingExtraError: prometheus-client is not installed.

    >>> meters = Meters("m", lambda: EngineStats(alive=True, slots=4, running=2))
    >>> meters.first(0.02)
    >>> b'turnout_num_requests_running{model_name="m"} 2.0' in meters.page()[0]
    True

    Source: the metrics of vLLM.
    """

    def __init__(self, model: str, stats: Callable[[], EngineStats], *, live: bool = False) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            why = "turnout serve needs prometheus-client"
            raise MissingExtraError(f"{why}. Nearest fix: pip install 'turnout[serve]'.") from error
        self._client: Any = prometheus_client
        self._registry = prometheus_client.CollectorRegistry()
        self._model, self._stats, self._shared = model, stats, Shared(live=live)

        def made(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
            found = kind(f"turnout_{name}", text, ("model_name", *labels), registry=self._registry, **options)
            return found if labels else found.labels(model)

        histogram, counter = prometheus_client.Histogram, prometheus_client.Counter
        self._first = made(
            histogram, "time_to_first_token_seconds", "From arrival to the first token", buckets=_FIRST_S
        )
        self._next = made(histogram, "inter_token_latency_seconds", "From one token to the next", buckets=_NEXT_S)
        self._whole = made(histogram, "e2e_request_latency_seconds", "From arrival to the last token", buckets=_WHOLE_S)
        self._prompt = made(histogram, "request_prompt_tokens", "Tokens of a prompt", buckets=_TOKENS)
        self._output = made(histogram, "request_generation_tokens", "Tokens of an answer", buckets=_TOKENS)
        self._http = made(counter, "http_requests", "Requests by path and status", ("path", "status"))
        self._ended = made(counter, "request_success", "Texts by how they ended", ("finished_reason",))
        self._registry.register(self)

    def first(self, seconds: float) -> None:
        """A first token came so long after its request."""
        self._first.observe(seconds)

    def next(self, seconds: float) -> None:
        """A token came so long after the one before."""
        self._next.observe(seconds)

    def ended(self, end: Finished, seconds: float) -> None:
        """A text has ended, so long after its request came."""
        self._whole.observe(seconds)
        self._prompt.observe(end.prompt_tokens)
        self._output.observe(end.output_tokens)
        self._ended.labels(self._model, end.reason).inc()

    def answered(self, path: str, status: int) -> None:
        """A request is over; without a status its client had gone before."""
        self._http.labels(self._model, path or "other", str(status or 499)).inc()

    def page(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its media type."""
        return self._client.generate_latest(self._registry), self._client.CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        """The engine's own numbers, as prometheus-client asks for them."""
        stats = self._stats()
        gauge, counter = self._client.metrics_core.GaugeMetricFamily, self._client.metrics_core.CounterMetricFamily
        used = stats.pages_used / stats.pages if stats.pages else 0.0
        for kind, name, text, value in (
            (gauge, "num_requests_running", "Texts that go on", stats.running),
            (gauge, "num_requests_waiting", "Texts that wait for a slot", stats.waiting),
            (gauge, "num_requests_max", "Texts that may go on at once", stats.slots),
            (gauge, "engine_alive", "Whether the engine runs", int(stats.alive)),
            (gauge, "kv_cache_usage_perc", "Share of the pages that texts hold, 1 for all", used),
            (gauge, "kv_cache_pages", "Pages of keys and values", stats.pages),
            (gauge, "kv_cache_pages_kept", "Pages of prompts that are kept for others", stats.pages_kept),
            (gauge, "step_batch_size", "Texts of the last step", stats.step_rows),
            (counter, "prompt_tokens", "Tokens of prompts that were read", stats.tokens_in),
            (counter, "generation_tokens", "Tokens that were made", stats.tokens_out),
            (counter, "prefix_cache_queries", "Tokens of prompts", stats.tokens_in + stats.tokens_cached),
            (counter, "prefix_cache_hits", "Tokens of prompts that had been read before", stats.tokens_cached),
            (counter, "num_preemptions", "Texts that gave up their pages for a while", stats.preempted),
        ):
            family = kind(f"turnout_{name}", text, labels=("model_name",))
            family.add_metric((self._model,), value)
            yield family
        told = self._shared.of(stats)["counts"]
        counts = {name: value for name, value in told.items() if isinstance(value, int | float)}
        if counts:
            family = gauge("turnout_engine_count", "Further numbers of the engine", labels=("model_name", "name"))
            for name, value in counts.items():
                family.add_metric((self._model, name), value)
            yield family
