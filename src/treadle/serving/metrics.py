"""Figures for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from treadle.core.meter import Meter

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5.0)


class Metrics:
    """Counted since the server began. Labels take known names only, so their number is bounded."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "treadle_requests", "Answers.", ("path", "status"), registry=registry
        )
        self.prompt_tokens = Counter(
            "treadle_prompt_tokens", "Prompt tokens read.", ("model",), registry=registry
        )
        self.generated_tokens = Counter(
            "treadle_generated_tokens", "Tokens generated.", ("model",), registry=registry
        )
        self.finished = Counter(
            "treadle_completions", "Completions that ended.", ("model", "finish"), registry=registry
        )
        self.open = Gauge(
            "treadle_requests_open", "Requests in hand.", ("model",), registry=registry
        )
        self.waiting = Gauge(
            "treadle_requests_waiting",
            "Requests without a token yet.",
            ("model",),
            registry=registry,
        )
        self.pages = Gauge(
            "treadle_cache_pages_held",
            "Pages of keys and values that requests hold.",
            ("model",),
            registry=registry,
        )
        self.loaded = Gauge(
            "treadle_model_bytes", "Weights loaded; 0 if not.", ("model",), registry=registry
        )
        self.first_token = Histogram(
            "treadle_time_to_first_token_seconds",
            "From a request's arrival at the engine to its first token.",
            ("model",),
            buckets=SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "treadle_inter_token_seconds",
            "Between two tokens of a completion.",
            ("model",),
            buckets=BETWEEN,
            registry=registry,
        )
        self.energy = Gauge(
            "treadle_energy_joules",
            "Used since the server began: by the machine where measured, else by its process.",
            ("source",),
            registry=registry,
        )
        self.duration = Histogram(
            "treadle_request_seconds",
            "Whole requests.",
            ("path",),
            buckets=SECONDS,
            registry=registry,
        )

    def watch(self, meter: Meter) -> None:
        """Tell the energy that this meter counts."""
        cost = meter.cost()
        self.energy.labels(cost.energy).set_function(lambda: meter.cost().joules)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
