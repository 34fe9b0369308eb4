"""Makes NIXL's progress thread sleep between polls.

NIXL 1.5.1's Python API sets `pthrDelay = 0`, and offers no option: the thread then polls without a pause and
takes a whole core per engine, idle or not; on a machine with few cores this slows decoding up to 25 times.
100 us of sleep cost at most as much transfer latency. Drop this file when upstream has an option.
"""

from __future__ import annotations

from typing import Any

PROGRESS_DELAY_US = 100


def calm_progress_thread(delay_us: int = PROGRESS_DELAY_US) -> None:
    """Let every NIXL agent created from now on in this process sleep `delay_us` between polls."""
    from nixl import _api

    stock = _api.nixlBind.nixlAgentConfig
    if getattr(stock, "pdserve_delay_us", None) == delay_us:
        return
    native = getattr(stock, "pdserve_native", stock)

    class CalmAgentConfig(native):  # type: ignore[misc, valid-type]
        pdserve_native = native
        pdserve_delay_us = delay_us

        @property
        def pthrDelay(self) -> Any:
            return native.pthrDelay.__get__(self)

        @pthrDelay.setter
        def pthrDelay(self, value: int) -> None:
            native.pthrDelay.__set__(self, max(value, delay_us))

    _api.nixlBind.nixlAgentConfig = CalmAgentConfig
