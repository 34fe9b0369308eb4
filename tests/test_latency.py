"""Latency models and the profile file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import SpecError
from cluster.latency import (
    Batch,
    ConstantLatency,
    DecodeCost,
    LatencyProfile,
    PrefillCost,
    ProfiledLatency,
    Residuals,
    beyond_region,
    load_profile,
)


def make_profile() -> LatencyProfile:
    return LatencyProfile(
        model="a model",
        machine="a machine",
        source="a test",
        prefill=(
            PrefillCost(up_to_tokens=100, base_s=1.0, token_s=0.1, attention_s=0.01, request_s=0.5),
            PrefillCost(base_s=2.0, token_s=0.2),
        ),
        decode=(
            DecodeCost(base_s=4.0, request_s=0.3),
            DecodeCost(up_to_requests=8, base_s=3.0, request_s=0.2, context_s=0.001),
        ),
        region=Batch(prefill_tokens=200, decode_requests=16)._asdict(),
        residuals={"prefill": Residuals(samples=3, median=0.01, p90=0.02, bias=0.0)},
    )


@pytest.mark.parametrize(
    ("batch", "seconds"),
    [
        (Batch(), 0.0),
        (Batch(prefill_tokens=10, prefill_attention=100, prefill_requests=1), 1.0 + 1.0 + 1.0 + 0.5),
        (Batch(prefill_tokens=100), 1.0 + 10.0),
        (Batch(prefill_tokens=101), 2.0 + 20.2),
        (Batch(decode_requests=8, decode_context_tokens=1000), 3.0 + 1.6 + 1.0),
        (Batch(decode_requests=9, decode_context_tokens=1000), 4.0 + 2.7),
        # Both phases: the larger base once, here decode's, then prefill's.
        (Batch(prefill_tokens=10, decode_requests=1), 3.0 + 1.0 + 0.2),
        (Batch(prefill_tokens=10, decode_requests=10), 4.0 + 1.0 + 3.0),
    ],
)
def test_profiled_times(batch: Batch, seconds: float) -> None:
    assert ProfiledLatency(make_profile()).iteration_s(batch) == pytest.approx(seconds)


def test_beyond_every_limit_the_last_segment_holds() -> None:
    profile = make_profile().model_copy(
        update={"decode": (DecodeCost(up_to_requests=2, base_s=1.0, request_s=1.0),)}
    )
    assert ProfiledLatency(profile).iteration_s(Batch(decode_requests=5)) == 6.0


LEVELS = ((1, 0.5), (2, 0.9), (4, 0.1), (8, 0.5))


@pytest.mark.parametrize(
    ("requests", "seconds"), [(1, 0.5), (2, 0.9), (3, 0.5), (4, 0.1), (6, 0.3), (8, 0.5), (10, 0.7)]
)
def test_levels_of_batch_sizes_have_straight_lines_between(requests: int, seconds: float) -> None:
    cost = DecodeCost(base_s=1.0, request_s=0.1, context_s=0.01, levels=LEVELS)
    assert cost.requests_s(requests) == pytest.approx(seconds)
    profile = make_profile().model_copy(update={"decode": (cost,)})
    batch = Batch(decode_requests=requests, decode_context_tokens=7)
    assert ProfiledLatency(profile).iteration_s(batch) == pytest.approx(1.0 + seconds + 0.07)
    assert ProfiledLatency(profile).iteration_s(batch._replace(prefill_tokens=10)) == pytest.approx(
        1.0 + 1.0 + seconds + 0.07
    )


def test_below_the_first_level_it_holds_as_well() -> None:
    assert DecodeCost(base_s=1.0, levels=((4, 0.2), (8, 0.4))).requests_s(1) == pytest.approx(0.2)


@pytest.mark.parametrize("levels", [((2, 0.1), (1, 0.2)), ((1, 0.1), (1, 0.2)), ((1, -0.1),)])
def test_levels_out_of_order_are_refused(levels: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="expected rising numbers"):
        DecodeCost(base_s=1.0, levels=levels)


def test_constant_times() -> None:
    model = ConstantLatency(step_s=1.0, prefill_s_per_token=0.5)
    assert model.iteration_s(Batch(prefill_tokens=4, decode_requests=9)) == 3.0
    assert model.region is None


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    make_profile().save(path)
    assert load_profile(path) == make_profile()
    assert load_profile(str(path)) == make_profile()


@pytest.mark.parametrize(
    ("change", "path", "says"),
    [
        ({"format": 99}, "format", "measure again"),
        ({"decode": []}, "decode", "at least 1"),
        ({"prefill": []}, "prefill", "at least 1"),
        ({"region": {"prefill_tokens": "many"}}, "region.prefill_tokens", "integer"),
        ({"unheard_of": 1}, "unheard_of", "not permitted"),
        ({"prefill": [{"base_s": -1, "token_s": 0}]}, "prefill.0.base_s", "greater than or equal to 0"),
    ],
)
def test_a_bad_profile_is_told_by_key(
    tmp_path: Path, change: dict[str, object], path: str, says: str
) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(make_profile().model_dump(mode="json") | change), encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_profile(file)
    assert caught.value.path == path
    assert says in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "7"])
def test_what_is_no_profile_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=r"profile\.json"):
        load_profile(file)


def test_a_missing_profile_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="pdserve profile"):
        load_profile(tmp_path / "none.json")


def test_beyond_region_names_what_was_never_measured() -> None:
    region = ProfiledLatency(make_profile()).region
    assert beyond_region(Batch(prefill_tokens=200, decode_requests=16), region) == []
    assert beyond_region(Batch(prefill_tokens=5000, decode_requests=17), region) == [
        "prefill_tokens reached 5,000, measured up to 200",
        "decode_requests reached 17, measured up to 16",
    ]
    assert beyond_region(Batch(prefill_tokens=10**9), None) == []
