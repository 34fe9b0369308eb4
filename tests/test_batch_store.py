"""Files and batches on disk, and who owns a batch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.errors import EnvironmentProblem
from router.batch_state import Batch
from router.batch_store import ABANDONED_S, LEASE_S, BatchStore, ClaimLost, UnknownId

NOW_S = 1_790_000_000.0


class Clock:
    now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> BatchStore:
    return BatchStore(tmp_path / "batches", clock)


def put(store: BatchStore, content: bytes = b"{}\n", purpose: str = "batch") -> str:
    with store.new_file("in.jsonl", purpose) as (file, meta):
        file.write(content)
    return meta.id


def new_batch(store: BatchStore, number: int = 0) -> str:
    batch = Batch(
        id=f"batch_{number:032x}", endpoint="/v1/completions", input_file_id=put(store),
        completion_window="24h",
        created_at=int(store.clock()) + number, expires_at=int(store.clock()) + 86_400,
    )  # fmt: skip
    store.create(batch)
    return batch.id


def test_a_directory_that_is_not_there_is_empty(store: BatchStore, tmp_path: Path) -> None:
    assert store.files() == store.batches() == []
    assert list(store.sweep(NOW_S)) == []
    assert not list(tmp_path.iterdir())


def test_a_file_is_there_when_it_is_whole(store: BatchStore) -> None:
    with store.new_file("a.jsonl", "batch") as (file, meta):
        file.write(b"abc")
        assert store.files() == []
    assert store.file(meta.id).bytes == 3
    assert store.content(meta.id).read_bytes() == b"abc"
    with pytest.raises(ZeroDivisionError), store.new_file("b.jsonl", "batch"):
        raise ZeroDivisionError
    assert [file.filename for file in store.files()] == ["a.jsonl"]
    store.delete_file(meta.id)
    with pytest.raises(UnknownId):
        store.file(meta.id)


@pytest.mark.parametrize("name", ["", "x", "../../etc/passwd", "file-" + "0" * 32, "file-" + "0" * 31 + "/"])
def test_an_id_is_not_a_path(store: BatchStore, name: str) -> None:
    with pytest.raises(UnknownId):
        store.content(name)
    with pytest.raises(UnknownId):
        store.batch(name)
    with pytest.raises(UnknownId):
        store.claim(name)


def test_a_directory_that_can_t_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(EnvironmentProblem, match=r"batch\.directory"):
        put(BatchStore(tmp_path / "taken"))


def test_a_batch_keeps_its_input(store: BatchStore) -> None:
    batch_id = new_batch(store)
    store.delete_file(store.batch(batch_id).input_file_id)
    assert store.input(batch_id).read_bytes() == b"{}\n"


def test_the_newest_first(store: BatchStore) -> None:
    ids = [new_batch(store, number) for number in range(3)]
    assert [batch.id for batch in store.batches()] == ids[::-1]
    assert sorted(store.batch_ids()) == ids


def test_one_owner_until_its_lease_is_over(store: BatchStore, clock: Clock) -> None:
    batch_id = new_batch(store)
    first = store.claim(batch_id)
    assert first is not None
    for _ in range(3):
        clock.now_s += 0.9 * LEASE_S
        assert store.claim(batch_id) is None
        first.renew()
    clock.now_s += 1.1 * LEASE_S
    second = store.claim(batch_id)
    assert second is not None
    assert store.claim(batch_id) is None
    with pytest.raises(ClaimLost):
        first.renew()
    first.close()  # which takes nothing from the other
    second.renew()
    assert store.claim(batch_id) is None
    second.close()
    third = store.claim(batch_id)
    assert third is not None
    third.close(is_free=False)
    assert store.claim(batch_id) is None


def test_answers_outlive_their_owners_and_count_once(store: BatchStore, clock: Clock) -> None:
    batch_id = new_batch(store)
    first = store.claim(batch_id)
    assert first is not None
    first.add(1, b'{"a":1}', is_ok=True)
    first.add(7, b'{"a\\t":7}', is_ok=False)
    clock.now_s += 2 * LEASE_S
    second = store.claim(batch_id)
    assert second is not None
    second.add(3, b'{"a":3}', is_ok=True)
    first.add(3, b'{"a":"late"}', is_ok=True)  # it does not know yet that it has lost
    first.close()
    second.close()
    with (store.input(batch_id).parent / "answers.1").open("ab") as torn:
        torn.write(b'9\t+\t{"a')
    assert list(store.answers(batch_id)) == [
        (1, True, b'{"a":1}\n'),
        (7, False, b'{"a\\t":7}\n'),
        (3, True, b'{"a":"late"}\n'),
    ]


def test_cancelling_is_a_wish_until_the_owner_has_seen_it(store: BatchStore, clock: Clock) -> None:
    batch_id = new_batch(store)
    assert store.cancelled_at(batch_id) is None
    clock.now_s += 5
    store.cancel(batch_id)
    batch = store.batch(batch_id)
    assert (batch.status, batch.cancelling_at) == ("cancelling", int(NOW_S + 5))
    batch.become("cancelled", clock())
    store.save(batch)
    assert store.batch(batch_id).status == "cancelled"


def test_the_old_is_swept_away_and_what_runs_is_not(store: BatchStore, clock: Clock) -> None:
    old, running = new_batch(store, 0), new_batch(store, 1)
    batch = store.batch(old)
    batch.become("completed", clock())
    store.save(batch)
    broken = store.input(new_batch(store, 2)).parent
    (broken / "state.json").unlink()
    clock.now_s += 100
    kept = put(store)
    list(store.sweep(NOW_S + 50))
    assert sorted(store.batch_ids()) == [running, broken.name]
    assert [file.id for file in store.files()] == [kept]
    clock.now_s = broken.stat().st_mtime + 1.1 * ABANDONED_S
    list(store.sweep(0))
    assert store.batch_ids() == [running]


def test_a_batch_that_is_removed_is_lost(store: BatchStore) -> None:
    batch_id = new_batch(store)
    claim = store.claim(batch_id)
    assert claim is not None
    shutil.rmtree(store.input(batch_id).parent)
    with pytest.raises(ClaimLost):
        claim.renew()
    claim.close()


def test_a_state_that_can_t_be_read_is_no_batch_and_harms_no_other(store: BatchStore, tmp_path: Path) -> None:
    torn, good = new_batch(store), new_batch(store, 1)
    (state,) = tmp_path.rglob(f"{torn}/state.json")
    state.write_bytes(b"")
    with pytest.raises(UnknownId):
        store.batch(torn)
    assert [batch.id for batch in store.batches()] == [good]
