"""Twin instances for tests of the router: links without a network, engines without a model.

Tokens follow `cluster.sim_engine`: each from the one before, so a wrong hand-over shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from prometheus_client import CollectorRegistry

from cluster.errors import ServingError
from cluster.instance import EngineFacts, Fingerprint, InstanceInfo, InstanceLoad, InstanceState, Role
from cluster.metrics import IngressMetrics
from cluster.request import NO_SLO, Handoff, ServeRequest, Slo
from cluster.sim_engine import tokens_after
from cluster.spec import DeadlineSpec
from cluster.wire import FINISH_LENGTH, GoOn, HandOver, PrefillCounts, TokenOutput
from router.hop import Hop, HopKind
from router.policy import LeastTokens
from router.router import Router

FACTS = EngineFacts(
    fingerprint=Fingerprint(engine="sim 3", model="m", dtype="none", kv_dtype="none", block_size_tokens=16),
    max_model_len=4096,
    kv_capacity_tokens=65536,
    kv_bytes_per_token=2048,
    max_num_seqs=64,
)


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """What an undisturbed engine generates."""
    return tokens_after(prompt[-1], count)


def info_of(instance_id: str, index: int = 0, incarnation: str = "1") -> InstanceInfo:
    """A READY instance; its role is the first word of its id."""
    return InstanceInfo(
        instance_id=instance_id,
        role=Role(instance_id.split("-")[0]),
        engine_index=index,
        incarnation=incarnation,
        state=InstanceState.READY,
        facts=FACTS,
    )


async def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0)


class TwinInstance:
    """One instance and the link to it.

    Attributes:
        kept: ids of finished prefills whose blocks wait for a reader.
        stalls_at: output position at which a request stops making progress (never, by default).
        recomputes: whether a decode ignores the blocks it was given.
        waits_s: what it says to the next prompts that it refuses, one each, while there is anything.
        handing_over: hops that were told to end early, and with how many tokens.
        following: hops that wait for their prompts, and what those were told that went on.
        deaf: whether it does not hear that, as an engine where the request waits.
        has_them: whether a decode finds the prompt in its own cache, and so reads nothing and tells nobody.
    """

    def __init__(self, cluster: TwinCluster, info: InstanceInfo) -> None:
        self.cluster = cluster
        self.info = info
        self.kept: set[str] = set()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.sent: list[Hop] = []
        self.stalls_at = 1 << 30
        self.waits_s: list[float] = []
        self.recomputes = False
        self.handing_over: dict[str, int] = {}
        self.following: dict[str, Hop] = {}
        self.gone_on: list[GoOn] = []
        self.deaf = False
        self.has_them = False
        self.wrong_from = 1 << 30
        self.load = InstanceLoad()

    def send(self, hop: Hop) -> None:
        self.sent.append(hop)
        if self.waits_s and not hop.offer(0.0).must_take:
            refused = self.cluster.router.refused
            asyncio.get_running_loop().call_soon(
                refused, hop.hop_id, self.info.instance_id, self.waits_s.pop(0)
            )
            return
        if hop.follows:
            self.following[hop.hop_id] = hop
            return
        self.tasks[hop.hop_id] = asyncio.create_task(self._run(hop), name=f"twin-{hop.hop_id}")

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.following.pop(request_id, None)
            if (task := self.tasks.pop(request_id, None)) is not None:
                task.cancel()

    def release(self, request_ids: list[str]) -> None:
        self.kept.difference_update(request_ids)

    def hand_over(self, message: HandOver) -> None:
        if not self.deaf:
            self.handing_over[message.request_id] = message.at_tokens

    def hands_over(self, hop: Hop, tokens: int) -> bool:
        """Whether a hop ends, told to, with so many."""
        at_tokens = self.handing_over.get(hop.hop_id)
        return at_tokens is not None and at_tokens <= tokens < hop.max_tokens

    def go_on(self, message: GoOn) -> None:
        hop = self.following.pop(message.request_id)
        self.gone_on.append(message)
        self.tasks[hop.hop_id] = asyncio.create_task(self._run(hop), name=f"twin-{hop.hop_id}")

    def kill(self) -> None:
        """The process is gone, and with it what it kept."""
        self.abort([*self.tasks, *self.following])
        self.kept.clear()
        self.cluster.router.leave(self.info.instance_id, why="killed")

    async def _run(self, hop: Hop) -> None:
        await asyncio.sleep(0)
        last = hop.prompt_token_ids[-1]
        read = local = 0
        given = hop.source is not None and hop.source.handle is not None
        if given and self.has_them:
            local = hop.source.handle.tokens
        elif given and not self.recomputes:
            read = min(hop.source.handle.tokens, len(hop.prompt_token_ids) - 1)
            self.cluster.instances[hop.source.instance_id].kept.discard(hop.source.handle.request_id)
        for position in range(hop.max_tokens):
            if position >= self.stalls_at:
                await asyncio.Event().wait()
            token = tokens_after(last, 1)[0] + (1 if position >= self.wrong_from else 0)
            last = token
            output = TokenOutput(request_id=hop.hop_id, new_token_ids=[token])
            if position == 0:
                output.prefill_stats = PrefillCounts(
                    num_prompt_tokens=len(hop.prompt_token_ids),
                    num_local_cached_tokens=local,
                    num_external_cached_tokens=read,
                )
            hands_over = self.hands_over(hop, position + 1)
            is_last = position == hop.max_tokens - 1 or hands_over
            if is_last:
                output.finish_reason = FINISH_LENGTH
                self.tasks.pop(hop.hop_id, None)
                if hop.kind is HopKind.PREFILL or hands_over:
                    self.kept.add(hop.hop_id)
                    output.kv_transfer_params = {
                        "do_remote_prefill": True,
                        "remote_block_ids": [[1]],
                        "remote_request_id": hop.hop_id,
                        "remote_num_tokens": len(hop.prompt_token_ids) + position,
                    }
            self.cluster.deliver(self.info.instance_id, output)
            if is_last:
                return
            await asyncio.sleep(0)


class TwinCluster:
    """A router on twin instances; what its clients got is in `tokens`, `finished` and `errors`."""

    def __init__(
        self,
        *instance_ids: str,
        deadlines: DeadlineSpec | None = None,
        keeps_sessions: bool = False,
        chunk: int = 0,
    ) -> None:
        """
        Args:
            chunk: tokens of a prompt that are computed at once; longer ones are followed.
        """
        self.metrics = IngressMetrics(CollectorRegistry())
        self.router = Router(
            LeastTokens(), deadlines or DeadlineSpec(), self, self.metrics, keeps_sessions=keeps_sessions
        )
        self._facts = replace(FACTS, chunk_tokens=chunk, news_address="twin" if chunk else "")
        self.instances: dict[str, TwinInstance] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.forgotten: list[str] = []
        self.errors: dict[str, ServingError] = {}
        self.first_outputs: dict[str, Any] = {}
        for index, instance_id in enumerate(instance_ids):
            self.add(instance_id, index)

    def add(self, instance_id: str, index: int = 9) -> TwinInstance:
        instance = TwinInstance(self, replace(info_of(instance_id, index), facts=self._facts))
        self.instances[instance_id] = instance
        self.router.join(instance.info, instance)
        return instance

    def deliver(self, instance_id: str, output: TokenOutput) -> None:
        for forwarded in self.router.on_outputs(instance_id, [output]):
            tokens = self.tokens.setdefault(forwarded.request_id, [])
            if not tokens:
                self.first_outputs[forwarded.request_id] = forwarded
            tokens.extend(forwarded.new_token_ids)
            if forwarded.finish_reason is not None:
                self.finished.add(forwarded.request_id)

    def fail(self, request_id: str, error: ServingError) -> None:
        self.errors[request_id] = error

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        handoff: Handoff = Handoff.TOKENS,
        slo: Slo = NO_SLO,
    ) -> ServeRequest:
        request = ServeRequest(
            request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens, handoff=handoff, slo=slo
        )
        self.router.submit(request)
        return request

    async def settle(self, deadline_s: float = 5.0) -> None:
        """Wait until no request is under way."""
        await until(lambda: not self.router.pending, deadline_s)

    def assert_nothing_held(self) -> None:
        """No block, hop, reservation or run is left."""
        assert {i: twin.kept for i, twin in self.instances.items() if twin.kept} == {}
        assert {i: twin.following for i, twin in self.instances.items() if twin.following} == {}
        assert {i: twin.tasks for i, twin in self.instances.items() if twin.tasks} == {}
        assert self.router.open_hops == 0
        assert self.router.pending == 0
        assert len(self.router.line) == 0
        assert dict(self.router.reservations.outstanding()) == {}
