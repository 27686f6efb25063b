"""Jobs that run at once on one base model: none changes another's bits, and the line lets in as many as it should."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cola_common.client import Client
from cola_common.jobs import Job
from tests.end_to_end.jobs import finish, submit, texts, until, weights
from tests.support.cluster import Cluster

STEPS = 40
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, merged": {"fold": "merged"},
    "another lora, merged": {"fold": "merged", "seed": 7, "adapter": {"r": 3}},
    "linear, merged": {"fold": "merged", "adapter": {"type": "linear"}},
    "mlp": {"adapter": {"type": "mlp", "hidden_sizes": [5]}},
    "lora, merged, with validation": {"fold": "merged", "validation": True},
}


def start(client: Client, kind: str) -> Job:
    fields = dict(KINDS[kind])
    if fields.pop("validation", False):
        held_out = client.files.create(file=("held-out.jsonl", texts(6, seed=1)), purpose="fine-tune")
        fields["validation_file"] = held_out.id
    hyperparameters = {"max_steps": STEPS, "batch_size": 4, "optimizer": "adamw", "learning_rate": 0.01}
    return submit(client, rows=texts(32), hyperparameters=hyperparameters, **fields)


def result(client: Client, job: Job, folder: Path) -> tuple[list[object], bytes]:
    done = finish(client, job)
    assert done.status == "succeeded", done.error
    metrics = client.fine_tuning.jobs.metrics(job.id)
    return [(m.step, m.train_loss, m.valid_loss, m.grad_norm) for m in metrics], weights(client, job, folder)


def test_jobs_that_run_at_once_have_the_bits_that_each_has_alone(whole: Cluster, tmp_path: Path) -> None:
    """Merged beside unmerged: whoever computes must find its own weights in the base, and leave the base as it was."""
    with whole.client() as client:
        alone = {kind: result(client, start(client, kind), tmp_path / f"alone, {kind}") for kind in KINDS}
        assert len({adapter for _, adapter in alone.values()}) == len(KINDS) - 1  # validation changes no weight
        jobs = {kind: start(client, kind) for kind in KINDS}
        together = {kind: result(client, job, tmp_path / kind) for kind, job in jobs.items()}
        for kind in KINDS:
            assert together[kind] == alone[kind], kind
        done = [client.fine_tuning.jobs.retrieve(job.id) for job in jobs.values()]
        assert max(job.started_at or 0 for job in done) < min(job.finished_at or 0 for job in done), "not at once"


@pytest.fixture
def single(models: dict[str, Path], tmp_path: Path) -> Iterator[Cluster]:
    """A server that runs one job at a time."""
    with Cluster(tmp_path, {"llama": models["llama"]}, workers=1, flags=["--max-running-jobs=1"]) as cluster:
        yield cluster


def test_one_at_a_time_they_also_finish_in_the_order_in_which_they_came(single: Cluster) -> None:
    with single.client() as client:
        jobs = [submit(client) for _ in range(3)]
        done = [finish(client, job) for job in jobs]
        for earlier, later in itertools.pairwise(done):
            assert 0 < (earlier.finished_at or 0) <= (later.started_at or 0)

        long = submit(client, hyperparameters={"max_steps": 2000, "lr_scheduler_type": "constant"})
        until(lambda: client.fine_tuning.jobs.retrieve(long.id).step > 2)
        waiting = submit(client)
        until(lambda: client.fine_tuning.jobs.retrieve(waiting.id).status == "queued")
        step = client.fine_tuning.jobs.retrieve(long.id).step
        until(lambda: client.fine_tuning.jobs.retrieve(long.id).step > step + 5)
        assert client.fine_tuning.jobs.retrieve(waiting.id).status == "queued"
        client.fine_tuning.jobs.pause(long.id)
        assert finish(client, waiting).status == "succeeded"
        assert client.fine_tuning.jobs.retrieve(long.id).status == "paused"
