"""The environment of an engine's process."""

from __future__ import annotations

import os

import pytest

from cluster.instance import Role
from cluster.spec import parse_spec

pytestmark = pytest.mark.vllm


def environment(monkeypatch: pytest.MonkeyPatch, **spec: object) -> dict[str, str]:
    from cluster.vllm_options import set_engine_environment

    with monkeypatch.context() as patched:
        found: dict[str, str] = {}
        patched.setattr(os, "environ", found)
        set_engine_environment(
            parse_spec({"model": "m", **spec}),
            Role.DECODE,
            host="10.0.0.1",
            side_port=5600,
            news_port=5700,
            cores="0",
        )
    return found


def test_gpus_read_each_other_without_a_detour_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(monkeypatch)["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] == "on"
    assert "UCX_TLS" not in environment(monkeypatch)


def test_a_pool_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = {"env": {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "auto"}}
    assert environment(monkeypatch, decode=pool)["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] == "auto"


def test_engines_on_cpus_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(monkeypatch, device="cpu", transfer={"ucx_tls": "tcp"})
    assert (found["VLLM_CPU_OMP_THREADS_BIND"], found["UCX_TLS"]) == ("0", "tcp")
    assert environment(monkeypatch, device="cpu")["UCX_TLS"] == "tcp,shm,self,cma"


def test_an_engine_hears_news_unless_it_shall_not_read_early(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(monkeypatch)["PDSERVE_NEWS_ADDRESS"] == "tcp://10.0.0.1:5700"
    assert "PDSERVE_NEWS_ADDRESS" not in environment(monkeypatch, transfer={"overlap": False})
