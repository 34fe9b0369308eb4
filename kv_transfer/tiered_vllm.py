"""TieredConnector: KV from another instance where there is one to be read, else from main memory or a
directory that all instances share, where blocks went that an engine had no room for.

vLLM's own MultiConnector over `PdConnector` and vLLM's offloading; only what is asked first is ours.
"""

from __future__ import annotations

from typing import Any

from cluster import vllm_api
from kv_transfer.vllm_connector import PdConnector

MultiConnector: Any = vllm_api.MultiConnector
_BY_NAME = {"PdConnector": PdConnector, "OffloadingConnector": vllm_api.OffloadingConnector}


class TieredConnector(MultiConnector):  # type: ignore[misc]
    """The connector that vLLM is told to load where a spec has `tiers`."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        # The stock one asks all, and a request whose KV waits at its source would wait for a look into the
        # directory as well.
        for index, connector in enumerate(self._connectors):
            found: tuple[int | None, bool] = connector.get_num_new_matched_tokens(
                request, num_computed_tokens
            )
            if found[0] is None:
                return found
            if found[0]:
                self._requests_to_connector[request.request_id] = index
                return found
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens:
            # KV is written to them before the request is scheduled, and only then would offloading notice
            # that they are another's now, and finish what it still copies from them.
            host_memory = self._connectors[-1].connector_scheduler
            host_memory._current_batch_allocated_block_ids.update(
                block.block_id for group in blocks.blocks for block in group if not block.is_null
            )

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        # The stock one finds only connectors that are vLLM's own by their names.
        built = {
            name: _BY_NAME[name].build_kv_connector_stats(data=of) if isinstance(of, dict) else of
            for name, of in (data or {}).items()
        }
        return super().build_kv_connector_stats(built)
