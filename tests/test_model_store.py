"""Model directories: complete or absent, ours or refused."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.model_store import (
    MARKER_FILE,
    ModelRecipe,
    gemma_model_ready,
    gemma_recipe,
    holds_foreign_checkpoint,
    model_ready,
    new_model,
    tiny_model_ready,
    tiny_recipe,
)

RECIPE = ModelRecipe(name="toy", version=3, seed=7)


def build(directory: Path, recipe: ModelRecipe = RECIPE, text: str = "weights") -> None:
    with new_model(directory, recipe) as partial:
        (partial / "model.bin").write_text(text)


def siblings(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.parent.iterdir())


def test_a_built_model_is_ready_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    directory = tmp_path / "models" / "toy"
    assert not model_ready(directory, RECIPE)
    build(directory)
    assert model_ready(directory, RECIPE)
    assert (directory / "model.bin").read_text() == "weights"
    assert siblings(directory) == ["toy"]


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    directory = tmp_path / "toy"
    with new_model(directory, RECIPE) as partial:
        (partial / "model.bin").write_text("weights")
        assert not directory.exists()
        assert partial.parent == tmp_path, "a rename is atomic only within one file system"


@pytest.mark.parametrize(
    "other",
    [
        ModelRecipe(name="toy", version=4, seed=7),
        ModelRecipe(name="toy", version=3, seed=8),
        ModelRecipe(name="toy", version=3),
    ],
)
def test_another_recipe_is_not_ready_and_replaces(tmp_path: Path, other: ModelRecipe) -> None:
    directory = tmp_path / "toy"
    build(directory)
    assert not model_ready(directory, other)
    build(directory, other, text="other weights")
    assert model_ready(directory, other)
    assert (directory / "model.bin").read_text() == "other weights"
    assert siblings(directory) == ["toy"]


def test_an_incomplete_copy_is_not_ready_and_is_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "toy"
    build(directory)
    (directory / "model.bin").write_text("wei")
    assert not model_ready(directory, RECIPE)
    (directory / "model.bin").unlink()
    assert not model_ready(directory, RECIPE)
    build(directory)
    assert model_ready(directory, RECIPE)


def test_a_build_that_fails_changes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "toy"
    build(directory)

    def fail() -> None:
        with new_model(directory, ModelRecipe(name="toy", version=4)) as partial:
            (partial / "model.bin").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert model_ready(directory, RECIPE)
    assert siblings(directory) == ["toy"]


@pytest.mark.parametrize("marker", [None, "", "{}", '{"recipe": {"name": "toy"}, "file_bytes": {}}'])
def test_a_foreign_directory_is_refused_and_kept(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    if marker is not None:
        (tmp_path / MARKER_FILE).write_text(marker)
    with pytest.raises(ValueError, match="name another directory for the model 'toy', or remove this one"):
        build(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert not model_ready(tmp_path, RECIPE)


def test_a_model_of_another_name_is_refused_and_kept(tmp_path: Path) -> None:
    build(tmp_path / "toy")
    with (
        pytest.raises(ValueError, match="holds the model 'toy'"),
        new_model(tmp_path / "toy", ModelRecipe(name="other", version=3)),
    ):
        pass
    assert model_ready(tmp_path / "toy", RECIPE)


def test_a_checkpoint_of_ones_own_is_foreign_and_ours_is_not(tmp_path: Path) -> None:
    build(tmp_path / "toy")
    own = tmp_path / "own"
    own.mkdir()
    assert not holds_foreign_checkpoint(own, RECIPE)
    (own / "config.json").write_text("{}")
    assert holds_foreign_checkpoint(own, RECIPE)
    assert not holds_foreign_checkpoint(tmp_path / "toy", RECIPE)
    (tmp_path / "toy" / "config.json").write_text("{}")
    assert holds_foreign_checkpoint(tmp_path / "toy", ModelRecipe(name="other", version=3))


def test_contents_that_appear_during_the_build_are_kept(tmp_path: Path) -> None:
    directory = tmp_path / "toy"

    def build_while_another_writes() -> None:
        with new_model(directory, RECIPE):
            directory.mkdir()
            (directory / "thesis.tex").write_text("years of work")

    with pytest.raises(ValueError, match="was not written by pdserve"):
        build_while_another_writes()
    assert siblings(directory) == ["toy"]
    assert [path.name for path in directory.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("a file")
    with pytest.raises(ValueError, match="exists and was not written by pdserve"):
        build(tmp_path / "toy")


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    build(tmp_path)
    assert model_ready(tmp_path, RECIPE)


def test_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "toy").symlink_to("disk")
    build(tmp_path / "toy")
    assert (tmp_path / "toy").is_symlink()
    assert model_ready(tmp_path / "disk", RECIPE)


def test_the_first_of_two_builders_wins(tmp_path: Path) -> None:
    directory = tmp_path / "toy"
    with new_model(directory, RECIPE) as slow:
        (slow / "model.bin").write_text("slow")
        build(directory, text="fast")
    assert (directory / "model.bin").read_text() == "fast"
    assert siblings(directory) == ["toy"]


def test_other_users_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        with new_model(tmp_path / "toy", RECIPE) as partial:
            (partial / "model.bin").touch(mode=0o600)
    finally:
        os.umask(previous)
    for name in ("model.bin", MARKER_FILE):
        assert stat.S_IMODE((tmp_path / "toy" / name).stat().st_mode) == 0o644


def test_the_two_models_do_not_pass_for_each_other(tmp_path: Path) -> None:
    build(tmp_path / "tiny", tiny_recipe(seed=5))
    build(tmp_path / "gemma", gemma_recipe())
    assert tiny_model_ready(tmp_path / "tiny", seed=5)
    assert not tiny_model_ready(tmp_path / "tiny")
    assert not gemma_model_ready(tmp_path / "tiny")
    assert gemma_model_ready(tmp_path / "gemma")
    assert not tiny_model_ready(tmp_path / "gemma")


def test_asking_imports_nothing_heavy() -> None:
    program = (
        "import sys; from pathlib import Path; from deploy.model_store import tiny_model_ready;"
        "tiny_model_ready(Path('nowhere'));"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
