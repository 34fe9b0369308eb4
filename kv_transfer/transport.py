"""What moves bytes between the memories of two processes: the protocol that every transport has.

A transport registers the memory that others may read, describes it in bytes that can be sent to them,
connects to what another has described, and reads runs of it. Reads are one-sided: the other's threads take
no part.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from cluster.errors import ServingError
from kv_transfer.plan import Runs


class TransferState(StrEnum):
    """POSTED -> DONE or FAILED, once."""

    POSTED = "posted"
    DONE = "done"
    FAILED = "failed"


class TransferFailed(ServingError):
    """Memory of another process can't be read. Facts: `transport`, `detail`."""

    retryable = True
    http_status = 503
    reason = "transfer-failed"

    transport: str
    detail: str

    def describe(self) -> str:
        return f"reading over {self.transport} failed: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A piece of this process's memory; `device` is the GPU it is on, None for main memory."""

    address: int
    size: int
    device: int | None = None


def are_on_gpu(regions: Sequence[Region]) -> bool:
    """Whether all are on GPUs. Raises ValueError when some are and some are not, and for none."""
    kinds = {region.device is not None for region in regions}
    if len(kinds) != 1:
        raise ValueError("regions must all be in main memory, or all on GPUs, and at least one")
    return kinds.pop()


class Transfer:
    """One read on its way. Its end is an event: waiting takes no time of a core.

    Attributes:
        state: how far it is.
        error: why it is FAILED.
    """

    def __init__(self) -> None:
        self.state = TransferState.POSTED
        self.error: TransferFailed | None = None
        self._ended = threading.Event()

    def wait(self, deadline_s: float) -> None:
        """Until it is DONE. Raises TransferFailed, and TimeoutError after `deadline_s`."""
        if not self._ended.wait(deadline_s):
            raise TimeoutError(f"a read was not done after {deadline_s:g} s")
        if self.error is not None:
            raise self.error

    def settle(self, error: TransferFailed | None = None) -> None:
        """It has ended; for transports only."""
        self.error = error
        self.state = TransferState.DONE if error is None else TransferState.FAILED
        self._ended.set()


# Another process's memory, as it was described; another life of that process is another peer. Each transport
# has its own.
Peer = Any


class Transport(Protocol):
    """One way to read.

    Attributes:
        name: of the transport, for messages and measurements.
    """

    name: str

    def register(self, regions: Sequence[Region]) -> bytes:
        """Let these regions be read by others, and be read into; returns what a peer needs to `connect`."""
        ...

    def connect(self, described: bytes) -> Peer:
        """Another's memory. Raises TransferFailed for one that can't be reached."""
        ...

    def read(self, peer: Peer, runs: Runs) -> Transfer:
        """Begin to read runs of a peer's regions (`source`) into those registered here (`target`). Never
        raises for what is wrong at the peer: the transfer is then FAILED."""
        ...

    def disconnect(self, peer: Peer) -> None:
        """Another is not read from any more; what is on its way may end either way."""
        ...

    def close(self) -> None:
        """End what is on its way, and let nobody read any more."""
        ...
