"""A worker that is far slower than it was: its job moves, or waits where there is no other; other jobs lose nothing."""

import time

import pytest

from cola_common.client import Client
from cola_common.jobs import Job
from tests.end_to_end.jobs import until
from tests.support.outcome import begin, folds, log_of
from tests.support.troupe import Troupe

STEPS = 50
LONG = 5000
INTERVAL = {"adaptation_interval": 4}  # batches of a step: each is a message, and none of them takes long enough alone


@pytest.mark.alone
def test_a_straggler_s_job_moves_and_other_jobs_keep_their_speed(troupe: Troupe) -> None:
    troupe.renew()  # each is to get one of two jobs
    with troupe.cluster.client() as client:
        steady = begin(client, LONG)
        fast = troupe.owner(client, steady)
        job = begin(client, LONG, hyperparameters=INTERVAL)
        until(lambda: all(worker.shards for worker in client.workers.list()))
        straggler = troupe.other(fast)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 2)
        taken = {"": 0, "far=1": 0}  # late on its way: no worker looks slow, and nothing moves
        for faults in list(taken) * 6:  # in turns, so that what else the machine does slows both
            troupe.cluster.misbehave(straggler, faults)
            taken[faults] += _steps(client, steady)
        assert taken["far=1"] >= 0.9 * taken[""] > 10
        troupe.cluster.misbehave(straggler, "slow=8")
        id = troupe.cluster.worker_id(straggler)
        moved = f"The job moves: no delta of {id} after"
        until(lambda: any(e.message.startswith(moved) for e in log_of(client, job)), 40)
        until(lambda: (now := client.fine_tuning.jobs.retrieve(job.id)).epoch == 2 and not _rests(client, now))
        assert client.fine_tuning.jobs.retrieve(steady.id).epoch == 1


def test_without_another_worker_a_straggler_is_waited_for(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS, hyperparameters=INTERVAL)
        for each in troupe.daemons:
            troupe.cluster.misbehave(each, "slow=0.03")  # not over before it is slowed down
        job = begin(client, STEPS, hyperparameters=INTERVAL)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 2)
        (owner,) = (worker.id for worker in client.workers.list() if worker.shards)
        name = next(name for name in troupe.daemons if troupe.cluster.worker_id(name) == owner)
        troupe.kill(troupe.other(name))
        troupe.cluster.misbehave(name, "slow=3")
        until(lambda: any(e.message.startswith("Waiting: no delta of") for e in log_of(client, job)))
        troupe.cluster.misbehave(name, "")
        assert troupe.outcome(client, job) == expected
        assert client.fine_tuning.jobs.retrieve(job.id).epoch == 1
        assert len(folds(log_of(client, job))) == STEPS


def _rests(client: Client, job: Job) -> bool:
    time.sleep(0.5)
    return client.fine_tuning.jobs.retrieve(job.id).step == job.step


def _steps(client: Client, job: Job) -> int:
    """Steps that a job takes in a second."""
    before = client.fine_tuning.jobs.retrieve(job.id).step
    time.sleep(1)
    return client.fine_tuning.jobs.retrieve(job.id).step - before
