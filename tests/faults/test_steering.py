"""What is planned costs no step: cancel, pause, drain, moves to better workers, and daemons that are asked to stop."""

import signal
import time

import pytest

from cola_common.client import Client
from cola_common.jobs import Job
from tests.end_to_end.jobs import until
from tests.support.cluster import Daemon
from tests.support.outcome import Outcome, begin, folds, log_of
from tests.support.troupe import Troupe

STEPS = 50


def unrepeated(troupe: Troupe, client: Client, job: Job) -> Outcome:
    """The outcome of a job that took each step once."""
    found = troupe.outcome(client, job)
    assert [event.data["step"] for event in folds(log_of(client, job))] == list(range(1, STEPS + 1))
    return found


def idle(client: Client) -> bool:
    return not any(worker.shards for worker in client.workers.list())


def test_a_job_that_is_cancelled_in_mid_step_is_over_at_once_and_leaves_nothing_running(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        job = begin(client, STEPS)
        troupe.cluster.misbehave(troupe.owner(client, job), "slow=3")
        time.sleep(0.5)  # into a step that takes three seconds
        asked = time.monotonic()
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        until(lambda: idle(client))
        assert time.monotonic() - asked <= 5
        step = client.fine_tuning.jobs.retrieve(job.id).step
        time.sleep(4)
        assert client.fine_tuning.jobs.retrieve(job.id).step == step
        assert not (troupe.cluster.data / "snapshots" / job.id).exists()


def test_a_job_that_is_paused_in_mid_step_is_held_within_five_seconds_and_goes_on_where_it_was(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        troupe.cluster.misbehave(troupe.owner(client, job), "slow=2")
        time.sleep(0.5)
        asked = time.monotonic()
        assert client.fine_tuning.jobs.pause(job.id).status == "paused"
        until(lambda: idle(client))
        assert time.monotonic() - asked <= 5
        step = client.fine_tuning.jobs.retrieve(job.id).step
        for name in troupe.daemons:
            troupe.cluster.misbehave(name, "")
        time.sleep(0.5)
        assert client.fine_tuning.jobs.retrieve(job.id).step == step
        client.fine_tuning.jobs.resume(job.id)
        assert unrepeated(troupe, client, job) == expected


def test_a_worker_that_is_drained_leaves_and_its_job_goes_on_elsewhere(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        client.workers.drain(troupe.cluster.worker_id(owner))
        assert troupe.daemons[owner].process.wait(30) == 0
        assert unrepeated(troupe, client, job) == expected
        assert client.fine_tuning.jobs.retrieve(job.id).epoch == 2


def test_the_last_worker_drains_too_and_its_job_waits_for_another(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        troupe.kill(troupe.other(owner))
        assert troupe.daemons[owner].stop() == 0
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).waiting_for_workers)
        troupe.start(troupe.other(owner))
        assert unrepeated(troupe, client, job) == expected


def test_jobs_move_to_a_worker_that_comes_later(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        first = begin(client, STEPS)
        owner = troupe.owner(client, first)
        late = troupe.other(owner)
        troupe.kill(late)
        troupe.cluster.misbehave(owner, "slow=0.1")
        jobs = [first, *(begin(client, STEPS) for _ in range(2))]
        until(lambda: sum(worker.shards for worker in client.workers.list()) == 4 * len(jobs))
        troupe.start(late)
        id = troupe.cluster.worker_id(late)
        until(lambda: any(worker.shards for worker in client.workers.list() if worker.id == id))
        troupe.cluster.misbehave(owner, "")
        assert [unrepeated(troupe, client, job) for job in jobs] == [expected] * len(jobs)
        assert 1 <= sum(client.fine_tuning.jobs.retrieve(job.id).epoch > 1 for job in jobs) < len(jobs)


def test_sigterm_lets_a_worker_leave_without_a_failed_step(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        assert troupe.daemons[troupe.owner(client, job)].stop() == 0
        assert unrepeated(troupe, client, job) == expected


def test_sigterm_lets_the_server_end_without_a_failed_step(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        troupe.owner(client, job)
        assert troupe.cluster.server.stop() == 0
        troupe.cluster.start_server()
        assert unrepeated(troupe, client, job) == expected


def test_sigterm_ends_server_and_worker_within_thirty_seconds_though_the_trainer_hangs(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        troupe.cluster.misbehave(owner, "hang")
        time.sleep(0.5)
        asked = time.monotonic()
        for daemon in (troupe.daemons[owner], troupe.cluster.server):
            daemon.process.send_signal(signal.SIGTERM)
        assert troupe.cluster.server.process.wait(30) == 0
        troupe.daemons[owner].process.wait(30 - (time.monotonic() - asked))


@pytest.mark.parametrize("which", ["server", "worker"])
def test_a_second_signal_ends_a_daemon_at_once(which: str, troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        troupe.cluster.misbehave(owner, "slow=15")
        time.sleep(0.5)
        daemon: Daemon = troupe.cluster.server if which == "server" else troupe.daemons[owner]
        daemon.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert daemon.process.poll() is None, "it had nothing to wait for"
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(2) == 1
        troupe.kill(owner)
        troupe.mend_daemons()
        assert troupe.outcome(client, job) == expected
