"""What moving KV with NIXL costs beside a plain copy, by the size of the pieces (Markdown).

python -m benchmarks.kv_copy_nixl                     # in main memory
python -m benchmarks.kv_copy_nixl --device cuda --out FILE.json
python -m benchmarks.kv_copy_nixl --device cuda --write

Two processes have a cache of equal pieces each; one reads pieces of the other's into pieces of its own (or
writes them there), both in no order, as blocks of a paged cache lie. On one GPU that goes over CUDA IPC, so
what is measured is what NIXL adds to the memory itself: descriptors, and copies one by one. A piece is what
lies in one place of one request: of vLLM's caches, keys or values of one block in one layer. Beside it:
torch's copy of as many bytes in one place, and its gather of the same pieces into one buffer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy
import torch
from nixl._api import nixl_agent, nixl_agent_config

PIECES_BYTES = (4 << 10, 8 << 10, 32 << 10, 128 << 10, 512 << 10, 2 << 20, 8 << 20)
MOST_PIECES = 1 << 15
LEAST_BYTES, MOST_BYTES = 16 << 20, 256 << 20
ROUNDS = 7
DEADLINE_S = 60.0


class Moved(NamedTuple):
    """Median seconds for so many pieces."""

    piece_bytes: int
    pieces: int
    make_s: float
    move_s: float
    copy_s: float
    gather_s: float

    @property
    def bytes(self) -> int:
        return self.piece_bytes * self.pieces


def _agent(name: str, threads: int) -> Any:
    return nixl_agent(name, nixl_agent_config(backends=["UCX"], num_threads=threads))


def _pieces(cache: Any, piece_bytes: int) -> Any:
    """Descriptors (address, bytes, device) of all pieces of a cache."""
    count = cache.nbytes // piece_bytes
    rows = numpy.empty((count, 3), dtype=numpy.uint64)
    rows[:, 0] = cache.data_ptr() + numpy.arange(count, dtype=numpy.uint64) * piece_bytes
    rows[:, 1] = piece_bytes
    rows[:, 2] = max(0, cache.get_device())
    return rows


def source(device: str, cache_bytes: int, threads: int, pipe: Connection) -> None:
    """Has a cache to be read from, until told to end."""
    agent = _agent("source", threads)
    cache = torch.arange(cache_bytes // 4, dtype=torch.int32, device=device)
    _synchronize(device)
    registered = agent.register_memory([cache])
    pipe.send((agent.get_agent_metadata(), cache.data_ptr()))
    pipe.recv()
    agent.deregister_memory(registered)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(call: Callable[[], object], device: str) -> float:
    """Median of some calls, after one that is not counted."""
    times = []
    for _ in range(ROUNDS + 1):
        _synchronize(device)
        begin = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return median(times[1:])


class Reader:
    """Reads from a source in another process."""

    def __init__(self, device: str, cache_bytes: int, threads: int, metadata: bytes, address: int) -> None:
        self._device = device
        self._agent = _agent("reader", threads)
        self._cache = torch.zeros(cache_bytes // 4, dtype=torch.int32, device=device)
        # What a copy within the process reads, with the same content as the source's.
        self._twin = torch.arange(cache_bytes // 4, dtype=torch.int32, device=device)
        self._registered = self._agent.register_memory([self._cache])
        self._remote = self._agent.add_remote_agent(metadata)
        self._address = address
        self._kind = "VRAM" if device == "cuda" else "DRAM"

    def measure(self, operation: str, piece_bytes: int, pieces: int, seed: int) -> Moved:
        """READ or WRITE so many pieces. Raises RuntimeError for one that did not arrive."""
        rng = numpy.random.default_rng(seed)
        mine = _pieces(self._cache, piece_bytes)
        theirs = mine.copy()
        theirs[:, 0] = theirs[:, 0] - numpy.uint64(self._cache.data_ptr()) + numpy.uint64(self._address)
        to = rng.permutation(len(mine))[:pieces].astype(numpy.int32)
        of = rng.permutation(len(mine))[:pieces].astype(numpy.int32)
        local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", mine, self._kind)
        remote = self._agent.prep_xfer_dlist(self._remote, theirs, self._kind)
        self._cache.copy_(self._twin)
        _synchronize(self._device)
        made, moved = [], []
        # A write is read back at last, uncounted.
        for number in range(ROUNDS + (2 if operation == "WRITE" else 1)):
            reads_back = number > ROUNDS
            if reads_back:
                self._cache.zero_()
                _synchronize(self._device)
            begin = time.perf_counter()
            handle = self._agent.make_prepped_xfer(
                "READ" if reads_back else operation, local, to, remote, of, b""
            )
            ready = time.perf_counter()
            self._finish(handle)
            moved.append(time.perf_counter() - ready)
            made.append(ready - begin)
            self._agent.release_xfer_handle(handle)
        _synchronize(self._device)
        got, sent = self._cache.view(-1, piece_bytes // 4), self._twin.view(-1, piece_bytes // 4)
        here, there = (torch.from_numpy(i).long().to(self._device) for i in (to, of))
        if not torch.equal(got[here], sent[here if operation == "WRITE" else there]):
            raise RuntimeError(f"pieces of {piece_bytes} bytes arrived otherwise than they were sent")
        self._agent.release_dlist_handle(local)
        self._agent.release_dlist_handle(remote)
        whole = pieces * piece_bytes // 4
        staged = torch.empty(pieces, piece_bytes // 4, dtype=torch.int32, device=self._device)
        return Moved(
            piece_bytes,
            pieces,
            median(made[1 : ROUNDS + 1]),
            median(moved[1 : ROUNDS + 1]),
            _timed(lambda: self._cache[:whole].copy_(self._twin[:whole]), self._device),
            _timed(lambda: torch.index_select(sent, 0, there, out=staged), self._device),
        )

    def _finish(self, handle: Any) -> None:
        end_s = time.perf_counter() + DEADLINE_S
        state = self._agent.transfer(handle)
        while state == "PROC":
            if time.perf_counter() > end_s:
                raise RuntimeError(f"a read did not end in {DEADLINE_S:g} s")
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"a read ended as {state}")

    def close(self) -> None:
        """Let go of the source."""
        self._agent.remove_remote_agent(self._remote)
        self._agent.deregister_memory(self._registered)


def measure(
    device: str, operation: str, pieces_bytes: tuple[int, ...], threads: int, say: Callable[[str], None]
) -> list[Moved]:
    """All sizes of pieces, each with a little and with much to move."""
    cache_bytes = 2 * MOST_BYTES
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=source, args=(device, cache_bytes, threads, there), daemon=True)
    process.start()
    try:
        if not here.poll(DEADLINE_S):
            raise RuntimeError(f"the source was not ready in {DEADLINE_S:g} s")
        reader = Reader(device, cache_bytes, threads, *here.recv())
        moved = []
        for piece_bytes in pieces_bytes:
            for total in (LEAST_BYTES, MOST_BYTES):
                pieces = min(MOST_PIECES, total // piece_bytes)
                moved.append(reader.measure(operation, piece_bytes, pieces, seed=pieces))
                say(f"{moved[-1]}")
        reader.close()
        here.send("end")
        process.join(DEADLINE_S)
        return moved
    finally:
        if process.is_alive():
            process.kill()


def table(moved: list[Moved]) -> str:
    """GB/s and milliseconds, for people."""
    lines = [
        "| piece | pieces | MiB | make (ms) | move (ms) | GB/s | us a piece | copy GB/s | gather GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in moved:
        gb = one.bytes / 1e9
        lines.append(
            f"| {one.piece_bytes >> 10:,} KiB | {one.pieces:,} | {one.bytes / 2**20:.0f} "
            f"| {one.make_s * 1e3:.2f} | {one.move_s * 1e3:.2f} | {gb / one.move_s:.1f} "
            f"| {one.move_s / one.pieces * 1e6:.2f} | {gb / one.copy_s:.0f} | {gb / one.gather_s:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--piece-kib", type=int, nargs="+", help="sizes of pieces (default 4 to 8,192)")
    parser.add_argument("--write", action="store_true", help="write instead of read")
    parser.add_argument("--threads", type=int, default=4, help="NIXL's, as in vLLM (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    sizes = tuple(kib << 10 for kib in args.piece_kib) if args.piece_kib else PIECES_BYTES
    moved = measure(
        args.device,
        "WRITE" if args.write else "READ",
        sizes,
        args.threads,
        lambda line: print(line, flush=True),
    )
    if args.out is not None:
        document = [one._asdict() for one in moved]
        args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(table(moved))


if __name__ == "__main__":
    main()
