"""The report as text."""

from __future__ import annotations

from hypothesis import given, settings

from deploy.simulator.report import SimulationReport
from deploy.simulator.result import FaultMark, SimulationResult
from deploy.simulator.table import WIDTH, amount_of_bytes, share
from tests import simulated
from tests.simulated import request, result
from tests.test_simulation_report import REPORT


def test_the_whole_table() -> None:
    lines = REPORT.to_text().splitlines()
    assert lines[0] == "simulation  small, seed 7"
    assert lines[2].startswith("*** WARNING: read before you trust the figures ***")
    assert lines[3] == "  * decode_requests reached 512, measured up to 256"
    for line in (
        "attainment  60.0% (3 of 5 met their SLO)",
        "goodput     0.03 requests/s within their SLO: 0.007 for each of 4 GPUs, 36 per GPU-hour",
        "requests    6 in 100.0 s: 4 ok, 1 rejected, 0 failed, 0 timeout, 1 cancelled",
        "throughput  0.04 requests/s, 4 prompt and 0 output tokens/s",
        "GPU time    300 GPU-s present, 180 computing (60.0%)",
        "KV          1.53 GB moved: 400 tokens; 5 tokens recomputed instead",
        "2 misses, by their main cause (excess over the requests that met)",
        "  rejected                 1   50.0%   no complete answer",
        "  prefill queue            1   50.0%   TTFT missed, median +2,800 ms",
        "       1 x rejected-saturated",
        "      50.0 s  decode-0 killed",
        "simulated   in 2.0 s, 50 times as fast as real time; 1,000 events, 500 per second",
    ):
        assert line in lines, line
    cells = [line.split() for line in lines]
    assert ["chat", "1,000", "ms", "100", "ms", "5", "2", "50.0%", "3,346", "168", "1/1"] in cells
    assert ["free", "none", "none", "1", "1", "100.0%", "10,000", "9,000", "0/0"] in cells
    assert ["prefill", "2", "3", "70.0%", "35.0%", "90.0%", "25.0%", "3", "-"] in cells
    assert ["decode", "1", "1", "40.0%", "25.0%", "50.0%", "-", "0", "4.0"] in cells


def test_only_three_causes_are_named() -> None:
    requests = [request((), status=status, output_tokens=0) for status in ("rejected", "failed", "timeout")]
    text = SimulationReport.of(result(*requests * 2, request((9.0,)))).to_text()
    assert "  others                   1   14.3%" in text
    assert "prefill queue         " not in text.partition("misses")[2].partition("pool")[0]


def test_long_lists_are_cut_and_say_so() -> None:
    faults = tuple(FaultMark(float(at_s), "killed") for at_s in range(13))
    errors = [request((), status="failed", error=f"error {number:02}") for number in range(12)]
    text = SimulationReport.of(result(*errors, faults=faults)).to_text()
    assert "  and 3 more" in text.splitlines()
    assert "       2 x other errors" in text.splitlines()


@settings(deadline=None)
@given(simulated.results())
def test_no_line_is_wider_than_promised(found: SimulationResult) -> None:
    lines = SimulationReport.of(found).to_text().split("\n")
    assert max(map(len, lines)) <= WIDTH


def test_bytes_and_shares() -> None:
    assert [amount_of_bytes(count) for count in (0, 999, 1000, 1_530_000, 2e18)] == [
        "0 B", "999 B", "1 kB", "1.53 MB", "2e+03 PB",
    ]  # fmt: skip
    assert (share(None), share(0.1234)) == ("-", "12.3%")
