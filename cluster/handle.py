"""KvHandle: what one instance hands over so that another can read a request's KV blocks.

On the wire it is vLLM's `kv_transfer_params` dict (NIXL pull connector, vLLM 0.32); this module and
`kv_transfer` are the only ones that know its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class KvHandle:
    """Blocks of one finished prefill, kept under a lease until they are read or released.

    Attributes:
        request_id: id under which the source engine keeps the blocks.
        tokens: tokens whose KV the blocks hold.
        params: the dict the reading engine needs.
    """

    request_id: str
    tokens: int
    params: Mapping[str, Any]


class Follower(NamedTuple):
    """A request that waits at another engine for the one that is computed here.

    Attributes:
        news_address: where its engine hears how far that is.
        request_id: its id there.
    """

    news_address: str
    request_id: str


# Keys of `kv_transfer_params`: at a source, its Follower; at a reader, that its prompt is under way, and how
# many of its last tokens only keep their places.
FOLLOWER_PARAM: Final = "pdserve_follower"
FOLLOWS_PARAM: Final = "pdserve_follows"
UNKNOWN_PARAM: Final = "pdserve_unknown_tokens"


def keep_for_reader(follower: Follower | None = None) -> dict[str, Any]:
    """`kv_transfer_params` that tell an engine to keep the finished request's blocks for a reader, and to
    tell a `follower` of those that are full before."""
    params = {} if follower is None else {FOLLOWER_PARAM: follower}
    return params | {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }


def follow(tokens: int, unknown: int = 0) -> dict[str, Any]:
    """`kv_transfer_params` of a request that is sent while so many tokens of its prompt are still computed
    elsewhere: it waits until it is told to go on, and reads meanwhile what it hears of. The last `unknown` of
    them are not generated yet, and whatever is in their places is replaced then."""
    return {FOLLOWS_PARAM: True, UNKNOWN_PARAM: unknown, "remote_num_tokens": tokens}


def handle_of(params: Mapping[str, Any] | None) -> KvHandle | None:
    """The handle in a finished request's `kv_transfer_params`; None when nothing is kept for a reader."""
    if not params or not params.get("do_remote_prefill") or not params.get("remote_block_ids"):
        return None
    return KvHandle(
        request_id=params["remote_request_id"], tokens=int(params["remote_num_tokens"]), params=params
    )
