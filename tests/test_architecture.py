"""The import table of the design, and what the light commands may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "cluster": set(),
    "router": {"cluster"},
    "kv_transfer": {"cluster"},
    "prefill_worker": {"cluster", "kv_transfer"},
    "decode_worker": {"cluster", "kv_transfer"},
    "deploy": {"cluster", "router", "kv_transfer", "prefill_worker", "decode_worker"},
}
HEAVY = {"ray", "torch", "vllm", "nixl", "flashinfer", "zmq"}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> Iterator[str]:
    """First word of every module imported anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_the_table_allows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = set(imported_packages(path)) & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package] | {package}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_that_imports_a_heavy_library_says_so_in_its_name(path: Path) -> None:
    heavy = set(imported_packages(path)) & HEAVY
    if heavy:
        assert any(word in path.stem for word in HEAVY), f"imports {sorted(heavy)}"


def test_vllm_is_imported_in_one_file_only() -> None:
    importing = {str(p.relative_to(ROOT)) for p in SOURCES if "vllm" in imported_packages(p)}
    assert importing <= {"cluster/vllm_api.py"}


@pytest.mark.parametrize(
    "code",
    [
        "import deploy.cli; deploy.cli.make_parser()",
        "import cluster.spec, cluster.registry, cluster.metrics, cluster.wire",
        "import router.router, router.run, router.policy, router.view",
        "import deploy.replay, deploy.workload, deploy.status, deploy.controller",
    ],
)
def test_light_modules_load_no_heavy_library(code: str) -> None:
    # Numpy comes with torch and vLLM only, too.
    unwanted = HEAVY | {"numpy"}
    probe = f"import sys; {code}; print(*sorted({unwanted!r} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.split() == []
