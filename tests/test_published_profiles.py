"""DistServe's and Splitwise's measurements as profiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import SpecError
from cluster.latency import Batch, ProfiledLatency
from deploy.profiler.published import distserve_profile, splitwise_profile, splitwise_rows

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="no published measurements beside the checkout")

HEADER = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel"


@pytest.fixture
def distserve(tmp_path: Path) -> Path:
    fit = {
        "decoding_large_small_bs_threshold": 95,
        "prefill": [10.0, 0.1, -0.001],
        "decoding_smallbs": [20.0, 0.002, 0.5],
        "decoding_largebs": [5.0, 0.001, 0.25],
    }
    path = tmp_path / "profiler.json"
    path.write_text(json.dumps({"facebook/opt-13b": {"1": fit}}), encoding="utf-8")
    return path


def write_splitwise(path: Path, times_ms: dict[tuple[int, int], float]) -> Path:
    rows = [f"m,g,{prompt},{batch},64,{ms},{10 + batch},2" for (prompt, batch), ms in times_ms.items()]
    path.write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    return path


def test_distserve_costs_in_seconds_and_its_order(distserve: Path) -> None:
    latency = ProfiledLatency(distserve_profile(distserve, "opt-13b", 1))
    prefill = Batch(prefill_tokens=100, prefill_attention=10_000, prefill_requests=1)
    assert latency.iteration_s(prefill) == pytest.approx(0.020)  # the negative cost counts as 0
    small = Batch(decode_requests=94, decode_context_tokens=1000)
    assert latency.iteration_s(small) == pytest.approx((20 + 2 + 47) / 1e3)
    large = Batch(decode_requests=95, decode_context_tokens=1000)
    assert latency.iteration_s(large) == pytest.approx((5 + 1 + 23.75) / 1e3)


def test_distserve_region_is_its_grid(distserve: Path) -> None:
    profile = distserve_profile(distserve, "facebook/opt-13b", 1)
    assert profile.region["prefill_tokens"] == 49_152
    assert profile.region["decode_requests"] == 192


@pytest.mark.parametrize(
    ("model", "ranks", "says"),
    [("opt-30b", 1, "the file has facebook/opt-13b"), ("opt-13b", 8, "the file has 1")],
)
def test_distserve_lists_what_it_has(distserve: Path, model: str, ranks: int, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        distserve_profile(distserve, model, ranks)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ('{"opt-13b": {"1": {"prefill": [1, 2]}}}', "opt-13b.1.decoding_large_small_bs_threshold"),
    ],
)
def test_what_is_no_distserve_file_is_told(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "profiler.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=says):
        distserve_profile(path, "opt-13b", 1)


def test_splitwise_rows_are_whole_prompts_and_mean_decodes(tmp_path: Path) -> None:
    path = write_splitwise(tmp_path / "perf.csv", {(512, 4): 100.0})
    (row,) = next(iter(splitwise_rows(path).values()))
    assert row.prefill() == (Batch(2048, 4 * 512**2, 4, 0, 0), 0.1)
    assert row.decode() == (Batch(0, 0, 0, 4, 4 * (512 + 32)), 0.014)


def test_a_batch_that_was_cut_is_left_out(tmp_path: Path) -> None:
    whole = {(512, batch): 50.0 * batch for batch in (1, 2, 4, 8)}
    path = write_splitwise(tmp_path / "perf.csv", whole | {(512, 16): 150.0})
    rows = next(iter(splitwise_rows(path).values()))
    assert [row.requests for row in rows] == [1, 2, 4, 8]


def test_splitwise_profile(tmp_path: Path) -> None:
    path = write_splitwise(tmp_path / "perf.csv", {(512, batch): 20 + 50.0 * batch for batch in (1, 2, 4, 8)})
    profile = splitwise_profile(path, "m", "g", 2)
    latency = ProfiledLatency(profile)
    assert latency.iteration_s(Batch(1024, 2 * 512**2, 2)) == pytest.approx(0.12)
    assert latency.iteration_s(Batch(decode_requests=4, decode_context_tokens=2176)) == pytest.approx(0.014)
    assert profile.region == Batch(4096, 8 * 512**2, 8, 8, 8 * 544)._asdict()
    with pytest.raises(SpecError, match="the file has m on 2 g"):
        splitwise_profile(path, "m", "g", 4)


def test_what_is_no_splitwise_file_is_told(tmp_path: Path) -> None:
    path = write_splitwise(tmp_path / "perf.csv", {(512, 1): 1.0})
    path.write_text(path.read_text(encoding="utf-8") + "m,g,many,1,1,1,1,2\n", encoding="utf-8")
    with pytest.raises(SpecError, match="line 3"):
        splitwise_rows(path)
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(SpecError, match="line 2"):
        splitwise_rows(path)
    with pytest.raises(SpecError, match=r"perf_model\.csv"):
        splitwise_rows(tmp_path / "none.csv")


@needs_traces
@pytest.mark.parametrize("engine", ["distserve", "vllm"])
def test_all_of_distserves_fits_are_read(engine: str) -> None:
    path = TRACES / "distserve" / f"profiler-a100-80g.{engine}.json"
    for model, sizes in (("opt-13b", (1, 2, 4)), ("opt-66b", (2, 3, 4, 8))):
        for ranks in sizes:
            latency = ProfiledLatency(distserve_profile(path, model, ranks))
            assert 0.01 < latency.iteration_s(Batch(decode_requests=1, decode_context_tokens=500)) < 0.1


@needs_traces
def test_splitwise_without_its_cut_batches() -> None:
    groups = splitwise_rows(TRACES / "splitwise" / "perf_model.csv")
    assert len(groups) == 12
    for key, rows in groups.items():
        # 105 rows; the five of 64 prompts on two GPUs were cut.
        assert len(rows) == (100 if key.tensor_parallel_size == 2 else 105)
