"""The shared clusters: one whose jobs stay on one worker, one that deals every job out to two."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.models import save_tiny

MODELS = ("llama", "gpt2", "opt", "bert")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models as folders, by kind."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(kind, root / kind) for kind in MODELS}


@pytest.fixture(scope="session")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server with one worker a job."""
    with Cluster(tmp_path_factory.mktemp("whole"), models, workers=1) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def split(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server that deals each job out to its two workers."""
    with Cluster(tmp_path_factory.mktemp("split"), models, workers=2, flags=["--split-jobs=2"]) as cluster:
        yield cluster
