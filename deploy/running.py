"""Which clusters `pdserve up` runs on this machine: one small file each, so that `down` finds the process."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import EnvironmentProblem

STOP_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """A cluster and the process that holds it.

    Attributes:
        started: when that process started, in the kernel's ticks; with the pid it names one process for good.
    """

    name: str
    pid: int
    started: int
    url: str


def this_process(name: str, url: str) -> RunningCluster:
    """A cluster that this process holds."""
    return RunningCluster(name=name, pid=os.getpid(), started=_started(os.getpid()) or 0, url=url)


def _directory() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(base) / f"pdserve-{os.getuid()}"


@contextmanager
def recorded(cluster: RunningCluster) -> Iterator[None]:
    """The cluster is listed for as long as the block runs.

    Raises:
        EnvironmentProblem: another process runs a cluster of this name.
    """
    other = {c.name: c for c in running_clusters()}.get(cluster.name)
    if other is not None:
        raise EnvironmentProblem(
            problem=f"cluster {cluster.name!r} is already up at {other.url} (pid {other.pid})",
            remedy=f"stop it with 'pdserve down --name {cluster.name}', or give the spec another name",
        )
    directory = _directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"{cluster.name}.json"
    path.write_text(json.dumps(asdict(cluster)), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def running_clusters() -> list[RunningCluster]:
    """Clusters whose process is alive; files of dead ones are removed."""
    found = []
    for path in sorted(_directory().glob("*.json")):
        cluster = RunningCluster(**json.loads(path.read_text(encoding="utf-8")))
        if _alive(cluster):
            found.append(cluster)
        else:
            path.unlink(missing_ok=True)
    return found


def stop_running(name: str | None, say: Callable[[str], None]) -> None:
    """Drain and stop a cluster, and wait until its process is gone.

    Raises:
        EnvironmentProblem: there is none of that name, several to choose from, or it does not end.
    """
    clusters = running_clusters()
    chosen = [c for c in clusters if name is None or c.name == name]
    if not chosen:
        raise EnvironmentProblem(
            problem="no cluster is running here" if name is None else f"no cluster {name!r} is running here",
            remedy="clusters on Kubernetes or another Ray cluster are stopped there",
        )
    if len(chosen) > 1:
        raise EnvironmentProblem(
            problem="several clusters are running: " + ", ".join(c.name for c in chosen),
            remedy="choose one with --name",
        )
    cluster = chosen[0]
    say(f"stopping {cluster.name} (pid {cluster.pid})")
    os.kill(cluster.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_DEADLINE_S
    while _alive(cluster):
        if time.monotonic() > deadline:
            raise EnvironmentProblem(
                problem=f"{cluster.name} (pid {cluster.pid}) did not end in {STOP_DEADLINE_S:g} s",
                remedy="look at its terminal, or end the process",
            )
        time.sleep(0.1)
    say("stopped")


def _alive(cluster: RunningCluster) -> bool:
    return _started(cluster.pid) == cluster.started


def _started(pid: int) -> int | None:
    """Start time of a process in ticks (field 22 of proc_pid_stat(5)); None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
