"""Where the locally built models live: which directory holds a complete one, and how one gets there whole.

A builder writes into a sibling directory and renames it, so a reader finds either no model or a complete
one. The marker file says which recipe made a directory. Nothing here imports a heavy library: a start-up
script may ask `tiny_model_ready` first and load torch only when there is something to build.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cluster.frozen import Frozen

MARKER_FILE = "pdserve_model.json"

# Raise a version whenever its builder would write other bytes: what the old recipe made is then replaced.
TINY_RECIPE_VERSION = 1
TINY_EXPERTS_RECIPE_VERSION = 1
GEMMA_RECIPE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe:
    """What a model directory was made from; two directories of one recipe hold the same model.

    `seed` is the seed of random weights, or None for a model whose weights are given.
    """

    name: str
    version: int
    seed: int | None = None


class ModelMarker(Frozen):
    """Contents of the marker file: the recipe, and the size in bytes of every file that it made."""

    recipe: ModelRecipe
    file_bytes: dict[str, int]


def tiny_recipe(*, seed: int = 0, experts: bool = False) -> ModelRecipe:
    """Return the recipe of the tiny random Llama, or with `experts` Mixtral, with the weights of `seed`."""
    if experts:
        return ModelRecipe(name="tiny-experts", version=TINY_EXPERTS_RECIPE_VERSION, seed=seed)
    return ModelRecipe(name="tiny", version=TINY_RECIPE_VERSION, seed=seed)


def gemma_recipe() -> ModelRecipe:
    """Return the recipe of Gemma 3 270M."""
    return ModelRecipe(name="gemma", version=GEMMA_RECIPE_VERSION)


def tiny_model_ready(directory: Path, *, seed: int = 0, experts: bool = False) -> bool:
    """Return whether `directory` holds the complete tiny model of this recipe version and `seed`."""
    return model_ready(directory, tiny_recipe(seed=seed, experts=experts))


def gemma_model_ready(directory: Path) -> bool:
    """Return whether `directory` holds the complete Gemma model of this recipe version."""
    return model_ready(directory, gemma_recipe())


def holds_foreign_checkpoint(directory: Path, recipe: ModelRecipe) -> bool:
    """Return whether `directory` holds a checkpoint that `recipe` did not make: a user's own, say."""
    marker = _read_marker(directory)
    ours = marker is not None and marker.recipe.name == recipe.name
    return not ours and (directory / "config.json").is_file()


def model_ready(directory: Path, recipe: ModelRecipe) -> bool:
    """Return whether `directory` holds a complete model of `recipe`.

    File sizes are compared, not contents: that finds a copy that was cut short and costs no reading.
    """
    marker = _read_marker(directory)
    if marker is None or marker.recipe != recipe:
        return False
    return all(_size_bytes(directory / name) == size for name, size in marker.file_bytes.items())


@contextmanager
def new_model(directory: Path, recipe: ModelRecipe) -> Iterator[Path]:
    """Yield an empty directory to write a model of `recipe` into; at the end it becomes `directory`.

    A directory with a marker of this recipe's name (an older version, another seed, an incomplete copy) is
    replaced. If the block
    raises, what it wrote is removed and `directory` is as before. A process that is killed leaves a hidden
    sibling `.NAME.*.partial` behind, which may be deleted.

    Raises:
        ValueError: `directory` is a file, or has contents that this recipe did not make.
    """
    directory = directory.resolve()
    _refuse_foreign(directory, recipe)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        yield partial
        _let_others_read(partial)
        _write_marker(partial, recipe)
        _publish(partial, directory, recipe)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_foreign(directory: Path, recipe: ModelRecipe) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    marker = _read_marker(directory)
    if marker is not None and marker.recipe.name == recipe.name:
        return
    holds = "was not written by pdserve" if marker is None else f"holds the model {marker.recipe.name!r}"
    raise ValueError(
        f"{directory} exists and {holds}: name another directory for the model {recipe.name!r}, "
        "or remove this one first"
    )


def _publish(partial: Path, directory: Path, recipe: ModelRecipe) -> None:
    """Put `partial` in the place of `directory`; a process that did the same first wins."""
    if model_ready(directory, recipe):
        return
    _refuse_foreign(directory, recipe)
    replaced = partial.with_suffix(".replaced")
    # A rename takes the place of an empty directory, but not of one with contents: that must move aside.
    if _read_marker(directory) is not None:
        with suppress(FileNotFoundError):
            os.rename(directory, replaced)
    try:
        os.rename(partial, directory)
    except OSError:
        if not model_ready(directory, recipe):
            raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def _let_others_read(directory: Path) -> None:
    """Give every file the permissions that the umask left on `directory`: safetensors writes mode 0600."""
    mode = directory.stat().st_mode & 0o666
    for path in directory.iterdir():
        path.chmod(mode)


def _write_marker(directory: Path, recipe: ModelRecipe) -> None:
    file_bytes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    marker = ModelMarker(recipe=recipe, file_bytes=file_bytes)
    (directory / MARKER_FILE).write_text(marker.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _read_marker(directory: Path) -> ModelMarker | None:
    """Return the marker of `directory`, or None if there is none that is ours."""
    try:
        return ModelMarker.model_validate_json((directory / MARKER_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
