from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import SpecError
from cluster.instance import Role
from cluster.spec import load_spec, parse_spec

SPECS = sorted((Path(__file__).resolve().parent.parent / "deploy" / "specs").glob("*.yaml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_the_specs_we_ship_are_valid(path: Path) -> None:
    assert load_spec(path).places()


@pytest.mark.parametrize(
    ("raw", "path", "says"),
    [
        ({"model": "m", "wrong": 1}, "wrong", "no such key; the keys here are"),
        ({"model": "m", "prefill": {"count": -1}}, "prefill.count", "greater than or equal to 0"),
        ({"model": "m", "prefill": {"count": 0}}, "", "'goodput' needs an instance there"),
        ({"model": "m", "policy": "unsplit", "prefill": {"count": 0}, "decode": {"count": 0}}, "", "is 0"),
        ({"model": "m", "decode": {"tp": 2}}, "decode.tp", "tensor_parallel_size"),
        ({"model": "m", "ingress": {"port": 70000}}, "ingress.port", "less than or equal to 65535"),
        ({}, "model", "Field required"),
        ({"model": "m", "device": "tpu"}, "device", "'gpu' or 'cpu'"),
        ({"model": "m", "engine_process": "thread", "decode": {"tensor_parallel_size": 2}}, "", "use 'own'"),
        ({"model": "m", "engine_options": {"model": "x"}}, "", "use the top-level 'model'"),
        ({"model": "m", "decode": {"pipeline_parallel_size": 2}}, "", "use tensor_parallel_size"),
        (
            {"model": "m", "policy": "unsplit", "prefill": {"pipeline_parallel_size": 2}},
            "",
            "use tensor_parallel_size",
        ),
        ({"model": "m", "decode": {"engine_options": {"enable_lora": True}}}, "", "both pools need it"),
        (
            {"model": "m", "lora": {"adapters": {"sql": "/a"}}},
            "",
            "needs engine_options: {enable_lora: true}",
        ),
        (
            {
                "model": "m",
                "engine_options": {"enable_lora": True},
                "lora": {"runtime_updates": True},
                "ingress": {"replicas": 2},
            },
            "",
            "one would not know",
        ),
        ({"model": "m", "name": "Not OK"}, "name", "match pattern"),
    ],
)
def test_a_bad_spec_is_named_with_file_path_value_and_what_is_allowed(
    raw: dict[str, object], path: str, says: str
) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(raw, file="x.yaml")
    assert caught.value.file == "x.yaml"
    assert caught.value.path == path
    assert says in caught.value.allowed


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match="the file must be"):
        load_spec(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        load_spec(tmp_path / "none.yaml")


def test_overrides_replace_top_level_keys(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: a\nprefill: {count: 2}\n")
    spec = load_spec(file, {"model": "b"})
    assert spec.model == "b"
    assert spec.places() == [
        ("prefill-0", Role.PREFILL),
        ("prefill-1", Role.PREFILL),
        ("decode-0", Role.DECODE),
    ]


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"count": 3, "data_parallel_size": 2}, "count is 3, and data_parallel_size 2: use a multiple of it"),
        (
            {"count": 2, "data_parallel_size": 2, "pipeline_parallel_size": 2},
            "pipeline_parallel_size must be 1",
        ),
    ],
)
def test_groups_of_instances_are_whole(pool: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_spec({"model": "m", "decode": {**pool, "data_parallel_size": 2}})
    assert caught.value.path == "decode"


def test_instances_that_compute_together_are_a_group() -> None:
    spec = parse_spec(
        {"model": "m", "prefill": {"count": 2}, "decode": {"count": 4, "data_parallel_size": 2}}
    )
    assert spec.groups() == [
        ("prefill-0",), ("prefill-1",), ("decode-0", "decode-1"), ("decode-2", "decode-3")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tiers": {"host_gib": 0}}, "greater than 0"),
        ({"tiers": {"host_gib": float("inf")}}, "finite"),
        ({"tiers": {"host_gib": 1, "directory": "kept"}}, "give the whole path"),
        ({"tiers": {"host_gib": 1}, "engine": "sim"}, "twins have only their own memory"),
        (
            {"tiers": {"host_gib": 1}, "engine_options": {"enable_prefix_caching": False}},
            "prefix caching",
        ),
        (
            {
                "tiers": {"host_gib": 1, "directory": "/kept"},
                "lora": {"runtime_updates": True},
                "engine_options": {"enable_lora": True},
            },
            "an adapter",
        ),
    ],
)
def test_tiers_that_can_not_be_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec({"model": "m", **keys})
