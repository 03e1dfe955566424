"""Metrics for Prometheus: requests, tokens, times, running and waiting requests; nothing about questions or scans."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from med3dvlm.inference.engine import Generation

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """`stats` gives the engine's numbers: those that end in "_tokens" only rise."""

    def __init__(self, stats: Callable[[], dict[str, float]], scans: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("med3dvlm_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self._finished = Counter("med3dvlm_answers", "Answers by why they ended.", ["finish"], registry=self.registry)
        self._first = Histogram("med3dvlm_first_token_seconds", "From asking to the first token.", registry=self.registry, buckets=SECONDS)
        self._whole = Histogram("med3dvlm_answer_seconds", "From asking to the end.", registry=self.registry, buckets=SECONDS)
        ProcessCollector(registry=self.registry)
        self.registry.register(_Stats(stats, scans))

    def answered(self, answer: Generation) -> None:
        self._finished.labels(answer.finish).inc()
        if answer.tokens:
            self._first.observe(answer.first_seconds)
            self._whole.observe(answer.seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Stats(Collector):
    def __init__(self, stats: Callable[[], dict[str, float]], scans: Callable[[], int]) -> None:
        self._stats, self._scans = stats, scans

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("med3dvlm_scans", "Scans that are kept.", value=self._scans())
        for name, value in self._stats().items():
            kind = CounterMetricFamily if name.endswith("_tokens") else GaugeMetricFamily
            yield kind(f"med3dvlm_{name}", f"The engine's {name.replace('_', ' ')}.", value=value)
