"""Metrics of a server, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference_shardformer.engine.outputs import StepStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "inference_shardformer"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """What one server counts, in a registry of its own. Any thread may note something."""

    def __init__(self, *, num_blocks: int) -> None:
        self._registry = CollectorRegistry()
        self._responses = self._counter("http_responses", "Answers, when they begin.", "route", "status")
        self._requests = self._counter("requests", "Requests to the engine that have ended.", "finish_reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that have ended.")
        self._tokens = self._counter("generated_tokens", "Tokens that were handed out.")
        self._steps = self._counter("steps", "Steps of the engine that ran a model.")
        self._running = self._gauge("requests_running", "Requests in the present step.")
        self._waiting = self._gauge("requests_waiting", "Requests that wait to run.")
        self._free_blocks = self._gauge("cache_blocks_free", "Blocks of the paged cache that hold nothing.")
        self._blocks = self._gauge("cache_blocks", "Blocks of the paged cache.")
        self._blocks.set(num_blocks)
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._next = self._histogram("time_per_output_token_seconds", "Between two tokens of a request.")
        self._whole = self._histogram("request_seconds", "From the request to its last token.")
        for reason in ("stop", "length", "abort", "error"):
            self._requests.labels(reason)

    def note_response(self, route: str, status: int) -> None:
        """An answer begins."""
        self._responses.labels(route, str(status)).inc()

    def note_step(self, stats: StepStats) -> None:
        """A step has ended."""
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._free_blocks.set(stats.num_free_blocks)
        if stats.num_prefill_tokens + stats.num_decode_tokens:
            self._steps.inc()

    def note_tokens(self, num_tokens: int, seconds: float, *, are_first: bool) -> None:
        """Tokens have come, so long after the request or after those before."""
        self._tokens.inc(num_tokens)
        if are_first:
            self._first.observe(seconds)
            return
        for _ in range(num_tokens):
            self._next.observe(seconds / num_tokens)

    def note_end(self, finish_reason: str, *, num_prompt_tokens: int, seconds: float) -> None:
        """A request has ended: "stop", "length", "abort" or "error"."""
        self._requests.labels(finish_reason).inc()
        self._prompt_tokens.inc(num_prompt_tokens)
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", words, labels, registry=self._registry)

    def _gauge(self, name: str, words: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", words, registry=self._registry)

    def _histogram(self, name: str, words: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", words, registry=self._registry, buckets=_SECONDS)
