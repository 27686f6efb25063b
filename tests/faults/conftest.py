"""What the tests of this folder share: the model, and a server with two workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import save_tiny
from tests.support.troupe import Troupe


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def _troupe(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Troupe]:
    with Troupe(tmp_path_factory.mktemp("troupe"), model) as troupe:
        yield troupe


@pytest.fixture
def troupe(_troupe: Troupe) -> Troupe:
    """Server and workers, all well."""
    _troupe.mend()
    return _troupe
