"""The public names: they exist, they are imported when they are used, and the version is the installed one."""

import importlib
import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import tapo_jax

PACKAGES = [info.name for info in pkgutil.iter_modules(tapo_jax.__path__, "tapo_jax.") if info.ispkg]
# Packages that may import jax at once, because nothing without jax imports them.
ON_DEVICE = {"tapo_jax.check", "tapo_jax.evaluate", "tapo_jax.tapo"}


@pytest.mark.parametrize("name", ["tapo_jax", *PACKAGES])
def test_a_package_says_in_its_docstring_and_all_what_is_public(name):
    package = importlib.import_module(name)
    assert package.__doc__ and sorted(set(package.__all__)) == sorted(package.__all__)
    for public in package.__all__:
        assert getattr(package, public) is not None


def test_importing_the_packages_imports_no_jax():
    names = ["tapo_jax", *(name for name in PACKAGES if name not in ON_DEVICE)]
    code = f"import {', '.join(names)}, sys; print(sorted({{'jax', 'flax', 'transformers'}} & set(sys.modules)))"
    root = Path(tapo_jax.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_public_name_is_loaded_when_it_is_asked_for():
    assert tapo_jax.Prompt.__module__ == "tapo_jax.types"
    assert tapo_jax.learn.policy_loss.__module__ == "tapo_jax.learn.losses"
    with pytest.raises(AttributeError):
        tapo_jax.no_such_name  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    try:
        installed = metadata.version("tapo_jax")
    except metadata.PackageNotFoundError:
        pytest.skip("tapo_jax is not installed here, only on the path")
    assert installed == tapo_jax.__version__
