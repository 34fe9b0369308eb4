"""Profiling the twin, whose iteration times are known, in virtual time."""

from __future__ import annotations

from random import Random

import pytest

from cluster.errors import EnvironmentProblem, SpecError
from cluster.instance import EngineFacts, Role
from cluster.latency import Batch, DecodeCost, PrefillCost
from cluster.sim_engine import SimEngine
from cluster.sim_options import TwinOptions
from cluster.spec import ClusterSpec, SimEngineSpec
from deploy.profiler.engine import (
    LEAST_ROUNDS,
    EngineProbe,
    Measured,
    engine_limits,
    make_engine,
    measure_engine,
)
from deploy.profiler.fit import averages, fit_costs, model_of
from deploy.profiler.grid import Limits, Point
from deploy.virtual_time import run_virtual

PREFILL = PrefillCost(base_s=0.003, token_s=40e-6, attention_s=20e-9, request_s=50e-6)
DECODE = DecodeCost(base_s=0.0025, request_s=80e-6, context_s=0.3e-6)
TRUE = model_of((PREFILL,), (DECODE,))


def twin(**changes: int) -> SimEngine:
    options = {"blocks": 8000, "block_size": 16, "max_model_len": 4096, "max_num_seqs": 128} | changes
    return SimEngine(TwinOptions(latency=TRUE, max_num_batched_tokens=8192, **options), "m")


async def profile(engine: SimEngine, limits: Limits, seed: int = 0) -> list[Measured]:
    facts = await engine.start(lambda phase: None)
    return await measure_engine(
        engine, limits, max_model_len=facts.max_model_len, seconds=0.1, seed=seed, say=lambda line: None
    )


LIMITS = Limits(max_prompt=1024, max_requests=16, kv_tokens=128_000)


def test_the_profile_of_a_twin_is_what_the_twin_was_given() -> None:
    measured, _ = run_virtual(profile(twin(), LIMITS))
    fit = fit_costs(averages(measured))
    (prefill,), (decode,) = fit.prefill, fit.decode
    assert prefill.model_dump(exclude_none=True) == pytest.approx(PREFILL.model_dump(exclude_none=True))
    assert decode.model_dump(exclude={"levels"}, exclude_none=True) == pytest.approx(
        DECODE.model_dump(exclude={"levels"}, exclude_none=True),
        rel=1e-4,  # mean contexts are whole tokens
    )
    assert not decode.levels
    assert set(fit.residuals) == {"prefill, held out", "decode, held out", "mixed, held out"}
    assert all(residuals.p90 < 1e-4 for residuals in fit.residuals.values())


def test_every_iteration_has_the_batch_that_its_time_is_of() -> None:
    measured, _ = run_virtual(profile(twin(), LIMITS))
    for one in measured:
        assert one.seconds == pytest.approx(TRUE.iteration_s(one.batch), rel=1e-9), one


def test_every_kind_of_batch_comes_up_as_asked() -> None:
    measured, _ = run_virtual(profile(twin(), LIMITS))
    batches = {(one.point, one.batch._replace(decode_context_tokens=0)) for one in measured}
    assert (Point("decode", 8, 128), Batch(decode_requests=8)) in batches
    assert (Point("mixed", 4, 128, 64), Batch(64, 64**2, 1, 4)) in batches
    assert any(batch.prefill_requests >= 16 for _, batch in batches)
    assert max(batch.prefill_tokens for _, batch in batches) >= 1024


def test_one_seed_measures_the_same() -> None:
    first, _ = run_virtual(profile(twin(), LIMITS, seed=3))
    second, _ = run_virtual(profile(twin(), LIMITS, seed=3))
    assert first == second


def test_nothing_is_left_in_the_engine_after_a_point() -> None:
    async def visit() -> SimEngine:
        engine = twin()
        probe = EngineProbe(engine, Random(0), 4096)
        for point in (Point("decode", 4, 64), Point("mixed", 4, 64, 128), Point("prefill", 4, 64)):
            assert await probe.measure(point)
            assert (engine.load().running, engine.load().waiting) == (0, 0)
        return engine

    run_virtual(visit())


def test_the_first_round_is_warm_up() -> None:
    said: list[str] = []

    async def measure() -> None:
        engine = twin()
        limits = Limits(max_prompt=64, max_requests=2, kv_tokens=1000)
        await measure_engine(engine, limits, max_model_len=4096, seconds=1e-9, seed=0, say=said.append)

    run_virtual(measure())
    assert len(said) == 1 + LEAST_ROUNDS
    assert said[0].startswith("warm-up")
    assert " 0 iterations" in said[0]


def test_an_engine_that_says_nothing_is_an_error() -> None:
    class Mute(SimEngine):
        def add(self, frames: object) -> None:
            """Loses it."""

    async def measure() -> None:
        await EngineProbe(Mute.of(SPEC, Role.DECODE), Random(0), 4096).measure(Point("prefill", 1, 16))

    with pytest.raises(EnvironmentProblem, match="no output for 120 s"):
        run_virtual(measure())


SPEC = ClusterSpec(model="m", device="cpu", engine="sim", sim=SimEngineSpec(step_s=0.002))


def test_the_engine_of_a_spec_is_made() -> None:
    engine = make_engine(SPEC, Role.PREFILL)
    assert isinstance(engine, SimEngine)


def facts() -> EngineFacts:
    return twin().facts()


def test_limits_follow_the_engine() -> None:
    assert engine_limits(facts(), max_prompt=None, max_requests=None) == Limits(
        max_prompt=2048, max_requests=128, kv_tokens=128_000
    )
    asked = engine_limits(facts(), max_prompt=100, max_requests=3)
    assert (asked.max_prompt, asked.max_requests) == (100, 3)


@pytest.mark.parametrize(
    ("max_prompt", "max_requests", "told"), [(4096, None, "max_model_len"), (None, 129, "max_num_seqs")]
)
def test_more_than_the_engine_takes_is_refused(
    max_prompt: int | None, max_requests: int | None, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        engine_limits(facts(), max_prompt=max_prompt, max_requests=max_requests)


def test_one_of_a_group_is_not_measured_alone() -> None:
    decode = {"count": 2, "data_parallel_size": 2}
    spec = ClusterSpec.model_validate({"model": "m", "engine": "sim", "decode": decode})
    with pytest.raises(SpecError, match="without those that it shares experts with"):
        make_engine(spec, Role.DECODE)
