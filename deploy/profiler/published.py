"""Latency measurements that others published, as profiles: DistServe's fits and Splitwise's table.

They drive simulations of the papers' own engines, which no longer exist to be measured.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pydantic import ValidationError

from cluster.errors import SpecError
from cluster.frozen import Frozen
from cluster.json_file import read_object
from cluster.latency import Batch, DecodeCost, LatencyProfile, PrefillCost
from cluster.latency_fit import Sample, fit_decode, fit_prefill

_MS = 1e-3


class _DistServeFit(Frozen):
    """One entry of DistServe's `simdistserve/estimators/profile_data/*.json`; milliseconds."""

    decoding_large_small_bs_threshold: int
    prefill: tuple[float, float, float]
    decoding_smallbs: tuple[float, float, float]
    decoding_largebs: tuple[float, float, float]


def distserve_profile(path: Path | str, model: str, tensor_parallel_size: int) -> LatencyProfile:
    """DistServe's fit of one model (`facebook/opt-13b`, or without the owner) on A100-80G.

    Its simulator divides both costs by the pipeline stages (and adds 1 ms for each to prefill); the profile
    is that of one stage. Its "small" decode costs hold below the threshold, 95 requests. A cost below 0 (of
    vLLM's attention on OPT-66B) becomes 0. The region is the grid of the repository's
    evaluation/0-test-single-forward-performance/main.py: up to 192 requests of up to 2,020 tokens, and a
    limit of tokens in all.

    Raises SpecError for a file that is none, and for a model or a size that it doesn't have.
    """
    path = Path(path)
    fits = read_object(path, kind="a profiler file", name="one of DistServe's profiler files")
    name = next((key for key in fits if model in (key, key.rpartition("/")[2])), None)
    if name is None:
        raise _not_in(path, "model", model, list(fits))
    sizes = fits[name]
    sizes = sizes if isinstance(sizes, Mapping) else {}
    if str(tensor_parallel_size) not in sizes:
        raise _not_in(path, f"{name}, tensor parallel size", tensor_parallel_size, list(sizes))
    try:
        fit = _DistServeFit.model_validate(sizes[str(tensor_parallel_size)])
        small, large = fit.decoding_smallbs, fit.decoding_largebs
        threshold = fit.decoding_large_small_bs_threshold
        base, token, attention = (max(0.0, value) for value in fit.prefill)
        return LatencyProfile(
            model=name,
            tensor_parallel_size=tensor_parallel_size,
            machine="A100-80G",
            source=f"DistServe, {path.name}",
            prefill=(PrefillCost(base_s=base * _MS, token_s=token * _MS, attention_s=attention * _MS),),
            decode=(_distserve_decode(small, threshold - 1), _distserve_decode(large, None)),
            region=_distserve_region(name, tensor_parallel_size)._asdict(),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (name, tensor_parallel_size, *first["loc"])))
        raise SpecError(file=str(path), path=where, value=first["input"], allowed=first["msg"]) from None


# Their grid's limits of tokens in a batch; for OPT-66B on 8 GPUs none is given, and that of 4 is taken.
_DISTSERVE_TOKENS = {("opt-13b", 1): 49_152, ("opt-13b", 2): 98_304, ("opt-13b", 4): 250_000} | {
    ("opt-66b", 2): 8_192, ("opt-66b", 3): 36_864, ("opt-66b", 4): 65_000, ("opt-66b", 8): 65_000
}  # fmt: skip
_DISTSERVE_REQUESTS, _DISTSERVE_PROMPT = 192, 2020


def _distserve_region(name: str, tensor_parallel_size: int) -> Batch:
    most = _DISTSERVE_REQUESTS * _DISTSERVE_PROMPT
    limit = _DISTSERVE_TOKENS.get((name.rpartition("/")[2], tensor_parallel_size), most)
    return Batch(
        prefill_tokens=limit,
        prefill_attention=limit * _DISTSERVE_PROMPT,
        prefill_requests=_DISTSERVE_REQUESTS,
        decode_requests=_DISTSERVE_REQUESTS,
        decode_context_tokens=limit,
    )


def _distserve_decode(costs: tuple[float, float, float], up_to_requests: int | None) -> DecodeCost:
    """DistServe's order is base, context, request."""
    base, context, request = (max(0.0, value) * _MS for value in costs)
    return DecodeCost(up_to_requests=up_to_requests, base_s=base, request_s=request, context_s=context)


class SplitwiseRow(NamedTuple):
    """One run of Splitwise's `perf_model.csv`: whole prompts in one batch, then decodes of that batch."""

    prompt_tokens: int
    requests: int
    output_tokens: int
    prompt_s: float
    token_s: float

    def prefill(self) -> Sample:
        batch = Batch(
            prefill_tokens=self.prompt_tokens * self.requests,
            prefill_attention=self.prompt_tokens**2 * self.requests,
            prefill_requests=self.requests,
        )
        return batch, self.prompt_s

    def decode(self) -> Sample:
        """The mean decode step: half of the output is in the context."""
        context = self.prompt_tokens + self.output_tokens // 2
        return Batch(
            decode_requests=self.requests, decode_context_tokens=self.requests * context
        ), self.token_s


class SplitwiseKey(NamedTuple):
    """What was measured, in the file's names: `llama2-70b`, `bloom-176b`; `a100-80gb`, `h100-80gb`."""

    model: str
    hardware: str
    tensor_parallel_size: int


def splitwise_rows(path: Path | str) -> dict[SplitwiseKey, list[SplitwiseRow]]:
    """Splitwise's measurements by what was measured, without batches that did not run as one.

    A batch whose prompts took less than half of the time of fewer tokens was cut: 64 prompts on two GPUs,
    where Llama2-70B leaves little memory, took about as long as 4, so only a first part was timed.
    `h100-80gb-pcap` isn't measured: its prompt times are h100-80gb's times 1.3, its token times equal.
    Raises SpecError for a file that is none.
    """
    path = Path(path)
    found: dict[SplitwiseKey, list[SplitwiseRow]] = defaultdict(list)
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for line, row in enumerate(csv.DictReader(lines), start=2):
                try:
                    key = SplitwiseKey(row["model"], row["hardware"], int(row["tensor_parallel"]))
                    sizes = (int(row[name]) for name in ("prompt_size", "batch_size", "token_size"))
                    times = (float(row[name]) * _MS for name in ("prompt_time", "token_time"))
                    found[key].append(SplitwiseRow(*sizes, *times))
                except (KeyError, TypeError, ValueError) as error:
                    raise SpecError(
                        file=str(path),
                        path=f"line {line}",
                        value=str(error),
                        allowed="a row of perf_model.csv",
                    ) from None
    except OSError as error:
        raise SpecError(
            file=str(path), path="", value=error.strerror, allowed="name Splitwise's perf_model.csv"
        ) from None
    return {key: _whole_batches(rows) for key, rows in found.items()}


def splitwise_profile(
    path: Path | str, model: str, hardware: str, tensor_parallel_size: int
) -> LatencyProfile:
    """A profile fitted to Splitwise's measurements. Raises SpecError for a file that lacks them."""
    rows = splitwise_rows(path)
    key = SplitwiseKey(model, hardware, tensor_parallel_size)
    if key not in rows:
        known = [f"{k.model} on {k.tensor_parallel_size} {k.hardware}" for k in rows]
        raise _not_in(Path(path), "", f"{model} on {tensor_parallel_size} {hardware}", known)
    return fit_splitwise(key, rows[key])


def fit_splitwise(key: SplitwiseKey, rows: Sequence[SplitwiseRow]) -> LatencyProfile:
    """A profile of these rows. ValueError for fewer than three sizes."""
    prefills, decodes = [row.prefill() for row in rows], [row.decode() for row in rows]
    prefill, prefill_residuals = fit_prefill(prefills)
    decode, decode_residuals = fit_decode(decodes)
    batches = [batch for batch, _ in (*prefills, *decodes)]
    return LatencyProfile(
        model=key.model,
        tensor_parallel_size=key.tensor_parallel_size,
        machine=key.hardware,
        source="Splitwise, perf_model.csv",
        prefill=prefill,
        decode=decode,
        region=Batch(*map(max, zip(*batches, strict=True)))._asdict(),
        residuals={"prefill": prefill_residuals, "decode": decode_residuals},
    )


def _whole_batches(rows: Sequence[SplitwiseRow]) -> list[SplitwiseRow]:
    times: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        times[row.prompt_tokens * row.requests].append(row.prompt_s)
    longest, cut = 0.0, set()
    for tokens, seconds in sorted(times.items()):
        if median(seconds) < longest / 2:
            cut.add(tokens)
        longest = max(longest, median(seconds))
    return [row for row in rows if row.prompt_tokens * row.requests not in cut]


def _not_in(path: Path, where: str, value: object, known: Sequence[str]) -> SpecError:
    return SpecError(file=str(path), path=where, value=value, allowed=f"the file has {', '.join(known)}")
