"""Workers that come and go: a job waits for them, goes on from its last snapshot, and ends with the same adapter."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.jobs import courses, finish, messages, submit, until, weights
from tests.support.cluster import Cluster


@pytest.fixture
def empty(models: dict[str, Path], tmp_path: Path) -> Iterator[Cluster]:
    """A server without workers."""
    with Cluster(tmp_path, {"llama": models["llama"]}, workers=0) as cluster:
        yield cluster


def test_a_job_waits_for_a_worker_and_survives_its_loss(empty: Cluster, tmp_path: Path) -> None:
    steps = {"max_steps": 300, "optimizer": "adamw"}
    with empty.client() as client:
        job = submit(client, hyperparameters=steps)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).waiting_for_workers)
        assert "Waiting for workers." in messages(client, job)
        first = empty.start_worker("first")
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 20, 40)
        first.kill()
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).waiting_for_workers)
        assert [worker.status for worker in client.workers.list()] == ["lost"]
        empty.workers.remove(first)
        empty.start_worker("second")
        done = finish(client, job)
        assert done.status == "succeeded" and done.epoch == 2
        before, after = courses(client, job)
        assert 1 < after[0] <= before[-1] + 1, "it went back to its start, or lost a step"
        assert any(m.startswith("Worker ") and "is lost" in m for m in messages(client, job))
        assert [metrics.step for metrics in client.fine_tuning.jobs.metrics(job.id)] == list(range(1, 301))
        undisturbed = finish(client, submit(client, hyperparameters=steps))
        assert weights(client, job, tmp_path / "a") == weights(client, undisturbed, tmp_path / "b")


def test_a_server_that_is_killed_goes_on_by_itself_and_so_do_its_workers(empty: Cluster) -> None:
    empty.start_worker("first")
    empty.await_workers(1)
    with empty.client() as client:
        job = submit(client, hyperparameters={"max_steps": 200})
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 20)
        empty.server.kill()
        empty.start_server()
        done = finish(client, job)
        assert done.status == "succeeded" and done.epoch == 2
        before, after = courses(client, job)
        assert 1 < after[0] <= before[-1] + 1
        assert after[-1] == 200


def test_sigterm_lets_server_and_workers_end_well(empty: Cluster) -> None:
    worker = empty.start_worker("first")
    empty.await_workers(1)
    with empty.client() as client:
        job = submit(client, hyperparameters={"max_steps": 2000})
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 2)
        assert empty.server.stop() == 0
    empty.start_server()
    with empty.client() as client:
        assert client.fine_tuning.jobs.retrieve(job.id).status in ("queued", "running")
        until(lambda: len(found := courses(client, job)) == 2 and len(found[-1]) > 2)
        client.fine_tuning.jobs.cancel(job.id)
        before, after = courses(client, job)
        assert after[0] == before[-1] + 1, "a server that ends well repeats nothing"
        until(lambda: [w.status for w in client.workers.list()] == ["attending"], 30)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(15) == 0
        until(lambda: [w.status for w in client.workers.list()] == ["lost"])
