"""`pdserve kvbench`: its cases move what they say, its fit finds a known link, and it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from threading import Thread

import numpy
import pytest

from cluster.errors import EnvironmentProblem
from cluster.model_shape import named_shape
from cluster.ports import free_ports
from cluster.spec import TransportName
from deploy.cli import main
from deploy.kvbench.cases import Bench, flat_bench, layout_bench, layout_of
from deploy.kvbench.report import KvBenchReport, Link, Row, fit_link
from kv_transfer.plan import Runs


def _stays_inside(bench: Bench) -> None:
    for case in bench.cases:
        for runs in case.transfers:
            for regions, region, offset in (
                (bench.source_regions, runs.source_region, runs.source_offset),
                (bench.target_regions, runs.target_region, runs.target_offset),
            ):
                sizes = numpy.array(regions)[region]
                assert (offset >= 0).all(), case.what
                assert (offset + runs.size <= sizes).all(), case.what


def test_cases_stay_inside_their_memory() -> None:
    _stays_inside(flat_bench())
    shape = named_shape("llama-3-8b")
    source = layout_of(shape, block_tokens=16, tokens=500, ranks=(1, 2))
    target = layout_of(shape, block_tokens=32, tokens=500, ranks=(2, 1))
    _stays_inside(layout_bench("x", source, target, 500))


def test_a_layout_moves_the_same_bytes_in_every_case_and_fewest_pieces_when_joined() -> None:
    layout = layout_of(named_shape("llama-3-8b"), block_tokens=16, tokens=256, ranks=(1, 1))
    cases = {case.what: case for case in layout_bench("x", layout, layout, 256).cases}
    assert {case.bytes for case in cases.values()} == {256 * named_shape("llama-3-8b").kv_bytes_per_token}
    assert cases["blocks in order, joined"].runs == 32
    assert cases["blocks in order, not joined"].runs == 32 * 16
    assert len(cases["scattered blocks, a transfer for each"].transfers) == 16


def test_the_latent_of_mla_is_one_head_that_no_rank_shares() -> None:
    layout = layout_of(named_shape("deepseek-v3"), block_tokens=64, tokens=64, ranks=(8, 1))
    assert (layout.is_mla, layout.kv_heads, layout.place_bytes) == (True, 1, 1152)


def _row(transfers: int, runs: int, size: int, link: Link) -> Row:
    taken = transfers * link.latency_s + runs * link.piece_s + size / link.bytes_per_s
    return Row(
        bench="b",
        transport="t",
        what="w",
        bytes=size,
        runs=runs,
        transfers=transfers,
        read_s=taken,
        copy_s=1.0,
    )


def test_the_fit_finds_the_link_that_made_the_times() -> None:
    link = Link(transport="t", latency_s=2e-4, piece_s=3e-6, bytes_per_s=4e9, error=0.0)
    rows = [_row(1, 1, 1 << 16, link), _row(1, 1000, 1 << 24, link), _row(8, 8, 1 << 28, link)]
    rows.append(_row(1, 4, 1 << 26, link))
    found = fit_link(
        "t",
        [
            *rows,
            Row(bench="b", transport="other", what="w", bytes=1, runs=1, transfers=1, read_s=9, copy_s=9),
        ],
    )
    assert found.latency_s == pytest.approx(2e-4)
    assert found.piece_s == pytest.approx(3e-6)
    assert found.bytes_per_s == pytest.approx(4e9)
    assert found.error < 1e-6
    report = KvBenchReport(device="cpu", rows=tuple(rows), links=(found,))
    assert report.network(found) == {"nvlink_gbps": 32.0, "latency_s": 0.0002}


def test_a_cost_that_would_be_negative_is_none() -> None:
    # Faster with more pieces: noise, which must not become a negative price.
    link = Link(transport="t", latency_s=0.0, piece_s=0.0, bytes_per_s=1e9, error=0.0)
    rows = [_row(1, runs, size, link) for runs, size in ((1, 1 << 20), (100, 1 << 20), (1, 1 << 24))]
    slower = Row(
        bench="b", transport="t", what="w", bytes=1 << 20, runs=1, transfers=1, read_s=2e-3, copy_s=1.0
    )
    found = fit_link("t", [*rows, slower])
    assert min(found.latency_s, found.piece_s) == 0.0
    assert found.bytes_per_s > 0


def test_it_measures_and_keeps_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "links.json"
    arguments = ["kvbench", "--transport", "local", "--rounds", "1", "--out", str(out)]
    assert main([*arguments, "--spec", "deploy/specs/h100-70b-8p8d.yaml", "--tokens", "64"]) == 0
    printed = capsys.readouterr().out
    assert "scattered blocks, one transfer" in printed
    assert "in a spec:  network: {nvlink_gbps: " in printed
    kept = json.loads(out.read_text())
    assert kept["links"][0]["bytes_per_s"] > 0
    assert {row["transport"] for row in kept["rows"]} == {"local"}


def test_another_machines_memory_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    from deploy.kvbench.measure_torch import own_memory
    from deploy.kvbench.remote import serve, source_at

    said: list[str] = []
    (port,) = free_ports("127.0.0.1", 1)
    here = "127.0.0.1", port
    serving = Thread(target=serve, args=(here, own_memory, said.append), kwargs={"times": 2}, daemon=True)
    serving.start()
    until = time.monotonic() + 30
    while not said and time.monotonic() < until:
        time.sleep(0.01)
    words = ["--from", f"127.0.0.1:{port}", "--transport", "torch", "--rounds", "1", "--tokens", "16"]
    assert main(["kvbench", *words]) == 0
    out = capsys.readouterr().out
    assert "network: {nic_gbps: " in out
    # What can't be had there is said here.
    asked = source_at(here)((1024,), "local", "cpu")
    with pytest.raises(EnvironmentProblem, match="it has nixl and torch, not local for cpu"), asked:
        pass
    serving.join(60)
    assert not serving.is_alive()
    assert said[0].endswith(f"pdserve kvbench --from 127.0.0.1:{port}")
    assert said[1] == "127.0.0.1: 256 MiB for torch"
    assert main(["kvbench", *words]) != 0
    assert "nobody serves memory at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--transport", "local", "--device", "cuda"], "give --transport nixl or torch for --device cuda"),
        (["--shape", "no-such-model"], "no-such-model"),
        (["--out", "/no/such/place/x.json"], "there is no directory /no/such/place"),
        (["--spec", "no.yaml"], "no.yaml"),
        (["--from", "nowhere"], "'nowhere', expected HOST:PORT"),
        (["--serve", "127.0.0.1:99999"], "expected HOST:PORT"),
        (["--from", "127.0.0.1:9", "--transport", "local"], "this machine's memory only"),
    ],
)
def test_bad_input_is_said_in_a_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kvbench", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said


def test_content_that_arrives_otherwise_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.kvbench import measure_torch
    from kv_transfer.transport import TransferFailed

    stock = measure_torch.open_transport

    class Shifted:
        """Reads one word too far."""

        def __init__(self, name: TransportName, device: str, host: str = "127.0.0.1") -> None:
            self._inner = stock(name, device, host)
            self.name, self.register, self.connect = "local", self._inner.register, self._inner.connect
            self.close = self._inner.close

        def read(self, peer: object, runs: Runs) -> object:
            # By the largest size: the region ends there.
            moved = numpy.maximum(runs.source_offset - 4, 0)
            return self._inner.read(
                peer, Runs(runs.source_region, moved, runs.target_region, runs.target_offset, runs.size)
            )

    monkeypatch.setattr(measure_torch, "open_transport", Shifted)
    with pytest.raises(TransferFailed, match="arrived otherwise than it was sent"):
        measure_torch.measure(flat_bench(), transport="local", device="cpu", rounds=1, say=lambda _: None)
