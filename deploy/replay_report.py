"""What a replay measured: outcomes, percentiles, attainment, goodput; as JSON and as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cluster.request import Slo
from deploy.latency_table import Distribution, latencies_to_json, latency_lines, slo_to_json

Status = Literal["ok", "rejected", "failed", "timeout", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
MAX_ERRORS_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutcome:
    """What the client of one request saw.

    `sent_s` and `end_s` count from the start of the replay; `lag_s` is how late it was sent. `ttft_s` and
    `e2e_s` (last token) count from sending. `tpot_s` averages over the tokens after the first, `max_gap_s` is
    the longest wait between two chunks; both None for fewer than two. `output_tokens` is the server's own
    count (usage), 0 where it never came. `error` says why the status isn't "ok"; None for a cancelled one.
    `slo` is what it was sent with, None where the server was told of no bounds. `asked_tokens` is the length
    of the answer that was asked for.
    """

    index: int
    status: Status
    input_tokens: int
    output_tokens: int
    sent_s: float
    lag_s: float
    end_s: float
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    max_gap_s: float | None
    error: str | None
    slo_class: str = ""
    slo: Slo | None = None
    asked_tokens: int = 0

    def meets(self, slo: Slo) -> bool:
        """A complete answer within both bounds; one token has no TPOT and keeps any."""
        return self.status == "ok" and slo.is_kept(self.ttft_s, self.tpot_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """Result of a replay: one outcome per request, in the order of sending.

    Latencies and throughput are those of complete ("ok") answers, rates are per second of `duration_s`, which
    runs from the start to the end of the last request. The send lag is over all requests: one that is not
    small against the TTFT says that the client, not the server, was the bottleneck.
    """

    url: str
    model: str
    slo: Slo
    duration_s: float
    outcomes: tuple[RequestOutcome, ...]

    @property
    def counts(self) -> dict[Status, int]:
        """Requests by status, every status named."""
        counted = Counter(outcome.status for outcome in self.outcomes)
        return {status: counted[status] for status in STATUSES}

    @property
    def met(self) -> int:
        """Requests that met both bounds, their own if they were sent with some."""
        return sum(self._is_met(outcome) for outcome in self.outcomes)

    @property
    def by_class(self) -> dict[str, tuple[int, int]]:
        """(requests, requests that met their bounds) of each SLO class, the cancelled ones left out."""
        counted: dict[str, tuple[int, int]] = {}
        for outcome in self.outcomes:
            if outcome.slo_class and outcome.status != "cancelled":
                count, met = counted.get(outcome.slo_class, (0, 0))
                counted[outcome.slo_class] = count + 1, met + self._is_met(outcome)
        return counted

    @property
    def attainment(self) -> float | None:
        """`met` as a share (0..1) of all requests but the cancelled ones; None when there is no other."""
        judged = len(self.outcomes) - self.counts["cancelled"]
        return self.met / judged if judged else None

    @property
    def goodput_rps(self) -> float:
        """Requests per second that met both bounds."""
        return self.met / self.duration_s

    @property
    def throughput(self) -> dict[str, float]:
        """Complete answers, their prompt tokens and their output tokens, per second."""
        done = [outcome for outcome in self.outcomes if outcome.status == "ok"]
        return {
            "request_rps": len(done) / self.duration_s,
            "input_tokens_per_s": sum(outcome.input_tokens for outcome in done) / self.duration_s,
            "output_tokens_per_s": sum(outcome.output_tokens for outcome in done) / self.duration_s,
        }

    @property
    def latencies(self) -> dict[str, Distribution | None]:
        """Distributions in seconds; None where nothing was measured."""
        done = [outcome for outcome in self.outcomes if outcome.status == "ok"]
        return {
            "ttft_s": Distribution.of(outcome.ttft_s for outcome in done),
            "tpot_s": Distribution.of(outcome.tpot_s for outcome in done),
            "e2e_s": Distribution.of(outcome.e2e_s for outcome in done),
            "max_gap_s": Distribution.of(outcome.max_gap_s for outcome in done),
            "send_lag_s": Distribution.of(outcome.lag_s for outcome in self.outcomes),
        }

    @property
    def errors(self) -> list[tuple[str, int]]:
        """(text, count) of everything that went wrong, the most frequent first."""
        return Counter(outcome.error for outcome in self.outcomes if outcome.error is not None).most_common()

    def _is_met(self, outcome: RequestOutcome) -> bool:
        return outcome.meets(self.slo if outcome.slo is None else outcome.slo)

    def to_json(self) -> dict[str, object]:
        """The summary as plain JSON values (no infinity: a missing bound is null); outcomes are not in it."""
        return {
            "url": self.url,
            "model": self.model,
            "requests": len(self.outcomes),
            "counts": dict(self.counts),
            "duration_s": self.duration_s,
            **self.throughput,
            "slo": slo_to_json(self.slo),
            "met": self.met,
            "attainment": self.attainment,
            "goodput_rps": self.goodput_rps,
            "classes": {name: {"requests": n, "met": met} for name, (n, met) in self.by_class.items()},
            **latencies_to_json(self.latencies),
            "errors": [{"error": text, "count": count} for text, count in self.errors[:MAX_ERRORS_SHOWN]],
        }

    def to_text(self) -> str:
        """A table for people, times in milliseconds."""
        return "\n".join([*_summary_lines(self), "", *_latency_lines(self), *_error_lines(self)])


def parse_goodput(pairs: Sequence[str]) -> Slo:
    """Bounds in milliseconds as `vllm bench serve --goodput` spells them: `["ttft:300", "tpot:50"]`.

    A metric that isn't named has no bound. Raises ValueError for an unknown or repeated metric, a value that
    is not a positive number, and an empty list.
    """
    example = "expected ttft:MS and tpot:MS, such as ttft:300 tpot:50"
    if not pairs:
        raise ValueError(f"goodput: nothing given, {example}")
    bounds: dict[str, float] = {}
    for pair in pairs:
        metric, _, text = pair.partition(":")
        if metric not in ("ttft", "tpot"):
            raise ValueError(f"goodput: unknown metric in {pair!r}, {example}")
        if metric in bounds:
            raise ValueError(f"goodput: {metric} is given twice, {example}")
        try:
            bounds[metric] = float(text)
        except ValueError:
            raise ValueError(f"goodput: {text!r} in {pair!r} is not a number, {example}") from None
        if not 0 < bounds[metric] < math.inf:
            raise ValueError(f"goodput: {text!r} in {pair!r} is not a positive number of ms, {example}")
    return Slo(**{f"{metric}_s": bound_ms / 1000 for metric, bound_ms in bounds.items()})


def _summary_lines(report: ReplayReport) -> list[str]:
    bounds = [
        f"{metric} <= {bound_s * 1000:g} ms"
        for metric, bound_s in (("TTFT", report.slo.ttft_s), ("TPOT", report.slo.tpot_s))
        if math.isfinite(bound_s)
    ]
    judged = len(report.outcomes) - report.counts["cancelled"]
    share = "-" if report.attainment is None else f"{report.attainment:.1%}"
    within = " and ".join(bounds) or ("what each asked for" if report.by_class else "a full answer")
    by_class = [
        ("", f"{name}: {met / count:.1%} ({met} of {count})")
        for name, (count, met) in report.by_class.items()
    ]
    prompt_rate, output_rate = (report.throughput[f"{kind}_tokens_per_s"] for kind in ("input", "output"))
    rows = (
        ("server", f"{report.url}, model {report.model}"),
        ("requests", f"{len(report.outcomes)} in {report.duration_s:.1f} s"),
        ("", ", ".join(f"{count} {status}" for status, count in report.counts.items())),
        ("throughput", f"{report.throughput['request_rps']:.2f} requests/s"),
        ("", f"{prompt_rate:,.0f} prompt and {output_rate:,.0f} output tokens/s"),
        ("goodput", f"{report.goodput_rps:.2f} requests/s with {within}"),
        ("attainment", f"{share} ({report.met} of {judged})"),
        *(by_class if len(by_class) > 1 else ()),
    )
    return [f"{name:<12}{text}" for name, text in rows]


def _latency_lines(report: ReplayReport) -> list[str]:
    names = ("TTFT", "TPOT", "E2E", "max gap", "send lag")
    return latency_lines(zip(names, report.latencies.values(), strict=True))


def _error_lines(report: ReplayReport) -> list[str]:
    if not report.errors:
        return []
    shown = [f"{count:>6} x {text}" for text, count in report.errors[:MAX_ERRORS_SHOWN]]
    more = sum(count for _, count in report.errors[MAX_ERRORS_SHOWN:])
    return ["", "errors", *shown, *([f"{more:>6} x other errors"] if more else [])]
