"""What the server counts, in the format of Prometheus."""

import time
from collections.abc import Callable, Iterator, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from pjrlhf.serving.catalogue import Voice
from pjrlhf.serving.engine import Engine
from pjrlhf.serving.prefix import PrefixCache
from pjrlhf.serving.tickets import Ticket


class Metrics:
    """What /metrics shows, in the format of Prometheus."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(f"pjrlhf_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> prometheus_client.Histogram:
            seconds = [0.01 * 2**i for i in range(14)]
            return prometheus_client.Histogram(f"pjrlhf_{name}_seconds", text, buckets=seconds, registry=self.registry)

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            prometheus_client.Gauge(f"pjrlhf_{name}", text, registry=self.registry).set_function(value)

        self.requests = counter("requests", "Requests by path and status.", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts that the prefix cache had.")
        self.generated_tokens = counter("generated_tokens", "Tokens of answers.")
        self.ingredient_requests = counter("ingredient_requests", "Requests with a weight for it.", "ingredient")
        self.ingredient_tokens = counter("ingredient_tokens", "Tokens of answers with a weight for it.", "ingredient")
        self.first_token = histogram("time_to_first_token", "From the request to its first token.")
        self.duration = histogram("request", "From the request to its last token.")
        gauge("requests_waiting", "Requests in the queue.", lambda: engine.waiting)
        gauge("answers_running", "Answers in slots.", lambda: engine.running)
        prefixes = engine.prefill.prefixes
        gauge("prefix_cache_bytes", "Bytes of keys and values in the prefix cache.", lambda: prefixes.bytes)
        self.registry.register(_Lookups(prefixes))

    def count(self, voice: Voice, tickets: Sequence[Ticket], generated: int) -> None:
        """Counts a request after its end."""
        self.prompt_tokens.inc(sum(len(ticket.request.tokens) for ticket in tickets))
        self.cached_tokens.inc(sum(ticket.cached_tokens for ticket in tickets))
        self.generated_tokens.inc(generated)
        for name in voice.weights:
            self.ingredient_requests.labels(name).inc()
            self.ingredient_tokens.labels(name).inc(generated)
        for ticket in tickets:
            if ticket.first is not None:
                self.first_token.observe(ticket.first - ticket.submitted)
                self.duration.observe(time.monotonic() - ticket.submitted)


class _Lookups(Collector):
    """What the prefix cache counts by itself."""

    def __init__(self, prefixes: PrefixCache):
        self._prefixes = prefixes

    def collect(self) -> Iterator[CounterMetricFamily]:
        text = "Whole chunks of prompts that were looked up in the prefix cache, by result."
        family = CounterMetricFamily("pjrlhf_prefix_cache_chunks", text, labels=["result"])
        family.add_metric(["hit"], self._prefixes.hits)
        family.add_metric(["miss"], self._prefixes.misses)
        yield family
