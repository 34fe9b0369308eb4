"""The runner on virtual time, with an app that is made up."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.batch_spec import BatchSpec
from deploy.virtual_time import run_virtual
from router.batch_ask import Answer
from router.batch_runner import MOST_TRIES, RENEW_S, SCAN_S, BatchRunner
from router.batch_state import Batch
from router.batch_store import LEASE_S, BatchStore

START_S = 1_790_000_000.0
ENDPOINT = "/v1/completions"


def clock() -> float:
    return START_S + asyncio.get_running_loop().time()


async def inline(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class App:
    """Answers after `seconds`; what it says of a prompt is in `says`, by default the prompt itself."""

    def __init__(self, seconds: float = 1.0, capacity: int = 1000, **says: Sequence[int]) -> None:
        self.seconds, self.capacity = seconds, capacity
        self.says = {prompt: list(statuses) for prompt, statuses in says.items()}
        self.asked: Counter[str] = Counter()
        self.order: list[str] = []
        self.under_way = 0

    async def __call__(self, endpoint: str, body: bytes, request_id: str) -> Answer:
        assert endpoint == ENDPOINT
        prompt = json.loads(body)["prompt"]
        if self.under_way >= self.capacity:
            return Answer(status=429)
        self.asked[prompt] += 1
        self.order.append(prompt)
        self.under_way += 1
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        statuses = self.says.get(prompt)
        status = 200 if not statuses else statuses.pop(0) if len(statuses) > 1 else statuses[0]
        return Answer(status=status, body=json.dumps({"said": prompt}).encode())


def create(store: BatchStore, *lines: object, hours: int = 24) -> str:
    with store.new_file("in.jsonl", "batch") as (file, meta):
        for one in lines:
            file.write(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n")
    now_s = int(store.clock())
    batch = Batch(
        id=f"batch_{len(store.batch_ids()):032x}", endpoint=ENDPOINT, input_file_id=meta.id,
        completion_window=f"{hours}h", created_at=now_s, expires_at=now_s + hours * 3600,
    )  # fmt: skip
    store.create(batch)
    return batch.id


def line(prompt: str, custom_id: str | None = None) -> dict[str, Any]:
    return {"custom_id": custom_id or prompt, "method": "POST", "url": ENDPOINT, "body": {"prompt": prompt}}


def lines(count: int) -> list[dict[str, Any]]:
    return [line(f"p{number}") for number in range(count)]


def read(store: BatchStore, file_id: str | None) -> dict[str, dict[str, Any]]:
    if file_id is None:
        return {}
    found = [json.loads(one) for one in store.content(file_id).read_bytes().splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one for one in found}


async def ended(store: BatchStore, batch_id: str, within_s: float = 2 * 86_400.0) -> Batch:
    async with asyncio.timeout(within_s):
        while not (batch := store.batch(batch_id)).is_ended:
            await asyncio.sleep(0.5)
    return batch


async def stop(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        assert task.cancelled()


def on_virtual_time(
    tmp_path: Path, scenario: Callable[[BatchStore, Callable[..., Any]], Awaitable[None]]
) -> None:
    """Run a scenario that is given a store and what starts a runner on it."""

    async def main() -> None:
        store = BatchStore(tmp_path, clock)

        def start(app: App, **spec: Any) -> asyncio.Task[None]:
            return asyncio.create_task(BatchRunner(store, app, BatchSpec(**spec), inline).run())

        await scenario(store, start)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others

    run_virtual(main())


def test_a_batch_from_its_input_to_its_output(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        batch_id = create(store, *lines(100))
        assert store.batch(batch_id).status == "validating"
        app = App()
        runner = start(app)
        batch = await ended(store, batch_id, 60)
        assert batch.status == "completed"
        assert (batch.request_counts.total, batch.request_counts.completed) == (100, 100)
        assert batch.error_file_id is None
        output = read(store, batch.output_file_id)
        assert {custom_id: one["response"]["body"]["said"] for custom_id, one in output.items()} == {
            f"p{n}": f"p{n}" for n in range(100)
        }
        assert set(app.asked.values()) == {1}
        assert batch.in_progress_at is not None
        assert batch.in_progress_at <= (batch.finalizing_at or 0) <= (batch.completed_at or 0)
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_one_prefix_after_the_other(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        heads = ["A" * 1000, "B" * 1000, "C" * 1000]
        batch_id = create(store, *(line(f"{heads[n % 3]}{n}", str(n)) for n in range(30)))
        app = App()
        runner = start(app)
        assert (await ended(store, batch_id, 60)).status == "completed"
        seen = [prompt[0] for prompt in app.order]
        assert sum(one != other for one, other in pairwise(seen)) == 2
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_a_bad_input_fails_with_the_numbers_of_its_lines(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        batch_id = create(store, line("a"), b"nonsense\n", line("c"), line("a"))
        app = App()
        runner = start(app)
        batch = await ended(store, batch_id, 60)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        assert batch.errors is not None
        assert [(one.line, one.code) for one in batch.errors.data] == [
            (2, "invalid_json_line"), (4, "duplicate_custom_id")
        ]  # fmt: skip
        assert not app.asked
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_a_refused_line_is_asked_again_and_one_that_fails_is_told(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        app = App(p1=[429] * 20 + [200], p2=[400], p3=[503, 503, 200], p4=[503])
        batch_id = create(store, *lines(6))
        runner = start(app)
        batch = await ended(store, batch_id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (4, 2)
        errors = read(store, batch.error_file_id)
        assert {custom_id: one["response"]["status_code"] for custom_id, one in errors.items()} == {
            "p2": 400, "p4": 503
        }  # fmt: skip
        assert (app.asked["p1"], app.asked["p2"], app.asked["p3"], app.asked["p4"]) == (21, 1, 3, MOST_TRIES)
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_it_takes_what_room_there_is(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        app = App(capacity=10)
        batch_id = create(store, *lines(1000))
        runner = start(app)
        since_s = asyncio.get_running_loop().time()
        batch = await ended(store, batch_id)
        assert batch.request_counts.completed == 1000
        assert set(app.asked.values()) == {1}
        assert asyncio.get_running_loop().time() - since_s < 2 * 1000 / 10
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_no_more_at_once_than_the_spec_says_over_all_batches(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        app = App()
        ids = [create(store, *lines(50)) for _ in range(12)]
        runner = start(app, most_at_once=6)
        most = 0
        while not all(store.batch(batch_id).is_ended for batch_id in ids):
            most = max(most, app.under_way)
            await asyncio.sleep(0.3)
        assert most == 6
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_after_a_restart_only_the_rest_is_asked(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        batch_id = create(store, *lines(200))
        first, second = App(), App()
        runner = start(first, most_at_once=8)
        await asyncio.sleep(10.5)
        await stop(runner)
        answered = first.asked.total() - 8
        assert 0 < answered < 192
        assert first.under_way == 0
        runner = start(second)
        batch = await ended(store, batch_id, 100)
        assert batch.request_counts.completed == 200
        assert second.asked.total() == 200 - answered
        assert len(read(store, batch.output_file_id)) == 200
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_two_replicas_run_a_batch_once(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        app = App()
        runners = [start(app), start(app)]
        await asyncio.sleep(1)
        ids = [create(store, *lines(100)) for _ in range(4)]
        for batch_id in ids:
            assert (await ended(store, batch_id)).request_counts.completed == 100
        assert app.asked.total() == 400
        await stop(*runners)

    on_virtual_time(tmp_path, scenario)


def test_what_a_dead_owner_had_is_taken_over(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        batch_id = create(store, *lines(10))
        dead = store.claim(batch_id)
        assert dead is not None
        dead.add(1, b'{"custom_id":"p0"}', is_ok=True)
        app = App()
        runner = start(app)
        await asyncio.sleep(0.9 * LEASE_S)
        assert not app.asked
        batch = await ended(store, batch_id, LEASE_S + 2 * SCAN_S)
        assert batch.request_counts.completed == 10
        assert app.asked.total() == 9
        dead.close()
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_an_owner_that_was_taken_for_dead_stops(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        batch_id = create(store, *lines(100))
        app = App(seconds=50.0)
        runner = start(app)
        await asyncio.sleep(1)
        assert app.under_way > 0
        (store.input(batch_id).parent / "claim.2").touch()
        await asyncio.sleep(2 * RENEW_S)
        assert app.under_way == 0
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_batch_that_ends_early_keeps_what_it_has(tmp_path: Path, end: str) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        app = App(seconds=100.0)
        batch_id = create(store, *lines(1000), hours=1)
        runner = start(app, most_at_once=10)
        await asyncio.sleep(500)
        if end == "cancelled":
            store.cancel(batch_id)
            assert store.batch(batch_id).status == "cancelling"
        batch = await ended(store, batch_id, 3600)
        assert batch.status == end
        done, left = read(store, batch.output_file_id), read(store, batch.error_file_id)
        assert done.keys() | left.keys() == {f"p{n}" for n in range(1000)}
        assert len(done) == batch.request_counts.completed > 0
        assert {one["error"]["code"] for one in left.values()} == {f"batch_{end}"}
        assert app.under_way == 0
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_a_failing_disk_breaks_off_and_it_is_tried_again(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        batch_id = create(store, *lines(5))
        app = App()
        content = store.input(batch_id)
        content.rename(tmp_path / "away")
        runner = start(app)
        await asyncio.sleep(1)
        assert not app.asked
        (tmp_path / "away").rename(content)
        batch = await ended(store, batch_id, LEASE_S + 2 * SCAN_S)
        assert batch.request_counts.completed == 5
        await stop(runner)

    on_virtual_time(tmp_path, scenario)


def test_old_files_are_swept(tmp_path: Path) -> None:
    async def scenario(store: BatchStore, start: Callable[..., Any]) -> None:
        batch_id = create(store, line("a"))
        runner = start(App(), keep_days=1.0)
        await ended(store, batch_id, 60)
        await asyncio.sleep(86_400 + 7200)
        assert store.batches() == store.files() == []
        await stop(runner)

    on_virtual_time(tmp_path, scenario)
