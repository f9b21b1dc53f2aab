"""Metrics of a server, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from marlin_cy.serve.scheduler import Counts

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one server.

    Parameters
    ----------
    counts : callable
        Gives the state of the scheduler.

    Attributes
    ----------
    answers : Counter
        HTTP requests for texts, by ``outcome``: ``stop``, ``length``, ``error``, ``gone`` (of the client) or
        ``refused``.
    prompt_tokens, known_tokens, new_tokens : Counter
    first_token, token, answer : Histogram
        Seconds: until the first token, for each later token, of a whole answer.
    """

    def __init__(self, counts: Callable[[], Counts]) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.answers = Counter("marlin_cy_requests", "Requests for texts", ["outcome"], registry=registry)
        self.prompt_tokens = Counter("marlin_cy_prompt_tokens", "Tokens of prompts", registry=registry)
        self.known_tokens = Counter(
            "marlin_cy_cached_prompt_tokens", "Tokens of prompts that were in the cache", registry=registry
        )
        self.new_tokens = Counter("marlin_cy_generated_tokens", "Tokens of texts", registry=registry)
        self.first_token = Histogram(
            "marlin_cy_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=registry
        )
        self.token = Histogram(
            "marlin_cy_token_seconds", "Between tokens, mean of a request", buckets=TOKEN_SECONDS, registry=registry
        )
        self.answer = Histogram(
            "marlin_cy_request_seconds", "From a request to its end", buckets=SECONDS, registry=registry
        )
        for name, words in (
            ("running", "Texts that are being written"),
            ("waiting", "Texts that wait for their turn"),
            ("kept", "Sequences that are kept for requests that begin alike"),
            ("free_tokens", "Positions of the cache that nothing holds"),
            ("computed", "Tokens that the model has computed"),
            ("put_back", "Times that a text was put back because the cache was full"),
        ):
            gauge = Gauge(f"marlin_cy_{name}", words, registry=registry)
            gauge.set_function(lambda name=name: float(getattr(counts(), name)))  # type: ignore[misc]

    def page(self) -> bytes:
        """All metrics."""
        return bytes(generate_latest(self._registry))
