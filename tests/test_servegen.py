"""ServeGen's rate files: windows, and arrivals with their rate and variation."""

import math
import statistics
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.servegen import RateWindow, arrivals_s, clip, expected_requests, load_rates
from deploy.trace_files import TraceError

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"
HEADER = "t_s,rate_rps,active_clients,rate_weighted_cv\n"


def rates(tmp_path: Path, text: str) -> list[RateWindow]:
    path = tmp_path / "rates.csv"
    path.write_text(text)
    return load_rates(path)


def window(start_s: float, end_s: float, rate_rps: float, cv: float = 1.0) -> RateWindow:
    return RateWindow(start_s=start_s, end_s=end_s, rate_rps=rate_rps, cv=cv)


def drawn(windows: list[RateWindow], seed: int = 1, **options: float) -> list[float]:
    return list(arrivals_s(windows, Random(seed), **options))


def test_windows_last_until_the_next_and_silence_has_no_variation(tmp_path: Path) -> None:
    text = HEADER + "0,2.5,3,1.5\r\n600,0.0,0,\r\n900,4,1,0.5\r\n"
    assert rates(tmp_path, text) == [
        window(0, 600, 2.5, 1.5),
        window(600, 900, 0.0),
        window(900, 1200, 4.0, 0.5),
    ]
    assert rates(tmp_path, HEADER + "60,1,1,1\n") == [window(60, 660, 1.0)]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (HEADER + "0,1,1,1\n600,x,1,1\n", 3, ["'x'", "rate_rps", "finite number"]),
        (HEADER + "0,-1,1,1\n", 2, ["'-1'", "rate_rps", ">= 0"]),
        (HEADER + "0,1,1,\n", 2, ["''", "rate_weighted_cv"]),
        (HEADER + "0,1,1,0\n", 2, ["'0'", "rate_weighted_cv", "0.001 to 1000"]),
        (HEADER + "0,1,1,1\n\n0,1,1,1\n", 4, ["t_s", "more than the row before"]),
        (HEADER + "0,1,1\n", 2, ["4 columns"]),
        (HEADER, 1, ["at least one row", "t_s"]),
        ("", 1, ["at least one row"]),
        ("arrival_s,input_tokens,output_tokens\n0,1,1\n", 1, ["'arrival_s", "t_s,rate_rps"]),
    ],
)
def test_bad_rates_say_where_and_what(tmp_path: Path, text: str, line: int, said: list[str]) -> None:
    with pytest.raises(TraceError) as caught:
        rates(tmp_path, text)
    assert caught.value.line == line
    assert all(words in str(caught.value) for words in said), str(caught.value)


def test_a_stretch_is_cut_out_and_starts_at_zero() -> None:
    windows = [window(0, 600, 1.0, 2.0), window(600, 1200, 3.0)]
    assert clip(windows, 500, 200) == [window(0, 100, 1.0, 2.0), window(100, 200, 3.0)]
    assert expected_requests(clip(windows, 500, 200)) == 100 + 300
    assert clip(windows, 700) == [window(0, 500, 3.0)]
    with pytest.raises(ValueError, match="the rates are of 0 s to 1200 s"):
        clip(windows, 1200, 10)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_a_window_has_its_rate_and_variation(cv: float, share: float) -> None:
    times = drawn([window(0, 2000, 30.0 / share, cv)], share=share)
    gaps = [after - before for before, after in pairwise(times)]
    thinned_cv = math.sqrt(1 + share * (cv**2 - 1))
    assert len(times) == pytest.approx(60_000, rel=4 * thinned_cv / math.sqrt(60_000))
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(thinned_cv, rel=0.05)


def test_the_expected_count_is_exact_from_the_first_moment() -> None:
    # An arrival at each window's start would make it 23 instead of 10 of these short ones.
    windows = [window(n, n + 1, 10.0, 5.0) for n in range(4000)]
    spread = 5.0 * math.sqrt(10.0 * 4000)
    assert len(drawn(windows)) == pytest.approx(40_000, abs=4 * spread)
    # Here forgetting what was dropped before the first kept request would add one to each.
    thinned = drawn([window(n, n + 1, 200.0, 1.0) for n in range(4000)], share=0.05)
    assert len(thinned) == pytest.approx(40_000, abs=4 * math.sqrt(40_000))


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(0.1, 100), st.just(0.0) | st.floats(0.01, 5), st.floats(0.001, 1000)),
        min_size=1,
        max_size=8,
    ),
    st.floats(0.01, 1.0),
    st.integers(0, 5),
)
def test_times_never_fall_stay_in_active_windows_and_repeat(
    shapes: list[tuple[float, float, float]], share: float, seed: int
) -> None:
    windows: list[RateWindow] = []
    for duration_s, rate_rps, cv in shapes:
        start_s = windows[-1].end_s if windows else 0.0
        windows.append(window(start_s, start_s + duration_s, rate_rps, cv))
    # A cv of its own: one of 1000 may bring a million requests at once.
    times = drawn(windows, seed, share=share, cv=min(shapes[0][2], 5.0))
    assert times == sorted(times)
    active = [w for w in windows if w.rate_rps]
    assert all(any(w.start_s <= t < w.end_s for w in active) for t in times)
    assert times == drawn(windows, seed, share=share, cv=min(shapes[0][2], 5.0))


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.1}, {"cv": 0.0}, {"cv": 1e6}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        drawn([window(0, 1, 1.0)], **options)


@pytest.mark.parametrize(
    ("name", "mean_rps", "max_rps", "days"),
    [  # figures of the traces' own README
        ("m-large", 195.8, 583, 14),
        ("m-mid", 1790, 3445, 14),
        ("m-small", 1174, 3880, 14),
        ("deepseek-r1", 16.0, 42.5, 1),
        ("mm-image", 9.5, 13.3, 1),
    ],
)
def test_real_rates_have_their_published_figures(
    name: str, mean_rps: float, max_rps: float, days: int
) -> None:
    path = TRACES / "servegen" / f"rate_{name}.csv.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the repository (../shared/traces)")
    windows = load_rates(path)
    span_s = windows[-1].end_s - windows[0].start_s
    assert span_s == days * 86_400
    assert expected_requests(windows) / span_s == pytest.approx(mean_rps, rel=0.01)
    assert max(w.rate_rps for w in windows) == pytest.approx(max_rps, abs=0.6)


def test_a_share_of_a_real_day_follows_its_rates() -> None:
    path = TRACES / "servegen" / "rate_deepseek-r1.csv.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the repository (../shared/traces)")
    windows = load_rates(path)
    times = drawn(windows, share=0.05, cv=1.5)
    assert len(times) == pytest.approx(0.05 * expected_requests(windows), rel=0.02)
    quarter_s = windows[-1].end_s / 4
    for n in range(4):
        expected = 0.05 * expected_requests(clip(windows, n * quarter_s, quarter_s))
        count = sum(n * quarter_s <= t < (n + 1) * quarter_s for t in times)
        assert count == pytest.approx(expected, rel=0.05)
