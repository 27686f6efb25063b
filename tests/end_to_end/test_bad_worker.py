"""A worker that sends something else than what it was assigned harms no job and is found out.

The rogue gets the job first. Its answer is refused by name, the job goes back to its last snapshot, or its start, and
on to an honest worker, and the adapter is the one of a run that the rogue had no part in.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.messages import Delta, Refusal, Snapshot
from cola_common.tensor import decode, encode
from tests.end_to_end.jobs import courses, finish, messages, submit, until, weights
from tests.support.cluster import Cluster
from tests.support.rogue import Rogue, replace_first


def wrong_dtype(delta: Delta) -> Delta:
    return dataclasses.replace(delta, tensors=tuple(encode(decode(t), "bf16") for t in delta.tensors))


def wrong_shape(delta: Delta) -> Delta:
    rows, columns = delta.tensors[0].shape
    return replace_first(delta, shape=(columns, rows))


def wrong_bytes(delta: Delta) -> Delta:
    return replace_first(delta, data=bytes(delta.tensors[0].nbytes))


def not_a_number(delta: Delta) -> Delta:
    poison = decode(delta.tensors[0])
    poison[0, 0] = torch.nan
    return dataclasses.replace(delta, tensors=(encode(poison, "fp32"), *delta.tensors[1:]))


def other_values(delta: Delta) -> Delta:
    twice = tuple(encode(2 * decode(t) + 1, "fp32") for t in delta.tensors)
    return dataclasses.replace(delta, tensors=twice)


def foreign_shard(delta: Delta) -> Delta:
    return dataclasses.replace(delta, names=((99, "A"), *delta.names[1:]))


def huge(delta: Delta) -> Delta:
    return dataclasses.replace(delta, tensors=(encode(torch.zeros(2, 1 << 21), "fp32"), *delta.tensors[1:]))


def false_alarm(delta: Delta) -> Refusal:
    error = ColaError(Reason.NON_FINITE_GRADIENT, site="nowhere", step=delta.step)
    return Refusal(delta.job, delta.epoch, delta.step, error.reason, error.message)


@pytest.fixture(scope="module")
def cluster(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("bad-worker"), models, workers=1) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("corrupt", "told"),
    [
        (wrong_dtype, "bf16"),
        (wrong_shape, "instead of fp32"),
        (wrong_bytes, "checksum"),
        (not_a_number, "not finite"),
        (other_values, "different parameters"),
        (foreign_shard, "does not own"),
        (huge, "at most"),
        (false_alarm, "not finite"),
    ],
)
def test_its_answer_is_refused_by_name_and_the_job_goes_on_elsewhere(
    corrupt: Callable[[Delta], Delta | Refusal], told: str, cluster: Cluster, tmp_path: Path
) -> None:
    with cluster.client() as client:
        undisturbed = finish(client, submit(client))
        with Rogue(cluster.address, tmp_path, corrupt) as rogue:
            job = finish(client, submit(client))
            until(lambda: rogue.end is not None)
        assert job.status == "succeeded", job.error
        assert job.epoch == 2
        (blame,) = [m for m in messages(client, job) if m.startswith(f"Worker {rogue.worker}, step ")]
        assert told in blame
        before, after = courses(client, job)
        assert after[0] <= len(before) + 1 and after[-1] == 4
        assert weights(client, job, tmp_path / "a") == weights(client, undisturbed, tmp_path / "b")
        status = {worker.id: worker.status for worker in client.workers.list()}
        assert status.pop(rogue.worker) == "quarantined"
        assert "attending" in status.values()


def foreign_half(half: Snapshot) -> Snapshot:
    return dataclasses.replace(half, digests=((99, "0" * 32),))


def other_state(half: Snapshot) -> Snapshot:
    first = next(i for i, tensor in enumerate(half.tensors) if tensor.shape)
    twice = encode(2 * decode(half.tensors[first]) + 1, "fp32")
    return dataclasses.replace(half, tensors=(*half.tensors[:first], twice, *half.tensors[first + 1 :]))


def false_digest(half: Snapshot) -> Snapshot:
    return dataclasses.replace(half, digests=tuple((index, "0" * 32) for index, _ in half.digests))


@pytest.mark.parametrize(
    ("corrupt", "told"),
    [(foreign_half, "other shards"), (other_state, "different parameters"), (false_digest, "different parameters")],
)
def test_its_half_of_a_snapshot_is_refused_by_name_and_the_job_goes_on_elsewhere(
    corrupt: Callable[[Snapshot], Snapshot], told: str, cluster: Cluster, tmp_path: Path
) -> None:
    """The optimizer's state is nothing that a delta shows."""
    many = {"max_steps": 30, "optimizer": "adamw"}
    with cluster.client() as client:
        undisturbed = finish(client, submit(client, hyperparameters=many))
        with Rogue(cluster.address, tmp_path, lambda delta: delta, corrupt) as rogue:
            job = finish(client, submit(client, hyperparameters=many))
            until(lambda: rogue.end is not None)
        assert job.status == "succeeded", job.error
        assert job.epoch == 2
        (blame,) = [m for m in messages(client, job) if m.startswith(f"Worker {rogue.worker}, step ")]
        assert told in blame
        assert weights(client, job, tmp_path / "a") == weights(client, undisturbed, tmp_path / "b")
        status = {worker.id: worker.status for worker in client.workers.list()}
        assert status[rogue.worker] == "quarantined"


def test_a_job_that_fails_on_two_workers_is_at_fault_and_both_are_cleared(cluster: Cluster, tmp_path: Path) -> None:
    with (
        cluster.client() as client,
        Rogue(cluster.address, tmp_path / "one", false_alarm) as one,
        Rogue(cluster.address, tmp_path / "two", false_alarm) as two,
    ):
        job = finish(client, submit(client))
        assert job.error is not None and job.error.code == Reason.NON_FINITE_GRADIENT
        status = {worker.id: worker.status for worker in client.workers.list()}
        assert status[one.worker] == status[two.worker] == "attending"


def test_a_stream_that_breaks_the_protocol_is_ended_and_the_server_serves_on(cluster: Cluster, tmp_path: Path) -> None:
    def break_off(delta: Delta) -> Delta:
        raise ColaError(Reason.INTERNAL, problem="gone in mid-step")

    with cluster.client() as client, Rogue(cluster.address, tmp_path, break_off) as rogue:
        job = finish(client, submit(client))
        assert job.status == "succeeded" and job.epoch == 2
        assert any(rogue.worker in m and "is lost" in m for m in messages(client, job))
