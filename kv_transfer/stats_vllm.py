"""What a connector measures beyond vLLM's NIXL connector: the stages of a transfer, and what moved early.

vLLM carries these lists from the workers to the front end with each step, and calls `observe` there; engines
and ingress load the same connector.
"""

from __future__ import annotations

from typing import Any

from cluster import vllm_api

NixlKVConnectorStats: Any = vllm_api.NixlKVConnectorStats
NixlPromMetrics: Any = vllm_api.NixlPromMetrics
create_metric_per_engine: Any = vllm_api.create_metric_per_engine

# Stage -> what its seconds are counted from and to.
STAGES = {
    "bootstrap": "an engine's KV memory is registered with the transport, once in its life",
    "handshake": "a reader learns how to reach a source's memory, once per source",
    "alloc": "a request waits at its reader for memory, from when its KV can be read on",
    "release": "a source keeps blocks for their reader, from the prompt's end until they are free",
}
_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

# Keys of the lists.
EARLY_BYTES = "pdserve_early_bytes"


def seconds_key(stage: str) -> str:
    """The list of a stage's durations."""
    return f"pdserve_{stage}_s"


_OURS = (EARLY_BYTES, *map(seconds_key, STAGES))


class PdStats(NixlKVConnectorStats):  # type: ignore[misc]
    """vLLM's lists and ours."""

    def reset(self) -> None:
        super().reset()
        self.data |= {key: [] for key in _OURS}

    def is_empty(self) -> bool:
        return super().is_empty() and not any(self.data[key] for key in _OURS)

    def took(self, stage: str, seconds: float) -> None:
        """A stage has taken so long once."""
        self.data[seconds_key(stage)].append(seconds)


class PdPromMetrics(NixlPromMetrics):  # type: ignore[misc]
    """vLLM's metrics and ours."""

    def __init__(self, vllm_config: Any, metric_types: Any, labels: list[str], values: Any) -> None:
        super().__init__(vllm_config, metric_types, labels, values)
        self._stages = {
            stage: create_metric_per_engine(
                self._histogram_cls(
                    name=f"pdserve_kv_{stage}_seconds",
                    documentation=f"Seconds in which {what}",
                    buckets=_BUCKETS_S,
                    labelnames=labels,
                ),
                values,
            )
            for stage, what in STAGES.items()
        }
        self._early = create_metric_per_engine(
            self._counter_cls(
                name="pdserve_kv_bytes_moved_early",
                documentation="Bytes of KV that a rank read while the rest of the prompt was still computed",
                labelnames=labels,
            ),
            values,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        for stage, histograms in self._stages.items():
            for seconds in transfer_stats_data[seconds_key(stage)]:
                histograms[engine_idx].observe(seconds)
        for size in transfer_stats_data[EARLY_BYTES]:
            self._early[engine_idx].inc(size)
