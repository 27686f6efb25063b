"""A worker that is killed at any point, or whose own disk is full, and that comes back under its identity."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_common.failpoints import FAILPOINTS
from tests.end_to_end.jobs import finish, until
from tests.support.cluster import Cluster
from tests.support.outcome import begin, folds, log_of, outcome
from tests.support.troupe import FLAGS, Troupe

STEPS = 50

POINTS = {
    "worker.assigned": 1,
    "worker.captured": 25,
    "worker.before_step": 25,
    "worker.after_step": 25,
    "worker.before_keep": 2,
    "worker.after_keep": 2,
}


@pytest.fixture(scope="module")
def _cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server that deals every job out to two workers, and one of them."""
    flags = [*FLAGS, "--split-jobs=2"]
    with Cluster(tmp_path_factory.mktemp("points"), {"llama": model}, workers=1, flags=flags) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The same, with the one worker before and after."""
    with _cluster.client() as client:
        until(lambda: [worker.status for worker in client.workers.list()].count("attending") == 1)
    yield _cluster
    for worker in _cluster.workers[1:]:
        worker.kill()
    del _cluster.workers[1:]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_costs_no_step_and_repeats_none(point: str, cluster: Cluster, troupe: Troupe) -> None:
    with troupe.cluster.client() as well:
        expected = troupe.undisturbed(well, STEPS)
    with cluster.client() as client:
        worker = cluster.start_worker(point, failpoint=f"{point}:kill@{POINTS[point]}")
        cluster.await_workers(2)
        job = begin(client, STEPS)
        assert worker.process.wait(40) == -signal.SIGKILL
        assert f"fail point {point}: kill\n" in worker.said()
        cluster.start_worker(point)
        assert outcome(client, finish(client, job), cluster.root / "adapters") == expected


def test_every_point_of_the_worker_is_tried() -> None:
    assert POINTS.keys() == {name for name in FAILPOINTS if name.startswith("worker.")}


def test_a_full_disk_of_a_worker_costs_the_job_nothing(cluster: Cluster, troupe: Troupe) -> None:
    with troupe.cluster.client() as well:
        expected = troupe.undisturbed(well, STEPS)
    with cluster.client() as client:
        worker = cluster.start_worker("full", failpoint="worker.before_keep:full@2")
        cluster.await_workers(2)
        job = begin(client, STEPS)
        assert outcome(client, finish(client, job), cluster.root / "adapters") == expected
        assert client.fine_tuning.jobs.retrieve(job.id).epoch == 1
        assert len(folds(log_of(client, job))) == STEPS
        assert "is not kept here" in worker.said()
