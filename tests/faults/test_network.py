"""The network between server and workers: cut, slow, broken off, and messages that come twice, late or not at all."""

import re
import time
from pathlib import Path

import pytest

from cola_common.client import Client
from cola_common.jobs import Job
from tests.end_to_end.jobs import submit, texts, until
from tests.support.cluster import Cluster
from tests.support.outcome import begin, folds, log_of, lost
from tests.support.proxy import Proxy
from tests.support.troupe import Troupe

STEPS = 50


def test_both_sides_notice_a_cut_and_the_worker_comes_back_with_what_it_owns(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        spare = troupe.other(owner)
        troupe.cluster.misbehave(spare, "slow=0.1")
        before = troupe.daemons[owner].said()
        cut = time.time()
        troupe.proxies[owner].cut()
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).epoch == 2)
        assert lost(log_of(client, job), troupe.cluster.worker_id(owner)).created_at - cut <= 15
        until(lambda: "no connection" in troupe.daemons[owner].said()[len(before) :])
        assert time.time() - cut <= 15
        troupe.proxies[owner].restore()
        until(lambda: re.search(r"attending .*owned=[1-9]", troupe.daemons[owner].said()[len(before) :]) is not None)
        troupe.cluster.misbehave(spare, "")
        assert troupe.outcome(client, job) == expected


def test_a_cut_shorter_than_the_lease_costs_a_job_its_seconds_and_nothing_else(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        troupe.proxies[owner].cut()
        until(lambda: _rests(troupe, job.id))
        time.sleep(3)
        troupe.proxies[owner].restore()
        assert troupe.outcome(client, job) == expected
        assert client.fine_tuning.jobs.retrieve(job.id).epoch == 1
        assert len(folds(log_of(client, job))) == STEPS


def test_an_acknowledgement_that_is_lost_with_its_connection_repeats_no_step(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        troupe.proxies[owner].cut("down")  # deltas arrive and are folded; the worker hears of nothing
        until(lambda: _rests(troupe, job.id))
        troupe.proxies[owner].sever()
        troupe.proxies[owner].restore()
        assert troupe.outcome(client, job) == expected
        assert client.fine_tuning.jobs.retrieve(job.id).epoch >= 2


def test_connections_that_break_again_and_again_do_not_keep_a_job_from_its_end(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        for proxy in troupe.proxies.values():
            proxy.latency = 0.002
        job = begin(client, STEPS)
        for after in (12, 18, 25, 31, 44):
            until(lambda after=after: client.fine_tuning.jobs.retrieve(job.id).step > after)
            for proxy in troupe.proxies.values():
                proxy.sever()
        assert troupe.outcome(client, job) == expected
        assert client.fine_tuning.jobs.retrieve(job.id).epoch >= 4


def test_a_slow_link_costs_neither_memory_nor_the_worker(model: Path, tmp_path: Path) -> None:
    bounds = ["--window-bytes=4194304", "--buffer-bytes=8388608"]
    with Cluster(tmp_path, {"llama": model}, workers=0, flags=bounds) as cluster, Proxy(cluster.address) as proxy:
        worker = cluster.start_worker("a", via=proxy.address)
        cluster.await_workers(1)
        with cluster.client() as client:
            client.fine_tuning.jobs.wait(_wide(client, interval=1, steps=2).id, timeout=40)
            proxy.rate = 1 << 20
            before = cluster.server.resident_bytes(), worker.resident_bytes()
            job = _wide(client, interval=128, steps=1)  # a step of some 300 MB, at one a second
            until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running")
            end = time.monotonic() + 12
            while time.monotonic() < end:
                grown = [cluster.server.resident_bytes() - before[0], worker.resident_bytes() - before[1]]
                assert max(grown) < 64 << 20, f"server and worker grew by {grown} bytes"
                time.sleep(0.1)
            assert client.fine_tuning.jobs.retrieve(job.id).epoch == 1
            assert [card.status for card in client.workers.list()] == ["attending"]
            client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize("faults", ["twice", "late", "deaf", "twice late deaf"])
def test_a_delta_that_comes_again_is_folded_once(faults: str, troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        for name in troupe.daemons:
            troupe.cluster.misbehave(name, faults)
        job = begin(client, STEPS)
        assert troupe.outcome(client, job) == expected
        assert client.fine_tuning.jobs.retrieve(job.id).epoch == 1
        assert len(folds(log_of(client, job))) == STEPS
        assert [worker.status for worker in client.workers.list()] == ["attending", "attending"]


def _wide(client: Client, *, interval: int, steps: int) -> Job:
    """A job of a few MB a batch."""
    return submit(
        client,
        rows=texts(512),
        adapter={"target_modules": "all-linear"},
        hyperparameters={"max_steps": steps, "batch_size": 64, "adaptation_interval": interval},
        wire={"rows": "all", "values": "fp32"},
    )


def _rests(troupe: Troupe, job: str) -> bool:
    """Whether a job takes no step for a while."""
    with troupe.cluster.client() as client:
        step = client.fine_tuning.jobs.retrieve(job).step
        time.sleep(0.5)
        return client.fine_tuning.jobs.retrieve(job).step == step
