"""A server's disk without room: jobs pause and say why, and when there is room again they go on where they were."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_common.errors import ColaError, Reason
from cola_common.jobs import JobEvent
from tests.end_to_end.jobs import finish, texts, until
from tests.support.cluster import Cluster
from tests.support.disk import SmallDisk
from tests.support.outcome import begin, log_of, outcome
from tests.support.troupe import FLAGS, Troupe

STEPS = 50


@pytest.fixture(scope="module")
def _cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server whose data folder is a small disk, and a worker."""
    root = tmp_path_factory.mktemp("full")
    with (
        SmallDisk(root / "disk", mebibytes=24) as disk,
        Cluster(root, {"llama": model}, workers=1, flags=FLAGS, disk=disk) as cluster,
    ):
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The same, with room at the end."""
    yield _cluster
    assert _cluster.disk is not None
    _cluster.disk.free()


def why(log: list[JobEvent]) -> list[str]:
    return [event.message for event in log if event.message.startswith("Paused: ") and event.level == "error"]


def test_a_job_on_a_full_disk_pauses_with_the_reason_and_goes_on_when_there_is_room(
    cluster: Cluster, troupe: Troupe
) -> None:
    with troupe.cluster.client() as well:
        expected = troupe.undisturbed(well, STEPS)
    disk = cluster.disk
    assert disk is not None
    with cluster.client() as client:
        job = begin(client, STEPS)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 12)
        disk.fill()
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused")
        (reason,) = why(log_of(client, job))
        assert "no space left" in reason and "resume" in reason
        disk.fill()  # with what the server held in reserve
        with pytest.raises(ColaError) as refused:
            client.files.create(file=("more.jsonl", texts(5000)), purpose="fine-tune")
        assert refused.value.reason == Reason.STORAGE_FULL
        disk.free()
        client.fine_tuning.jobs.resume(job.id)
        assert outcome(client, finish(client, job), cluster.root / "adapters") == expected


def test_a_server_that_is_killed_on_a_full_disk_goes_on_when_there_is_room(cluster: Cluster, troupe: Troupe) -> None:
    with troupe.cluster.client() as well:
        expected = troupe.undisturbed(well, STEPS)
    disk = cluster.disk
    assert disk is not None
    with cluster.client() as client:
        job = begin(client, STEPS)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 12)
        disk.fill()
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused")
        cluster.server.kill()
        disk.free()
        cluster.start_server()
        client.fine_tuning.jobs.resume(job.id)
        assert outcome(client, finish(client, job), cluster.root / "adapters") == expected


def test_a_disk_that_is_full_when_a_snapshot_is_half_written_costs_nothing_but_a_pause(
    cluster: Cluster, troupe: Troupe
) -> None:
    with troupe.cluster.client() as well:
        expected = troupe.undisturbed(well, STEPS)
    cluster.server.stop()
    cluster.start_server(failpoint="snapshot.before_rename:full@2")
    with cluster.client() as client:
        job = begin(client, STEPS)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused", 40)
        assert "no space left" in why(log_of(client, job))[0]
        client.fine_tuning.jobs.resume(job.id)
        assert outcome(client, finish(client, job), cluster.root / "adapters") == expected
