"""A spec's prediction for what was really sent, beside what came, and the likeliest cause of the difference.

A cause is not guessed from symptoms: engines that are slower or faster than the model says are simulated
again at the pace that was seen, and are the cause if that explains most of the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from cluster.instance import Role
from cluster.request import NO_SLO, Slo
from cluster.spec import ClusterSpec
from deploy.replay_report import ReplayReport, RequestOutcome
from deploy.simulator.result import SimulatedRequest, SimulationResult
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass
from deploy.workload import WorkloadRequest, percentile

# What counts as right: attainment as a difference, times as relative ones.
ATTAINMENT, TTFT, TPOT = 0.05, 0.10, 0.05
# A prompt that waited for less than this share of its TTFT shows the engine's speed.
HARDLY_WAITED = 0.1
# From so few requests no speed is told.
LEAST_SEEN = 10
NO_PACE: Mapping[Role, float] = {}
# Simulations to find a pace, and how close is close enough.
LOOKS, CLOSE = 3, 0.02
# Of the difference, what a cause must explain.
MOST_LEFT = 0.5
# And what a second one must, in units of what counts as right.
SECOND_CAUSE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of a run, real or simulated; times in seconds, over complete answers.

    Attributes:
        attainment: share of all requests.
        answered: share of all requests that were answered completely.
    """

    attainment: float
    answered: float
    ttft_s: float
    ttft_p99_s: float
    tpot_s: float
    tpot_p99_s: float

    def distance(self, other: Figures) -> float:
        """How far they are apart, in units of what counts as right; 0 for equal."""
        return (
            abs(self.attainment - other.attainment) / ATTAINMENT
            + abs(_relative(self.ttft_s, other.ttft_s)) / TTFT
            + abs(_relative(self.tpot_s, other.tpot_s)) / TPOT
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What came of it.

    Attributes:
        predicted, measured: of the same requests.
        pace: by role, how many times as long as the model says it took, where that could be seen.
        busy: by role, the predicted share of the time in which its instances computed.
        cause: of the difference, in words; empty where there is none to speak of.
    """

    predicted: Figures
    measured: Figures
    pace: dict[Role, float]
    busy: dict[Role, float]
    cause: str
    warnings: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether attainment is what was predicted, or better."""
        return self.measured.attainment >= self.predicted.attainment - ATTAINMENT

    def to_json(self) -> dict[str, object]:
        """As JSON."""
        rows = {
            name: {"predicted": predicted, "measured": measured, "error": error}
            for name, predicted, measured, error in self._rows()
        }
        return {
            "holds": self.holds,
            "figures": rows,
            "pace": {str(role): pace for role, pace in self.pace.items()},
            "predicted_busy": {str(role): busy for role, busy in self.busy.items()},
            "cause": self.cause,
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        """A table for people."""
        lines = [f"{'':<18}{'predicted':>12}{'measured':>12}{'error':>12}"]
        for name, predicted, measured, error in self._rows():
            if name in ("attainment", "answered"):
                cells = f"{predicted:>12.1%}{measured:>12.1%}{100 * error:>+10.1f} p"
            else:
                cells = f"{1e3 * predicted:>9,.1f} ms{1e3 * measured:>9,.1f} ms{error:>+12.1%}"
            lines.append(f"{name:<18}{cells}")
        busy = ", ".join(f"{role} {share:.0%}" for role, share in self.busy.items())
        pace = ", ".join(f"{role} {pace:.2f}" for role, pace in self.pace.items())
        lines += [f"{'predicted busy':<18}{busy}", f"{'pace':<18}{pace or 'not seen'}"]
        lines.append(f"{'verdict':<18}{'the plan holds' if self.holds else 'the plan does not hold'}")
        if self.cause:
            lines.append(f"{'cause':<18}{self.cause}")
        return "\n".join([*lines, *(f"{'note':<18}{warning}" for warning in self.warnings)])

    def _rows(self) -> list[tuple[str, float, float, float]]:
        found = []
        for name, field in _ROWS:
            predicted, measured = getattr(self.predicted, field), getattr(self.measured, field)
            is_share = name in ("attainment", "answered")
            error = predicted - measured if is_share else _relative(predicted, measured)
            found.append((name, predicted, measured, error))
        return found


_ROWS = (
    ("attainment", "attainment"),
    ("answered", "answered"),
    ("TTFT, mean", "ttft_s"),
    ("TTFT, p99", "ttft_p99_s"),
    ("TPOT, mean", "tpot_s"),
    ("TPOT, p99", "tpot_p99_s"),
)


def _relative(predicted: float, measured: float) -> float:
    """Error of a prediction; 0 where nothing was measured."""
    return predicted / measured - 1 if measured else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """What was sent to a cluster of a spec: (what came, its SLO) of each request, in the order of sending."""

    spec: ClusterSpec
    requests: tuple[tuple[RequestOutcome, Slo], ...]

    def simulated(self, pace: Mapping[Role, float] = NO_PACE) -> SimulationResult:
        """The same requests, on engines at that pace."""
        requests = [
            WorkloadRequest(
                arrival_s=one.sent_s,
                input_tokens=one.input_tokens,
                # Of an answer that came, what came; else what was asked for.
                output_tokens=max(1, one.output_tokens or one.asked_tokens),
            )
            for one, _ in self.requests
        ]
        classes = [SloClass(name=one.slo_class or "all", slo=slo) for one, slo in self.requests]
        return Simulation(at_pace(self.spec, pace), requests, classes).run()

    def measured(self) -> Figures:
        met = sum(one.meets(slo) for one, slo in self.requests)
        return _figures(met, [one for one, _ in self.requests])


def verify(spec: ClusterSpec, report: ReplayReport) -> Verification:
    """Compare. Raises SpecError for a spec that can't be simulated, ValueError for a replay without an
    answer."""
    outcomes = [one for one in report.outcomes if one.status != "cancelled"]
    outcomes.sort(key=lambda one: (one.sent_s, one.index))
    if not any(one.status == "ok" for one in outcomes):
        raise ValueError(f"no request of {report.url} was answered: there is nothing to compare")
    sent = _Sent(spec=spec, requests=tuple((one, _slo(one, report, spec)) for one in outcomes))
    result = sent.simulated()
    predicted, measured = _predicted(result), sent.measured()
    pace = _pace(sent, result)
    return Verification(
        predicted=predicted,
        measured=measured,
        pace=pace,
        busy=result.busy_while_arriving(),
        cause=_cause(sent, report, predicted, measured, pace),
        warnings=tuple(result.warnings),
    )


def _slo(outcome: RequestOutcome, report: ReplayReport, spec: ClusterSpec) -> Slo:
    """What it was sent with; else what it was judged by, or what the spec gives to those that say nothing."""
    if outcome.slo is not None:
        return outcome.slo
    if report.slo != NO_SLO or spec.slo.default is None:
        return report.slo
    return spec.slo.classes[spec.slo.default].slo


def _predicted(result: SimulationResult) -> Figures:
    return _figures(sum(one.met for one in result.requests), result.requests)


def _figures(met: int, requests: Sequence[RequestOutcome | SimulatedRequest]) -> Figures:
    done = [one for one in requests if one.status == "ok"]
    firsts = [one.ttft_s for one in done if one.ttft_s is not None] or [0.0]
    tokens = [one.tpot_s for one in done if one.tpot_s is not None] or [0.0]
    return Figures(
        attainment=met / len(requests),
        answered=len(done) / len(requests),
        ttft_s=fmean(firsts),
        ttft_p99_s=percentile(firsts, 99),
        tpot_s=fmean(tokens),
        tpot_p99_s=percentile(tokens, 99),
    )


def _pace(sent: _Sent, result: SimulationResult) -> dict[Role, float]:
    """How many times as long iterations take, by simulating at what was seen and looking again: at another
    pace batches are of another size, and the ratio of times is not that of iterations."""
    pace = more = _ratios(sent, result)
    for _ in range(LOOKS):
        if all(abs(factor - 1) < CLOSE for factor in more.values()):
            break
        more = _ratios(sent, sent.simulated(pace))
        pace = {role: factor * more.get(role, 1.0) for role, factor in pace.items()}
    return pace


def _ratios(sent: _Sent, result: SimulationResult) -> dict[Role, float]:
    """From requests that tell it: prompts that hardly waited, answers of several tokens."""
    seen: dict[Role, list[float]] = {role: [] for role in Role}
    for (one, _), simulated in zip(sent.requests, result.requests, strict=True):
        if one.status != "ok" or simulated.status != "ok":
            continue
        waited_s = simulated.stages.prefill_queue
        if one.ttft_s and simulated.ttft_s and waited_s <= HARDLY_WAITED * simulated.ttft_s:
            seen[Role.PREFILL].append(one.ttft_s / simulated.ttft_s)
        if one.tpot_s and simulated.tpot_s and one.output_tokens >= LEAST_SEEN:
            seen[Role.DECODE].append(one.tpot_s / simulated.tpot_s)
    return {role: median(ratios) for role, ratios in seen.items() if len(ratios) >= LEAST_SEEN}


def at_pace(spec: ClusterSpec, pace: Mapping[Role, float]) -> ClusterSpec:
    """The spec with engines that take so many times as long as it says now."""
    found = {role: spec.sim.pace.get(role, 1.0) * pace.get(role, 1.0) for role in Role}
    sim = spec.sim.model_copy(update={"pace": {role: value for role, value in found.items() if value != 1}})
    return spec.model_copy(update={"sim": sim})


def _cause(
    sent: _Sent,
    report: ReplayReport,
    predicted: Figures,
    measured: Figures,
    pace: dict[Role, float],
) -> str:
    if predicted.distance(measured) <= 1:
        return ""
    outcomes = [one for one, _ in sent.requests]
    broken = [one for one in outcomes if one.status in ("failed", "timeout")]
    if len(broken) / len(outcomes) > ATTAINMENT / 2:
        text, count = report.errors[0]
        return f"{len(broken)} of {len(outcomes)} requests failed; most often ({count}): {text}"
    lag_s = percentile([one.lag_s for one in outcomes], 90)
    if lag_s > TTFT * measured.ttft_s:
        return f"the client was late: a tenth of the requests left over {1e3 * lag_s:.0f} ms after their time"
    found: list[tuple[float, dict[Role, float], Figures]] = []
    for roles in ((Role.PREFILL,), (Role.DECODE,), tuple(Role)):
        if all(role in pace for role in roles):
            seen = {role: pace[role] for role in roles}
            again = _predicted(sent.simulated(seen))
            found.append((again.distance(measured), seen, again))
    if found:
        # Two causes must explain more than one does.
        left, seen, again = min(found, key=lambda one: one[0] + SECOND_CAUSE * len(one[1]))
        if left <= MOST_LEFT * predicted.distance(measured):
            words = " and ".join(
                f"{'prompts' if role is Role.PREFILL else 'decodes'} take {factor:.2f} times as long"
                for role, factor in seen.items()
            )
            return (
                f"{words} as the model says; at that pace {again.attainment:.1%} would be kept, "
                f"and {measured.attainment:.1%} are: run `pdserve calibrate`"
            )
    return "not the engines' speed: look at the network, at what else runs there, and at `pdserve explain`"
