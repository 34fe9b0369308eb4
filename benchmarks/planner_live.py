"""A plan for the CPU cluster of this machine, deployed and measured (Markdown):

python -m benchmarks.planner_live
python -m benchmarks.planner_live --ttft 1500 --tpot 150       # so loose that unsplit wins

Measures the running cluster as `pdserve profile --url` does, plans for it, serves the plan's spec, and
verifies it at half of the planned goodput and at all of it, with the commands that a user has. Where the plan
is not to split, the split one that it was weighed against is verified as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cluster import PORT, ROOT, URL, cluster, wait_serving
from benchmarks.fidelity import build_model, spec_for

# Lengths and bounds for which two cores are a cluster.
PROMPT, ANSWER, CV = 192, 24, 1
SHARES = (0.5, 1.0)


def run(*words: str, code: tuple[int, ...] = (0,)) -> str:
    """A command of the CLI; returns what it printed."""
    ran = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ran.returncode not in code:
        raise RuntimeError(f"{' '.join(words)}: {ran.returncode}\n{ran.stderr}")
    return ran.stdout


def planned(folder: Path, base: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Profile and plan; the spec is `plan.yaml`."""
    profile = folder / "profile.json"
    with cluster("", str(base)) as running:
        wait_serving(running)
        limits = ("--max-prompt", "512", "--max-concurrency", "16", "--seconds", str(args.seconds))
        print(run("profile", "--url", URL, "--out", str(profile), *limits), file=sys.stderr)
    words = ["plan", "--model", "medium", "--profile", str(profile), "--gpus-total", "2", "--base", str(base)]
    words += ["--isl", str(PROMPT), "--osl", str(ANSWER), "--rate", "0.1", "--cv", str(CV)]
    words += ["--ttft", f"{args.ttft:g}", "--tpot", f"{args.tpot:g}", "--max-model-len", "1024", "--json"]
    found: dict[str, Any] = json.loads(run(*words, "-o", str(folder / "plan.yaml")))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=240, help="to profile for")
    parser.add_argument("--requests", type=int, default=300, help="at each rate")
    parser.add_argument("--ttft", type=float, default=800, metavar="MS")
    parser.add_argument("--tpot", type=float, default=45, metavar="MS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = spec_for(folder, build_model(folder, "medium"), "medium")
        raw = yaml.safe_load(base.read_text())
        raw["ingress"]["port"] = PORT
        base.write_text(yaml.safe_dump(raw))
        found = planned(folder, base, args)
        specs = [(found["chosen"], folder / "plan.yaml")]
        if not found["split"] and found["best_split"]:
            specs.append((found["best_split"], as_split(folder / "plan.yaml")))
        columns = (
            "deployment | requests/s | attainment planned, measured | error (points) | TTFT | TPOT | cause"
        )
        print(f"| {columns} |")
        print("|---|---|---|---|---|---|---|")
        for planned_one, spec in specs:
            verified(planned_one, spec, args)


def as_split(spec: Path) -> Path:
    """The spec of the two ranks with the split: one for each phase."""
    raw = yaml.safe_load(spec.read_text())
    del raw["policy"]
    for role in ("prefill", "decode"):
        raw[role]["count"] = 1
    path = spec.with_name("split.yaml")
    path.write_text(yaml.safe_dump(raw))
    return path


def verified(planned_one: dict[str, Any], spec: Path, args: argparse.Namespace) -> None:
    """Serve a spec and print how it did beside what was planned, at each rate."""
    slo = ["--slo", f"ttft:{args.ttft:g}", f"tpot:{args.tpot:g}", "--json"]
    with cluster("", str(spec)) as running:
        wait_serving(running)
        for share in SHARES:
            rate = share * planned_one["goodput_rps"]
            trace = f"gamma:rate={rate:.3f},count={args.requests},cv={CV},input={PROMPT},output={ANSWER}"
            words = ["verify", "--plan", str(spec), "--url", URL, "--trace", trace]
            result = json.loads(run(*words, *slo, code=(0, 1)))
            figures = result["figures"]
            met = figures["attainment"]
            cells = [planned_one["deployment"], f"{rate:.2f}"]
            cells += [f"{met['predicted']:.1%}, {met['measured']:.1%}", f"{100 * met['error']:+.1f}"]
            cells += [
                f"{1e3 * figures[key]['predicted']:.0f}, {1e3 * figures[key]['measured']:.0f} ms "
                f"({figures[key]['error']:+.0%})"
                for key in ("TTFT, mean", "TPOT, mean")
            ]
            print(f"| {' | '.join([*cells, result['cause']])} |", flush=True)


if __name__ == "__main__":
    main()
