"""Medians, hold-out, fit and the table of a profile."""

from __future__ import annotations

from random import Random

import pytest

from cluster.latency import Batch, DecodeCost, LatencyProfile, PrefillCost
from deploy.profiler.engine import Measured
from deploy.profiler.fit import TooFewPoints, averages, by_kind, fit_costs, model_of, split, table
from deploy.profiler.grid import Point

TRUE = model_of(
    (PrefillCost(base_s=0.004, token_s=50e-6, attention_s=10e-9, request_s=0.0),),
    (DecodeCost(base_s=0.003, request_s=100e-6, context_s=0.2e-6),),
)
POINT = Point("decode", 2, 10)


def measured(batch: Batch, seconds: float, point: Point = POINT) -> Measured:
    return Measured(point=point, batch=batch, seconds=seconds)


def decode(requests: int, context: int) -> Batch:
    return Batch(decode_requests=requests, decode_context_tokens=context)


def prompts(tokens: int, requests: int = 1) -> Batch:
    return Batch(tokens * requests, tokens**2 * requests, requests)


def test_decodes_of_a_point_are_one_sample_with_their_mean_context() -> None:
    seen = [measured(decode(2, 20 + 2 * n), 0.001 * (n + 1)) for n in range(5)]
    assert averages(seen) == [(decode(2, 24), 0.003)]


def test_one_slow_iteration_does_not_move_a_sample() -> None:
    seen = [measured(prompts(64), seconds) for seconds in (0.01, 0.01, 5.0)]
    assert averages(seen) == [(prompts(64), 0.01)]


def test_what_was_seen_once_is_left_out() -> None:
    seen = [measured(decode(2, 20), 0.001), measured(decode(2, 22), 0.001), measured(prompts(9), 0.002)]
    assert averages(seen) == [(decode(2, 21), 0.001)]
    assert len(averages(seen, least_repeats=1)) == 2


def test_kinds() -> None:
    mixed = Batch(10, 100, 1, 2, 30)
    samples = [(prompts(9), 1.0), (decode(1, 5), 1.0), (mixed, 1.0)]
    assert by_kind(samples) == (samples[:1], samples[1:2], samples[2:])


@pytest.mark.parametrize("count", [1, 3, 4, 7, 11])
def test_the_smallest_and_the_largest_are_never_held_out(count: int) -> None:
    samples = [(prompts(n + 1), 1.0) for n in range(count)]
    fitted, held = split(samples)
    assert sorted([*fitted, *held]) == samples
    assert {samples[0], samples[-1]} <= set(fitted)


def noisy_samples(seed: int) -> list[tuple[Batch, float]]:
    rng = Random(seed)
    batches = [prompts(2**n, k) for n in range(4, 12) for k in (1, 4)]
    batches += [decode(b, b * c) for b in (1, 2, 4, 8, 16, 32) for c in (16, 128, 1024)]
    return [(batch, TRUE.iteration_s(batch) * rng.uniform(0.98, 1.02)) for batch in batches]


def test_a_fit_is_checked_on_what_it_did_not_see() -> None:
    samples = noisy_samples(0)
    fit = fit_costs(samples)
    assert fit.residuals["prefill, held out"].samples == len(split(by_kind(sorted(samples))[0])[1]) > 0
    assert all(residuals.median < 0.02 for residuals in fit.residuals.values())
    assert fit.region == Batch(8192, 4 * 2048**2, 4, 32, 32 * 1024)


def test_a_held_out_batch_that_is_off_shows_in_the_residuals() -> None:
    samples = sorted(noisy_samples(0))
    held = split(by_kind(samples)[1])[1][0]
    spoiled = [(batch, seconds * (2 if (batch, seconds) == held else 1)) for batch, seconds in samples]
    assert fit_costs(spoiled).decode == fit_costs(samples).decode
    assert fit_costs(spoiled).residuals["decode, held out"].bias < -0.05


def test_noise_is_no_reason_for_segments() -> None:
    for seed in range(20):
        assert len(fit_costs(noisy_samples(seed)).prefill) == 1


def test_a_real_kink_gets_a_segment() -> None:
    """Up to 256 tokens an iteration is bound by the weights, as on a GPU."""
    rng = Random(0)
    bent = [(batch, seconds) for batch, seconds in noisy_samples(0) if not batch.prefill_tokens]
    for tokens in [*range(16, 257, 24), *range(300, 2001, 100)]:
        bent.append((prompts(tokens), rng.uniform(0.98, 1.02) * max(0.010, tokens * 40e-6)))
    costs = fit_costs(bent).prefill
    assert len(costs) > 1
    assert 200 <= (costs[0].up_to_tokens or 0) <= 400


def test_too_little_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(TooFewPoints, match="raise --max-prompt"):
        fit_costs([(prompts(64), 0.01), (decode(1, 5), 0.01)])


def test_the_table_names_costs_errors_and_batches() -> None:
    samples = noisy_samples(1)
    fit = fit_costs(samples)
    profile = LatencyProfile(
        model="tiny", machine="a machine", source="test", prefill=fit.prefill, decode=fit.decode,
        region=fit.region._asdict(), residuals=fit.residuals,
    )  # fmt: skip
    text = table(profile, samples, {"hand-over": "1 ms"}, frontend_s=0.002)
    assert "tiny on a machine" in text
    assert "decode, held out" in text
    assert "hand-over" in text
    row = next(line for line in text.splitlines() if line.startswith("1 prompts, 2,048 tokens"))
    fitted_ms = float(row.split()[-1])
    assert fitted_ms == pytest.approx(TRUE.iteration_s(prompts(2048)) * 1e3 + 2, rel=0.05)
    assert max(len(line) for line in text.splitlines()) <= 100
