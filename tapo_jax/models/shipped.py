"""Find a model: the one that ships with the package, or the directory that a config names. Imports no jax."""

from pathlib import Path

from tapo_jax.config import UserError
from tapo_jax.models.model_files import check_no_pointer

DIRECTORY = Path(__file__).parents[1] / "cold_start" / "atlas_tiny"
NAMED = {"": DIRECTORY, "atlas_band": DIRECTORY.with_name("atlas_band")}
"""Values of model.path that stand for a model of the package: for the questions of Atlas, and for those of `band`."""


def located(path: str) -> Path:
    """Return the place of a config's model.path, whether or not it exists."""
    return NAMED[path] if path in NAMED else Path(path)


def model_directory(path: str, shape: str = "") -> Path:
    """Return the directory of a config's model.path; the names of `NAMED` are models of the package.

    Raises UserError if the directory lacks a file, or if the path is "" in a config for a published model (its
    model.shape)."""
    if shape and not path:
        raise UserError(
            f"model.path is empty and this config is for {shape}: give --config.model.path=DIR with its files."
        )
    directory = located(path)
    if not directory.is_dir():
        raise UserError(
            f"model.path is '{directory}', which is no directory: give a model directory in Hugging Face form."
        )
    for names in (("config.json",), ("tokenizer.json",), ("preprocessor_config.json", "processor_config.json")):
        there = [directory / name for name in names if (directory / name).is_file()]
        if not there:
            raise UserError(
                f"The model directory {directory} has no {' or '.join(names)}: "
                "give a complete directory in Hugging Face form."
            )
        for file in there:
            check_no_pointer(file)
    return directory
