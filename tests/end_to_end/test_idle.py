"""What the model does with its time is told, and why it does nothing: jobs wait for their workers, or there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_common.client import Client
from cola_common.jobs import ModelCard
from tests.end_to_end.jobs import finish, submit, until
from tests.support.cluster import Cluster

LATE, STEPS = 0.3, 6


@pytest.fixture
def cluster(models: dict[str, Path], tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, {"llama": models["llama"]}, workers=0) as cluster:
        yield cluster


def watched(cluster: Cluster, client: Client, count: int) -> tuple[float, float, float]:
    """So many jobs that begin at once, with a worker whose deltas are late. Returns: the seconds of each kind."""

    def card() -> ModelCard:
        return next(iter(client.models.list()))

    jobs = [submit(client, hyperparameters={"max_steps": STEPS}) for _ in range(count)]
    until(lambda: all(client.fine_tuning.jobs.retrieve(job.id).waiting_for_workers for job in jobs))
    before = card()
    worker = cluster.start_worker("worker", faulty=True)
    cluster.misbehave("worker", f"far={LATE}")
    for job in jobs:
        assert finish(client, job).status == "succeeded"
    after = card()
    worker.stop()
    cluster.workers.remove(worker)
    return (
        after.busy_seconds - before.busy_seconds,
        after.waiting_seconds - before.waiting_seconds,
        after.jobless_seconds - before.jobless_seconds,
    )


def test_the_models_waits_are_told_by_their_reason_and_many_jobs_wait_at_once(cluster: Cluster) -> None:
    with cluster.client() as client:
        busy, waiting, jobless = watched(cluster, client, 1)
        assert 0 < busy < waiting
        assert waiting > 0.9 * STEPS * LATE  # all of them: nobody else has anything to compute
        assert jobless > 0  # until the worker came
        _, waiting_of_four, _ = watched(cluster, client, 4)
        assert waiting_of_four < 2 * waiting  # one after another they would have waited four times as long
