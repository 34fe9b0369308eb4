"""What a profile says it was measured on."""

from __future__ import annotations

from pathlib import Path

from deploy.profiler.machine import machine, versions


def test_the_cpu_is_named_as_the_kernel_does(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Fast One\nprocessor\t: 1\nmodel name\t: A Fast One\n")
    assert machine(info).startswith("A Fast One, ")
    assert " cores" in machine(info)


def test_there_is_a_name_without_the_kernels(tmp_path: Path) -> None:
    words = machine(tmp_path / "absent")
    assert words.split(",")[0]


def test_versions_are_of_what_is_installed() -> None:
    found = versions()
    assert found["pdserve"]
    assert all(found.values())
