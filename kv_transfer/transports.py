"""Transports by name."""

from __future__ import annotations

from cluster.spec import TransportName
from kv_transfer.transport import Transport


def make_transport(name: TransportName, host: str) -> Transport:
    """A transport, its library loaded with it.

    Args:
        host: address of this machine at which others reach it.

    Raises ImportError when its library is not there, EnvironmentProblem when this system can't do it.
    """
    if name == "local":
        from kv_transfer.local_transport import LocalTransport

        return LocalTransport()
    if name == "torch":
        from kv_transfer.torch_transport import TorchTransport

        return TorchTransport(host)
    from kv_transfer.nixl_transport import NixlTransport

    return NixlTransport()
