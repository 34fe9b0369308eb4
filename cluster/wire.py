"""Messages between ingress and instance.

Every message is a ZeroMQ multipart: one byte that says what it is, a msgpack header, and for requests and
outputs the engine's own encoding. There is one output message per engine step and ingress, not one per token.

`TokenRequest`, `TokenOutput` and `StepOutputs` are positional prefixes of vLLM 0.32's `EngineCoreRequest`,
`EngineCoreOutput` and `EngineCoreOutputs` (msgspec `array_like` structs), for code that must not import vLLM:
the twin engine speaks them, and what it sends decodes as vLLM's types. A test holds both to each other.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from cluster.handle import Follower

WIRE_VERSION: Final = 6

# ingress -> instance
HELLO: Final = b"H"  # header Hello
ADD: Final = b"A"  # header Offer, then the encoded request
ABORT: Final = b"X"  # header list[str]: request ids
RELEASE: Final = b"R"  # header list[str]: request ids whose blocks nobody will read
HAND_OVER: Final = b"M"  # header HandOver: a request that shall go on elsewhere
GO_ON: Final = b"G"  # header GoOn: a request whose prompt was computed elsewhere meanwhile
CALL: Final = b"U"  # header Call
BYE: Final = b"B"  # the ingress leaves: abort all it has here
# instance -> ingress
WELCOME: Final = b"W"  # header Welcome
REFUSED: Final = b"E"  # header str: why
BLOCKS: Final = b"K"  # header Blocks: how its prefix cache has changed; all of it after WELCOME
OUTPUTS: Final = b"O"  # header Load, then the encoded outputs
RESULT: Final = b"V"  # header CallResult
UNREADABLE: Final = b"J"  # header Unreadable: a request that the engine could not take
BUSY: Final = b"Q"  # header Busy: a request that the instance is too busy to take
FATAL: Final = b"F"  # header str: the engine died of this

# Key of `kv_transfer_params` in a request that only tells an engine's connector to release these request ids.
RELEASE_PARAM: Final = "pdserve_release"
# And in one that tells it, as a HandOver, to end a request early, and to keep its blocks for a reader.
HAND_OVER_PARAM: Final = "pdserve_hand_over"

# And in one that tells it, as a GoOn, that a request which follows a prompt has it now.
GO_ON_PARAM: Final = "pdserve_go_on"

# Key of a request's `extra_args`: seconds until its first token is due.
DUE_PARAM: Final = "pdserve_due_in_s"
# And for how many seconds after its end its blocks are worth keeping, for the session's next turn.
KEEP_PARAM: Final = "pdserve_keep_s"
# Keys that no client may set.
OUR_PARAMS: Final = frozenset({DUE_PARAM, KEEP_PARAM})

FINISH_STOP: Final = 0
FINISH_LENGTH: Final = 1
FINISH_ABORT: Final = 2
FINISH_ERROR: Final = 3


class Hello(msgspec.Struct, array_like=True):
    """First message of an ingress."""

    wire_version: int
    engine: str
    ingress: str
    wants_blocks: bool = False


class Welcome(msgspec.Struct, array_like=True):
    """The instance's answer: which life of which place this is."""

    instance: str
    incarnation: str


class Load(msgspec.Struct, array_like=True):
    """See `cluster.instance.InstanceLoad`."""

    running: int
    waiting: int
    kv_usage: float


class Blocks(msgspec.Struct, array_like=True, omit_defaults=True):
    """How a prefix cache has changed, in names of `cluster.prefix_hash`; `cleared` comes before the rest."""

    stored: list[int] = []
    removed: list[int] = []
    cleared: bool = False


class Offer(msgspec.Struct, array_like=True):
    """A request that the instance shall take, or refuse.

    Attributes:
        tokens: of its prompt, that must be computed as far as the ingress knows.
        due_in_s: seconds until its first token is due; None for no bound.
        must_take: whether it must not be refused, as its client has tokens already, or its KV is there.
    """

    request_id: str
    tokens: int
    due_in_s: float | None = None
    must_take: bool = False


class HandOver(msgspec.Struct, array_like=True, omit_defaults=True):
    """A running request shall end early, by its length, its blocks kept for a reader.

    Attributes:
        at_tokens: with so many output tokens; with its next one where it has them already.
        follower: who reads what is full meanwhile, and expects `at_tokens`.
    """

    request_id: str
    at_tokens: int = 0
    follower: Follower | None = None


class GoOn(msgspec.Struct, array_like=True, omit_defaults=True):
    """What a request follows (`cluster.handle.follow`) is computed.

    Attributes:
        token_ids: what was generated there, which is part of its prompt from now on.
        kv_params: how to read what it has not read yet.
        replaces: tokens at the end of its prompt that only kept their places, until now.
    """

    request_id: str
    token_ids: list[int]
    kv_params: dict[str, Any]
    replaces: int = 0


class Call(msgspec.Struct, array_like=True):
    """A call of an engine method that is no request: LoRA, cache reset, ..."""

    call_id: int
    method: str
    args: list[Any]


class CallResult(msgspec.Struct, array_like=True):
    """The answer; `error` is empty on success."""

    call_id: int
    error: str
    result: Any = None


class Unreadable(msgspec.Struct, array_like=True):
    """A request that could not be decoded."""

    request_id: str
    why: str


class Busy(msgspec.Struct, array_like=True):
    """A request that was refused, and is not in the engine; its prompt could begin after `wait_s` seconds."""

    request_id: str
    wait_s: float


class TokenRequest(msgspec.Struct, array_like=True, omit_defaults=True):
    """Prefix of vLLM's EngineCoreRequest; `sampling_params` is a map with vLLM's field names, `lora_request`
    a list that begins with the adapter's name."""

    request_id: str
    prompt_token_ids: list[int]
    mm_features: Any = None
    sampling_params: Any = None
    pooling_params: Any = None
    arrival_time: float = 0.0
    lora_request: list[Any] | None = None


class PrefillCounts(msgspec.Struct, omit_defaults=True):
    """Where the prompt's KV came from; part of vLLM's PrefillStats."""

    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_local_cached_tokens: int = 0
    num_external_cached_tokens: int = 0


class TokenOutput(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """Prefix of vLLM's EngineCoreOutput."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: Any = None
    new_prompt_logprobs_tensors: Any = None
    pooling_output: Any = None
    finish_reason: int | None = None
    stop_reason: int | str | None = None
    events: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    trace_headers: Any = None
    prefill_stats: PrefillCounts | None = None


class StepOutputs(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """Prefix of vLLM's EngineCoreOutputs."""

    engine_index: int = 0
    outputs: list[TokenOutput] = []
    scheduler_stats: Any = None
    timestamp: float = 0.0


def pack(message: Any) -> bytes:
    """Encode a header."""
    return msgspec.msgpack.encode(message)
