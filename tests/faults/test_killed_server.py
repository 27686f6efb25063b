"""A server that is killed, at any point, and started again: jobs, workers and clients go on by themselves."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cola_common.failpoints import FAILPOINTS
from tests.end_to_end.jobs import finish, until
from tests.support.cluster import Cluster
from tests.support.outcome import begin, folds, log_of, outcome
from tests.support.troupe import FLAGS, Troupe

STEPS = 50

POINTS = {
    # point -> the hit at which it strikes: in the midst of the job, where there are many
    "epoch.before_commit": 1,
    "epoch.after_commit": 1,
    "assign.sent": 1,
    "batch.sent": 25,
    "step.before_fold": 25,
    "step.after_fold": 25,
    "step.acknowledged": 25,
    "step.after_commit": 25,
    "snapshot.requested": 2,
    "snapshot.before_write": 2,
    "snapshot.before_rename": 1,
    "snapshot.after_rename": 3,
    "checkpoint.before_record": 2,
    "checkpoint.after_record": 2,
    "finish.before_commit": 1,
    "finish.after_commit": 1,
}


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server, to be killed, and a worker."""
    with Cluster(tmp_path_factory.mktemp("killed"), {"llama": model}, workers=1, flags=FLAGS) as cluster:
        yield cluster


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_costs_no_step_and_repeats_none(point: str, cluster: Cluster, troupe: Troupe) -> None:
    with troupe.cluster.client() as well:
        expected = troupe.undisturbed(well, STEPS)
    cluster.server.stop()
    cluster.start_server(failpoint=f"{point}:kill@{POINTS[point]}")
    with cluster.client() as client:
        job = begin(client, STEPS)
        assert cluster.server.process.wait(40) == -signal.SIGKILL
        assert f"fail point {point}: kill\n" in cluster.server.said()
        cluster.start_server()
        assert outcome(client, finish(client, job), cluster.root / "adapters") == expected


def test_every_point_of_the_server_is_tried() -> None:
    assert POINTS.keys() == {name for name in FAILPOINTS if not name.startswith("worker.")}


@pytest.mark.alone
def test_a_killed_server_serves_within_five_seconds_and_folds_within_fifteen(troupe: Troupe) -> None:
    with ThreadPoolExecutor() as pool, troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        troupe.owner(client, job)
        workers = [daemon.process.pid for daemon in troupe.daemons.values()]
        following = pool.submit(lambda: list(client.fine_tuning.jobs.stream_events(job.id)))
        troupe.cluster.server.kill()
        killed, started = time.time(), time.monotonic()
        troupe.cluster.start_server()
        assert time.monotonic() - started - troupe.cluster.server.waited_seconds() <= 5
        assert troupe.outcome(client, job) == expected
        log = log_of(client, job)
        assert next(e for e in folds(log) if e.created_at > killed).created_at - killed <= 15
        assert following.result(20) == log, "who followed the events saw each of them once"
        assert [event.id for event in log] == list(range(1, len(log) + 1))
        assert [daemon.process.pid for daemon in troupe.daemons.values()] == workers
        assert all(daemon.process.poll() is None for daemon in troupe.daemons.values())


def test_jobs_files_checkpoints_and_keys_are_there_again(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        done = finish(client, begin(client, STEPS))
        paused = begin(client, STEPS)
        until(lambda: client.fine_tuning.jobs.retrieve(paused.id).step > 15)
        client.fine_tuning.jobs.pause(paused.id)
        running = begin(client, STEPS, idempotency_key="one job")
        checkpoints = client.fine_tuning.jobs.checkpoints.list(done.id).data
        files = client.files.list(limit=100).data
        until(lambda: client.fine_tuning.jobs.retrieve(running.id).step > 2)
        until(lambda: sum(worker.shards for worker in client.workers.list()) == 4)
        troupe.cluster.server.kill()
        troupe.cluster.start_server()
        assert client.fine_tuning.jobs.retrieve(done.id) == done
        assert client.fine_tuning.jobs.checkpoints.list(done.id).data == checkpoints
        assert client.files.list(limit=100).data == files
        again = client.fine_tuning.jobs.create(**running.spec.model_dump(mode="json"), idempotency_key="one job")
        assert again.id == running.id
        assert troupe.outcome(client, running) == expected
        assert client.fine_tuning.jobs.retrieve(paused.id).status == "paused"
        client.fine_tuning.jobs.resume(paused.id)
        assert troupe.outcome(client, paused) == expected
        assert len(folds(log_of(client, paused))) == STEPS, "a pause costs no step, not even with a restart"
