"""Figures for Prometheus, counted where requests come in and answers go out."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from .events import Answered, Begun


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "chat requests that have ended, by HTTP status", "status")
        self.broken = self._counter("streams_broken_off", "streams that ended with an error")
        self.rows = self._counter("rows", "prompts answered, by what zooming did", "reason")
        self.visual = self._counter("visual_tokens", "merged visual tokens that the decoder saw", "view")
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of prompts, crops not counted")
        self.new_tokens = self._counter("completion_tokens", "tokens of answers")
        self.waiting = self._gauge("requests_waiting", "requests that have come and do not run yet")
        self.running = self._gauge("requests_running", "requests in a batch that runs")
        self.whole = self._histogram("request_seconds", "from a request's coming to its end", _SECONDS)
        self.queue = self._histogram("queue_seconds", "from a request's coming to the begin of its batch", _SECONDS)
        self.first = self._histogram("first_token_seconds", "from the begin of a batch to its first word", _SECONDS)
        self.step = self._histogram("step_seconds", "mean time of each later word of an answer", _STEP_SECONDS)
        self.batch = self._histogram("batch_rows", "answers that a batch made together, by request", _ROWS)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"qzoom_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"qzoom_{name}", help, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"qzoom_{name}", help, buckets=buckets, registry=self.registry)

    def begun(self, event: Begun) -> None:
        """Notes that a request's batch runs."""
        self.queue.observe(event.queue_seconds)
        self.batch.observe(event.batch_rows)

    def answered(self, event: Answered) -> None:
        """Notes what an answer took."""
        self.rows.labels(event.reason).inc()
        self.visual.labels("coarse").inc(event.coarse_tokens)
        self.visual.labels("crop").inc(event.crop_tokens)
        self.prompt_tokens.inc(event.prompt_tokens)
        self.new_tokens.inc(sum(choice.tokens for choice in event.choices))
        self.first.observe(event.first_token_seconds)
        if event.step_seconds is not None:
            self.step.observe(event.step_seconds)

    def text(self) -> tuple[bytes, str]:
        """The figures in Prometheus' format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
