"""The metrics table: every metric of ours, once. Engine metrics are vLLM's own, under vLLM's names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_STAGE_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


class IngressMetrics:
    """What an ingress counts. Pass a registry of its own where several live in one process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "pdserve_requests", "Requests that ended, by outcome", ["outcome"], registry=registry
        )
        self.moves = Counter(
            "pdserve_request_moves",
            "Requests moved to other instances after a failure",
            ["cause", "stage"],
            registry=registry,
        )
        self.migrations = Counter(
            "pdserve_migrations",
            "Running requests that were told to go on at another instance, their KV handed over",
            ["cause"],
            registry=registry,
        )
        self.migration_stall_seconds = Histogram(
            "pdserve_migration_stall_seconds",
            "From the last token of one decode instance to the first of the next",
            buckets=_STAGE_BUCKETS_S,
            registry=registry,
        )
        self.refusals = Counter(
            "pdserve_refusals",
            "Requests that an instance was too busy to take, and that were offered elsewhere",
            ["role"],
            registry=registry,
        )
        self.instances = Gauge(
            "pdserve_instances", "Instances this ingress reaches", ["role", "state"], registry=registry
        )
        self.kv_tokens_moved = Counter(
            "pdserve_kv_tokens_moved",
            "KV tokens a decode instance read from a prefill instance",
            registry=registry,
        )
        self.kv_bytes_moved = Counter(
            "pdserve_kv_bytes_moved",
            "Bytes of those tokens over all layers, by the way: within a node or over the network",
            ["link"],
            registry=registry,
        )
        self.kv_tokens_recomputed = Counter(
            "pdserve_kv_tokens_recomputed",
            "KV tokens a decode instance computed although a prefill instance had them ready",
            registry=registry,
        )
        self.kv_released = Counter(
            "pdserve_kv_handles_released",
            "Handles released because nobody would read them",
            registry=registry,
        )
        self.prediction_seconds = Histogram(
            "pdserve_prediction_seconds",
            "TTFT and TPOT of requests that ended well: as predicted at their decision, and as they came",
            ["what", "kind"],
            buckets=_STAGE_BUCKETS_S,
            registry=registry,
        )
        # Looked up once: a lookup by label costs more than the observation.
        self._predictions = {
            what: [self.prediction_seconds.labels(what, kind) for kind in ("predicted", "actual")]
            for what in ("ttft", "tpot")
        }
        self.stage_seconds = Histogram(
            "pdserve_stage_seconds",
            "Prefill: from its sending to its token; transfer: from the hand-over to the first decoded token",
            ["stage"],
            buckets=_STAGE_BUCKETS_S,
            registry=registry,
        )

    def predicted(self, what: str, predicted_s: float, actual_s: float | None) -> None:
        """Count a prediction of `ttft` or `tpot` with what came; nothing where nothing came."""
        if actual_s is None:
            return
        for series, seconds in zip(self._predictions[what], (predicted_s, actual_s), strict=True):
            series.observe(seconds)
