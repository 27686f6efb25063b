"""A collaboration under faults: it goes back as one, and ends as it would have."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cola_common.client import Client
from cola_common.jobs import Job
from tests.end_to_end.jobs import finish, messages, submit, texts, until
from tests.support.cluster import Cluster
from tests.support.outcome import Outcome, log_of, outcome
from tests.support.troupe import FLAGS

MEMBERS: list[dict[str, Any]] = [
    {"hyperparameters": {"max_steps": 120, "optimizer": "adamw", "learning_rate": 0.01}},
    {"hyperparameters": {"max_steps": 25}, "adapter": {"type": "linear", "target_modules": ["v_proj"]}},
    {"hyperparameters": {"max_steps": 110, "momentum": 0.9}, "adapter": {"r": 4, "target_modules": ["down_proj"]}},
]
EARLY = 1
WORKERS = ("a", "b")


def begin(client: Client) -> list[Job]:
    return [
        submit(
            client,
            rows=texts(16, seed=number),
            seed=number,
            collaboration={"group": "ours", "size": len(MEMBERS)},
            wire={"values": "fp32"},
            **member,
        )
        for number, member in enumerate(MEMBERS)
    ]


def outcomes(cluster: Cluster, client: Client, jobs: list[Job]) -> list[Outcome]:
    return [outcome(client, finish(client, job), cluster.root / "adapters") for job in jobs]


def mend_workers(cluster: Cluster) -> None:
    """Starts those that have ended, and none is far away."""
    cluster.workers[:] = [daemon for daemon in cluster.workers if daemon.process.poll() is None]
    for name in WORKERS:
        cluster.misbehave(name, "")
        if name not in {daemon.log.stem for daemon in cluster.workers}:
            cluster.start_worker(name, faulty=True)


@pytest.fixture(scope="module")
def _cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("groups"), {"llama": model}, workers=0, flags=FLAGS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(_cluster: Cluster) -> list[Outcome]:
    """What the members give where nothing fails."""
    mend_workers(_cluster)
    _cluster.await_workers(len(WORKERS))
    with _cluster.client() as client:
        return outcomes(_cluster, client, begin(client))


@pytest.fixture
def cluster(_cluster: Cluster, undisturbed: list[Outcome]) -> Cluster:
    """Server and workers are well, and no job is left, whatever the test before came to."""
    if _cluster.server.process.poll() is not None:
        _cluster.start_server()
    mend_workers(_cluster)
    with _cluster.client() as client:
        for job in client.fine_tuning.jobs.list():
            if not job.status.terminal:
                client.fine_tuning.jobs.cancel(job.id)
    _cluster.await_workers(len(WORKERS))
    return _cluster


def steps_of(client: Client, jobs: list[Job]) -> list[int]:
    return [client.fine_tuning.jobs.retrieve(job.id).step for job in jobs]


def rewinds(client: Client, job: Job) -> list[float]:
    """Where each of the job's attempts but the first went on."""
    words = ("Going on from the snapshot", "Starting again")
    return [float(e.data["step"]) for e in log_of(client, job) if e.message.startswith(words)]


def far_away(cluster: Cluster, seconds: float) -> None:
    """No step is over sooner."""
    for name in WORKERS:
        cluster.misbehave(name, f"far={seconds}")


def lose_a_worker(cluster: Cluster, client: Client) -> None:
    """Kills one that has shards, in the midst of a step, and starts another in its place."""
    far_away(cluster, 1)
    carrying = {worker.id for worker in client.workers.list() if worker.status == "attending" and worker.shards}
    next(daemon for daemon in cluster.workers if cluster.worker_id(daemon.log.stem) in carrying).kill()
    mend_workers(cluster)


def test_all_go_back_together_when_a_worker_is_killed(cluster: Cluster, undisturbed: list[Outcome]) -> None:
    with cluster.client() as client:
        far_away(cluster, 0.1)
        jobs = begin(client)
        until(lambda: min(steps_of(client, jobs)) > 15)
        lose_a_worker(cluster, client)
        until(lambda: min(steps_of(client, [jobs[0], jobs[2]])) > 45, 40)
        lose_a_worker(cluster, client)
        assert outcomes(cluster, client, jobs) == undisturbed
        back = [rewinds(client, job) for job in jobs]
        assert back[0] == back[2]
        assert back[EARLY] == back[0][: len(back[EARLY])] != []
        assert any(step >= 25 for step in back[0]), "nobody went back past the end of the one that ended early"


def test_the_group_forms_again_after_the_server_is_killed(cluster: Cluster, undisturbed: list[Outcome]) -> None:
    with cluster.client() as client:
        jobs = begin(client)
        until(lambda: min(steps_of(client, jobs)) > 5)
        cluster.server.kill()
        cluster.start_server()
        until(lambda: min(steps_of(client, [jobs[0], jobs[2]])) > 40, 40)
        assert client.fine_tuning.jobs.retrieve(jobs[EARLY].id).status == "succeeded"
        cluster.server.kill()  # now without the member that has ended
        cluster.start_server()
        assert outcomes(cluster, client, jobs) == undisturbed
        assert rewinds(client, jobs[0]) == rewinds(client, jobs[2])


def test_a_damaged_snapshot_of_one_takes_all_to_the_one_before(cluster: Cluster, undisturbed: list[Outcome]) -> None:
    with cluster.client() as client:
        jobs = begin(client)
        until(lambda: min(steps_of(client, [jobs[0], jobs[2]])) > 55, 40)
        cluster.server.kill()
        newest, before = sorted((cluster.data / "snapshots" / jobs[0].id).glob("*.safetensors"), reverse=True)
        torn = bytearray(newest.read_bytes())
        torn[-1] ^= 1
        newest.write_bytes(torn)
        cluster.start_server()
        assert outcomes(cluster, client, jobs) == undisturbed
        assert f"Snapshot {newest.name} is damaged" in " ".join(messages(client, jobs[0]))
        assert rewinds(client, jobs[0]) == rewinds(client, jobs[2])
        assert rewinds(client, jobs[0])[-1] == int(before.name.partition("-")[0])


def test_a_server_that_stops_takes_all_to_one_step_and_loses_none(cluster: Cluster, undisturbed: list[Outcome]) -> None:
    with cluster.client() as client:
        jobs = begin(client)
        until(lambda: min(steps_of(client, jobs)) > 5)
        cluster.server.stop()
        cluster.start_server()
        assert outcomes(cluster, client, jobs) == undisturbed
        back = [rewinds(client, job) for job in jobs]
        assert back == [back[0]] * 3
        for job in jobs:
            assert len([e for e in log_of(client, job) if e.type == "metrics"]) == job.spec.hyperparameters.max_steps


def test_a_member_that_was_paused_before_a_restart_holds_the_group_after_it(
    cluster: Cluster, undisturbed: list[Outcome]
) -> None:
    with cluster.client() as client:
        api = client.fine_tuning.jobs
        jobs = begin(client)
        until(lambda: min(steps_of(client, jobs)) > 15)
        api.pause(jobs[2].id)
        until(lambda: api.retrieve(jobs[0].id).status == "queued")
        reached = steps_of(client, jobs)
        assert len(set(reached)) == 1
        cluster.server.stop()
        cluster.start_server()
        cluster.await_workers(2)
        until(lambda: any("2 of 3" in text for text in messages(client, jobs[0])[-1:] + messages(client, jobs[1])[-1:]))
        assert steps_of(client, jobs) == reached
        api.resume(jobs[2].id)
        assert outcomes(cluster, client, jobs) == undisturbed


def test_a_server_that_is_killed_at_an_end_goes_on_from_there(cluster: Cluster, undisturbed: list[Outcome]) -> None:
    """All have their snapshot of a member's last step before it ends: nobody has to take a step again with its last
    adapter that was taken with an earlier one.
    """
    cluster.server.stop()
    cluster.start_server(failpoint="finish.before_commit:kill")
    with cluster.client() as client:
        try:
            jobs = begin(client)
            until(lambda: cluster.server.process.poll() is not None, 40)
        finally:
            cluster.server.stop()
        cluster.start_server()
        assert outcomes(cluster, client, jobs) == undisturbed
        assert [rewinds(client, job) for job in jobs] == [[25.0]] * 3
