"""A script's folder comes first on sys.path, so no module in it may have the name of another package."""

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import fastdiff

HERE = Path(fastdiff.__file__).parent


def test_no_module_hides_another() -> None:
    taken = sys.stdlib_module_names | (packages_distributions().keys() - {"fastdiff"})
    names = {path.stem for path in HERE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & taken


def test_kernels_is_no_package_of_that_name() -> None:
    """If kernels/ were a package, `import kernels` in the repository's root would find it instead of PyPI's."""
    assert not (HERE.parent / "kernels" / "__init__.py").exists()
