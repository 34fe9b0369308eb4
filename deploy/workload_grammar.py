"""A workload in one word of the command line: the name of a trace file, or how to draw one.

    azure_conv.csv.gz                                            a file (see deploy.trace_files)
    poisson:rate=4,count=1000,input=512,output=128               exponential gaps
    gamma:rate=4,cv=2.5,duration=600,lengths=sharegpt.csv.gz     bursts; lengths of a file, with replacement
    fixed:rate=4,count=100,lengths=conversation                  a metronome; lengths after a fit
    servegen:rates=m-large.csv.gz,start=36000,duration=600,share=0.02,input=512,output=128
    trace:file=azure_conv.csv.gz,start=600,duration=300          a stretch of a file

Keys by kind are in `KINDS`. All take `turns=4,gap=30`: conversations of 4 turns on average, 30 s apart.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random

from deploy.servegen import MIN_SHARE, arrivals_s, clip, expected_requests, load_rates
from deploy.sessions import attach_sessions
from deploy.trace_files import load_lengths, load_trace, number, whole
from deploy.trace_shapes import (
    MAX_CV,
    MIN_CV,
    Lengths,
    conversation_lengths,
    empirical_lengths,
    fixed_lengths,
    steady_arrivals_s,
    with_lengths,
)
from deploy.workload import WorkloadRequest, from_zero

_LENGTHS = ("input", "output", "lengths")
_SESSIONS = ("turns", "gap")
_STEADY = ("rate", "count", "duration", *_LENGTHS, *_SESSIONS)

KINDS: Mapping[str, tuple[str, ...]] = {
    "fixed": _STEADY,
    "poisson": _STEADY,
    "gamma": ("cv", *_STEADY),
    "servegen": ("rates", "start", "duration", "count", "share", "cv", *_LENGTHS, *_SESSIONS),
    "trace": ("file", "start", "duration", *_SESSIONS),
}
_STEADY_CV = {"fixed": 0.0, "poisson": 1.0}

# ServeGen's largest service sends two billion requests in its two weeks: more than any memory holds.
MAX_REQUESTS = 5_000_000


def make_workload(text: str, seed: int) -> list[WorkloadRequest]:
    """The workload that `text` names: a trace file, or a description as at the top of this module.

    Equal arguments give equal workloads. Arrivals, lengths and sessions are drawn independently, so a change
    of the rate keeps the lengths. A file that exists is a file, whatever its name. Raises ValueError for a
    wrong description, which names the key; TraceError and OSError as `load_trace`.
    """
    kind, _, rest = text.partition(":")
    if os.path.exists(text) or not (kind in KINDS or re.match(r"[a-z_]*:\w+=", text)):
        return load_trace(Path(text))
    if kind not in KINDS:
        raise ValueError(
            f"trace {text!r}: no file, and no kind {kind!r}; the kinds are {', '.join(KINDS)}, "
            "for example poisson:rate=4,count=1000,input=512,output=128"
        )
    keys = _Keys(text, kind, rest)
    workload = _read(keys) if kind == "trace" else _draw(keys, seed)
    if not workload:
        raise keys.wrong("it has no request", "choose a longer or another stretch, or a higher rate")
    if keys.has("turns") or keys.has("gap"):
        turns_mean, gap_s = keys.at_least("turns", 1.0), keys.positive("gap")
        try:
            workload = attach_sessions(workload, turns_mean, gap_s, Random(f"{seed}/sessions"))
        except ValueError as error:
            raise keys.wrong("sessions don't fit", str(error)) from None
    return workload


class _Keys:
    """The `key=value` pairs of a description; every complaint names the description and the key."""

    def __init__(self, text: str, kind: str, pairs: str) -> None:
        self.text = text
        self.kind = kind
        self._values: dict[str, str] = {}
        for pair in pairs.split(",") if pairs else []:
            key, equals, value = pair.partition("=")
            if not equals or not value:
                raise self.wrong(f"{pair!r} is no key=value", f"{kind} takes {', '.join(KINDS[kind])}")
            if key not in KINDS[kind]:
                raise self.wrong(f"unknown key {key!r}", f"{kind} takes {', '.join(KINDS[kind])}")
            if key in self._values:
                raise self.wrong(f"{key} is given twice", "give it once")
            self._values[key] = value

    def wrong(self, what: str, remedy: str) -> ValueError:
        return ValueError(f"trace {self.text!r}: {what}; {remedy}")

    def has(self, key: str) -> bool:
        return key in self._values

    def word(self, key: str, remedy: str = "") -> str:
        if key not in self._values:
            raise self.wrong(
                f"{key} is missing", remedy or f"{self.kind} takes {', '.join(KINDS[self.kind])}"
            )
        return self._values[key]

    def path(self, key: str) -> Path:
        return Path(self.word(key, f"give {key}=FILE"))

    def count(self, key: str) -> int:
        try:
            return whole(self.word(key))
        except ValueError as error:
            raise self._bad(key, error) from None

    def positive(self, key: str) -> float:
        return self.between(key, math.ulp(0.0), math.inf, "a positive number")

    def at_least(self, key: str, low: float, default: float | None = None) -> float:
        return self.between(key, low, math.inf, f"a number of at least {low:g}", default)

    def between(
        self, key: str, low: float, high: float, expected: str, default: float | None = None
    ) -> float:
        if default is not None and not self.has(key):
            return default
        word = self.word(key)
        try:
            value = number(word)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise self._bad(key, expected)
        return value

    def one_of(self, first: str, second: str) -> str:
        """The one that is given; an error for none or both."""
        given = [key for key in (first, second) if self.has(key)]
        if not given:
            raise self.wrong(f"{first} is missing", f"give {first} or {second}")
        if len(given) > 1:
            raise self.wrong(f"{first} and {second} are both given", "give one of them")
        return given[0]

    def _bad(self, key: str, expected: object) -> ValueError:
        return self.wrong(f"{key} is {self._values[key]!r}", f"expected {expected}")


def _read(keys: _Keys) -> list[WorkloadRequest]:
    requests = load_trace(keys.path("file"))
    start_s = keys.at_least("start", 0.0, default=0.0)
    end_s = start_s + (keys.positive("duration") if keys.has("duration") else math.inf)
    return from_zero([request for request in requests if start_s <= request.arrival_s < end_s])


def _draw(keys: _Keys, seed: int) -> list[WorkloadRequest]:
    lengths = _lengths(keys)
    rng = Random(f"{seed}/arrivals")
    times = _servegen_arrivals(keys, rng) if keys.kind == "servegen" else _steady_arrivals(keys, rng)
    return with_lengths(times, lengths, Random(f"{seed}/lengths"))


def _steady_arrivals(keys: _Keys, rng: Random) -> Iterable[float]:
    rate_rps = keys.positive("rate")
    cv = _STEADY_CV[keys.kind] if keys.kind in _STEADY_CV else _cv(keys)
    times = steady_arrivals_s(rate_rps, cv, rng)
    if keys.one_of("count", "duration") == "count":
        return itertools.islice(times, _affordable(keys, keys.count("count")))
    duration_s = keys.positive("duration")
    _affordable(keys, rate_rps * duration_s)
    return itertools.takewhile(lambda arrival_s: arrival_s < duration_s, times)


def _servegen_arrivals(keys: _Keys, rng: Random) -> Iterable[float]:
    windows = load_rates(keys.path("rates"))
    start_s = keys.at_least("start", 0.0, default=0.0)
    share = keys.between("share", MIN_SHARE, 1.0, f"{MIN_SHARE:g} to 1", default=1.0)
    cv = _cv(keys) if keys.has("cv") else None
    by_count = keys.one_of("count", "duration") == "count"
    try:
        windows = clip(windows, start_s, math.inf if by_count else keys.positive("duration"))
    except ValueError as error:
        raise keys.wrong("start and duration miss the file", str(error)) from None
    times = arrivals_s(windows, rng, share=share, cv=cv)
    if by_count:
        return itertools.islice(times, _affordable(keys, keys.count("count")))
    _affordable(keys, expected_requests(windows) * share)
    return times


def _affordable(keys: _Keys, requests: float) -> int:
    if requests > MAX_REQUESTS:
        raise keys.wrong(
            f"about {requests:,.0f} requests",
            f"at most {MAX_REQUESTS:,} are made: choose fewer, or a shorter duration",
        )
    return int(requests)


def _cv(keys: _Keys) -> float:
    expected = f"{MIN_CV:g} to {MAX_CV:g}; fixed has no variation and poisson has 1"
    return keys.between("cv", MIN_CV, MAX_CV, expected)


def _lengths(keys: _Keys) -> Lengths:
    if not keys.has("lengths"):
        remedy = "give input=TOKENS,output=TOKENS, or lengths=FILE, or lengths=conversation"
        for key in ("input", "output"):
            keys.word(key, remedy)
        return fixed_lengths(keys.count("input"), keys.count("output"))
    if keys.has("input") or keys.has("output"):
        raise keys.wrong("lengths are given twice", "give either lengths, or input and output")
    if keys.word("lengths") == "conversation":
        return conversation_lengths
    return empirical_lengths(load_lengths(keys.path("lengths")))
