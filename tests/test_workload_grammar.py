"""A workload in one word: kinds, keys, and what is said about wrong ones."""

from pathlib import Path

import pytest

from deploy.trace_files import TraceError, load_trace
from deploy.workload import WorkloadRequest, mean_rate_rps
from deploy.workload_grammar import KINDS, make_workload

PLAIN = "arrival_s,input_tokens,output_tokens\n0,5,6\n10,7,8\n20,9,10\n"
RATES = "t_s,rate_rps,active_clients,rate_weighted_cv\n0,5,1,1\n600,50,1,2\n"
TWO = "input=512,output=128"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.csv"
    path.write_text(PLAIN)
    return path


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    path = tmp_path / "rates.csv"
    path.write_text(RATES)
    return path


def lengths(requests: list[WorkloadRequest]) -> list[tuple[int, int]]:
    return [(r.input_tokens, r.output_tokens) for r in requests]


def test_a_path_is_a_file_even_if_it_looks_like_a_kind(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_workload(str(plain), 0) == load_trace(plain)
    monkeypatch.chdir(tmp_path)
    plain.rename(tmp_path / "poisson")
    assert len(make_workload("poisson", 0)) == 3
    with pytest.raises(FileNotFoundError):
        make_workload("none.csv", 0)


def test_steady_kinds() -> None:
    poisson = make_workload(f"poisson:rate=4,count=4000,{TWO}", 1)
    assert len(poisson) == 4000
    assert set(lengths(poisson)) == {(512, 128)}
    assert mean_rate_rps(poisson) == pytest.approx(4, rel=0.07)
    gamma = make_workload(f"gamma:rate=4,cv=2.5,duration=1000,{TWO}", 1)
    assert gamma[-1].arrival_s < 1000
    assert len(gamma) == pytest.approx(4000, rel=0.2)
    fixed = make_workload(f"fixed:rate=4,count=5,{TWO}", 1)
    assert [r.arrival_s for r in fixed] == [0, 0.25, 0.5, 0.75, 1.0]


def test_the_seed_decides_and_another_rate_keeps_the_lengths() -> None:
    def of(rate: int, seed: int) -> list[WorkloadRequest]:
        return make_workload(f"gamma:rate={rate},cv=2,count=100,lengths=conversation", seed)

    assert of(4, 1) == of(4, 1)
    assert lengths(of(4, 1)) == lengths(of(8, 1)) != lengths(of(4, 2))
    assert of(4, 1)[-1].arrival_s == pytest.approx(2 * of(8, 1)[-1].arrival_s)


def test_lengths_of_a_file(plain: Path) -> None:
    drawn = make_workload(f"poisson:rate=4,count=100,lengths={plain}", 0)
    assert set(lengths(drawn)) == {(5, 6), (7, 8), (9, 10)}


def test_servegen(rates: Path) -> None:
    hour = make_workload(f"servegen:rates={rates},start=300,duration=600,cv=1,{TWO}", 0)
    early = sum(r.arrival_s < 300 for r in hour)
    assert early == pytest.approx(1500, rel=0.15)
    assert len(hour) - early == pytest.approx(15_000, rel=0.05)
    assert hour[-1].arrival_s < 600
    first = make_workload(f"servegen:rates={rates},count=7,share=0.5,{TWO}", 0)
    assert len(first) == 7


def test_a_stretch_of_a_trace(plain: Path) -> None:
    cut = make_workload(f"trace:file={plain},start=5,duration=15", 0)
    assert [(r.arrival_s, r.input_tokens) for r in cut] == [(0.0, 7)]
    assert len(make_workload(f"trace:file={plain}", 0)) == 3


def test_sessions_on_any_kind(plain: Path) -> None:
    turns = make_workload(f"trace:file={plain},turns=1e9,gap=5", 0)
    assert [r.session_id for r in turns] == ["session-0"] * 3
    assert [r.input_tokens for r in turns] == [5, 5 + 6 + 7, 5 + 6 + 7 + 8 + 9]
    assert make_workload(f"poisson:rate=4,count=3,{TWO},turns=2,gap=5", 0)[0].hash_ids == (0,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("poison:rate=4", ["no kind 'poison'", "fixed, poisson, gamma", "poisson:rate=4,count=1000"]),
        ("poisson", ["input is missing", "lengths=FILE"]),
        (f"poisson:rate=4,{TWO}", ["count is missing", "duration"]),
        (f"poisson:count=4,{TWO}", ["rate is missing", "poisson takes rate, count"]),
        (f"poisson:rate=4,count=3,duration=3,{TWO}", ["count and duration are both given"]),
        (f"poisson:rat=4,count=3,{TWO}", ["unknown key 'rat'", "poisson takes rate"]),
        (f"poisson:cv=4,count=3,{TWO}", ["unknown key 'cv'"]),
        ("poisson:rate=4,count", ["'count' is no key=value"]),
        ("poisson:rate=,count=3", ["'rate=' is no key=value"]),
        ("poisson:rate=4,rate=4", ["rate is given twice"]),
        (f"poisson:rate=fast,count=3,{TWO}", ["rate is 'fast'", "positive number"]),
        (f"poisson:rate=0,count=3,{TWO}", ["rate is '0'"]),
        (f"poisson:rate=inf,count=3,{TWO}", ["rate is 'inf'"]),
        (f"poisson:rate=1,count=1.5,{TWO}", ["count is '1.5'", "whole number"]),
        (f"poisson:rate=1,count=9999999,{TWO}", ["9,999,999 requests", "at most 5,000,000"]),
        (f"poisson:rate=1e9,duration=1e9,{TWO}", ["at most 5,000,000"]),
        ("poisson:rate=1,count=1,input=5", ["output is missing", "lengths=FILE"]),
        (f"poisson:rate=1,count=1,lengths=conversation,{TWO}", ["lengths are given twice"]),
        ("poisson:rate=1,count=1,input=0,output=3", ["input is '0'", "whole number"]),
        (f"gamma:rate=1,count=1,{TWO}", ["cv is missing"]),
        (f"gamma:rate=1,cv=0,count=1,{TWO}", ["cv is '0'", "0.001 to 1000", "fixed"]),
        (f"poisson:rate=1,count=3,{TWO},turns=2", ["gap is missing"]),
        (f"poisson:rate=1,count=3,{TWO},gap=2", ["turns is missing"]),
        (f"poisson:rate=1,count=3,{TWO},gap=2,turns=0.5", ["turns is '0.5'", "at least 1"]),
        (f"servegen:duration=3,{TWO}", ["rates is missing", "rates=FILE"]),
        (f"servegen:rates=RATES,{TWO}", ["count is missing"]),
        (f"servegen:rates=RATES,duration=3,share=2,{TWO}", ["share is '2'"]),
        (f"servegen:rates=RATES,start=1200,duration=3,{TWO}", ["the rates are of 0 s to 1200 s"]),
        (f"servegen:rates=RATES,duration=1e-9,{TWO}", ["no request"]),
        ("trace:start=3", ["file is missing", "file=FILE"]),
        ("trace:file=TRACE,start=99", ["no request"]),
        ("trace:file=TRACE,start=-1", ["start is '-1'"]),
    ],
)
def test_a_wrong_description_names_the_key(text: str, said: list[str], plain: Path, rates: Path) -> None:
    text = text.replace("TRACE", str(plain)).replace("RATES", str(rates))
    with pytest.raises(ValueError, match=r"^trace ") as caught:
        make_workload(text, 0)
    message = str(caught.value)
    assert message.startswith(f"trace {text!r}: ")
    assert all(words in message for words in said), message
    assert "\n" not in message


def test_a_trace_with_prefixes_of_its_own_takes_no_sessions(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 7, "hash_ids": [1]}\n')
    with pytest.raises(ValueError, match="hash ids of its own"):
        make_workload(f"trace:file={path},turns=2,gap=1", 0)


def test_errors_of_named_files_are_their_own(rates: Path, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"rates\.csv, line 1"):
        make_workload(f"poisson:rate=1,count=1,lengths={rates}", 0)
    with pytest.raises(FileNotFoundError):
        make_workload(f"trace:file={tmp_path / 'none'}", 0)


def test_every_kind_is_in_the_description() -> None:
    import deploy.workload_grammar

    described = deploy.workload_grammar.__doc__ or ""
    assert all(f"{kind}:" in described for kind in KINDS)
