"""Workers that are killed, frozen or hung: how soon that is noticed, how soon the job goes on, and to the same end."""

import time

import pytest

from tests.end_to_end.jobs import messages, until
from tests.support.outcome import begin, folds, log_of, lost, next_fold
from tests.support.troupe import Troupe

STEPS = 50
EVERY = 10  # steps between snapshots


@pytest.mark.alone
def test_a_killed_worker_is_noticed_within_a_second_and_its_job_folds_elsewhere_within_three(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        killed = time.time()
        troupe.kill(owner)
        assert troupe.outcome(client, job) == expected
        log = log_of(client, job)
        loss = lost(log, troupe.cluster.worker_id(owner))
        assert loss.created_at - killed <= 1.0
        again = next_fold(log, loss)
        assert again.created_at - killed <= 3.0
        reached = max(float(e.data["step"]) for e in folds(log) if e.id < loss.id)
        assert reached - 2 * EVERY < float(again.data["step"]) <= reached + 1, "it is not from its last snapshot"
        assert client.fine_tuning.jobs.retrieve(job.id).epoch >= 2


def test_a_job_without_a_worker_waits_and_says_so_and_takes_the_next_one(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        troupe.kill(troupe.other(owner))
        troupe.kill(owner)
        until(lambda: messages(client, job)[-1] == "Waiting for workers.")
        assert client.fine_tuning.jobs.retrieve(job.id).waiting_for_workers
        assert [worker.status for worker in client.workers.list()] == ["lost", "lost"]
        troupe.start(owner)
        assert troupe.outcome(client, job) == expected
        assert not client.fine_tuning.jobs.retrieve(job.id).waiting_for_workers


def test_a_frozen_worker_loses_its_lease_and_when_it_goes_on_its_old_delta_is_stale(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        spare = troupe.other(owner)
        troupe.cluster.misbehave(spare, "slow=0.1")  # the job is still there when the frozen worker comes back
        troupe.cluster.misbehave(owner, "late")
        frozen = time.time()
        troupe.daemons[owner].freeze()
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).epoch == 2)
        log = log_of(client, job)
        assert lost(log, troupe.cluster.worker_id(owner)).created_at - frozen <= 15
        until(lambda: len(folds(log_of(client, job))) > len(folds(log)))
        assert time.time() - frozen <= 20
        troupe.daemons[owner].thaw()
        troupe.cluster.await_workers(2)
        troupe.kill(spare)  # back to the first, which sends again what it sent last before it was frozen
        assert troupe.outcome(client, job) == expected
        assert "reason=STALE_EPOCH" in troupe.daemons[owner].said()


def test_a_hung_trainer_behind_a_living_connection_is_noticed_by_its_progress(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        troupe.kill(troupe.other(owner))  # or the job would move before the worker is given up
        troupe.cluster.misbehave(owner, "hang")
        hung = time.time()
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).waiting_for_workers, 25)
        loss = lost(log_of(client, job), troupe.cluster.worker_id(owner))
        assert loss.created_at - hung <= 20
        assert "its trainer has been at one message" in loss.message
        troupe.kill(owner)
        troupe.start(troupe.other(owner))
        assert troupe.outcome(client, job) == expected


def test_a_job_moves_away_from_a_hung_trainer_within_twenty_seconds(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        troupe.cluster.misbehave(owner, "hang")
        hung, seen = time.time(), len(log_of(client, job))
        assert troupe.outcome(client, job) == expected
        log = log_of(client, job)[seen:]
        (move,) = (e for e in log if e.level == "warn" and troupe.cluster.worker_id(owner) in e.message)
        assert next_fold(log, move).created_at - hung <= 20
        troupe.kill(owner)
