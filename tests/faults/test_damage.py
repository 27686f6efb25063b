"""Torn files, a damaged database, another base model: refused by name, or the generation before; never made anew."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cola_common.client import Client
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Job
from tests.end_to_end.jobs import finish, messages, until
from tests.support.cluster import Cluster
from tests.support.models import save_tiny
from tests.support.outcome import begin, log_of, outcome
from tests.support.troupe import FLAGS, Troupe

STEPS = 50


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return save_tiny("llama", tmp_path_factory.mktemp("other") / "llama", seed=1)


@pytest.fixture(scope="module")
def _cluster(model: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    models = {"llama": model, "other": other}
    with Cluster(tmp_path_factory.mktemp("damage"), models, workers=1, flags=FLAGS) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster, model: Path, other: Path) -> Cluster:
    """A server with two models, and a worker."""
    _cluster.models = {"llama": model, "other": other}
    if _cluster.server.process.poll() is not None:
        _cluster.start_server()
    _cluster.await_workers(1)
    return _cluster


def stopped_at(cluster: Cluster, client: Client, step: int) -> Job:
    """A job whose server is killed when it has come so far."""
    job = begin(client, STEPS)
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > step)
    cluster.server.kill()
    return job


def tear(path: Path) -> None:
    """Half of a file is gone, as after a power cut on a disk that lied."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    """One bit of a file's end is another one."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("damage", "generations"), [(flip, 1), (tear, 2)])
def test_a_damaged_snapshot_is_told_by_name_and_the_one_before_it_is_used(
    damage: Callable[[Path], None], generations: int, cluster: Cluster, troupe: Troupe
) -> None:
    with troupe.cluster.client() as well:
        expected = troupe.undisturbed(well, STEPS)
    with cluster.client() as client:
        job = stopped_at(cluster, client, 25)
        newest = sorted((cluster.data / "snapshots" / job.id).glob("*.safetensors"), reverse=True)
        for path in newest[:generations]:
            damage(path)
        cluster.start_server()
        assert outcome(client, finish(client, job), cluster.root / "adapters") == expected
        told = messages(client, job)
        for path in newest[:generations]:
            assert any(path.name in message and "damaged" in message for message in told)
        begun = next(message for message in told if message.startswith(("Going on from", "Starting again")))
        whole = [int(path.name[:10]) for path in newest[generations:]]
        assert begun.startswith(f"Going on from the snapshot after step {whole[0]}." if whole else "Starting again")


def test_a_damaged_file_of_a_worker_is_made_good_from_the_server_s(cluster: Cluster, troupe: Troupe) -> None:
    with troupe.cluster.client() as well:
        expected = troupe.undisturbed(well, STEPS)
    with cluster.client() as client:
        job = begin(client, STEPS)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 15)
        (worker,) = cluster.workers
        worker.kill()
        kept = sorted((cluster.root / "worker-0" / "shards" / job.id).glob("*.safetensors"))
        assert len(kept) == 4
        tear(kept[0])
        flip(kept[1])
        kept[2].unlink()
        cluster.workers.remove(worker)
        again = cluster.start_worker("worker-0")
        assert outcome(client, finish(client, job), cluster.root / "adapters") == expected
        assert again.said().count("is damaged") >= 2


def test_a_damaged_database_is_refused_by_name_and_left_as_it_is(cluster: Cluster) -> None:
    cluster.server.stop()
    database = cluster.data / "cola.db"
    whole = {path: path.read_bytes() for path in cluster.data.glob("cola.db*")}
    tear(database)
    damaged = database.read_bytes()
    cluster.launch_server()
    assert cluster.server.process.wait(40) == 2
    assert "cola.db" in cluster.server.tail().splitlines()[-1]
    assert database.read_bytes() == damaged
    for path, data in whole.items():
        path.write_bytes(data)


def test_a_damaged_upload_fails_its_job_by_name_and_one_that_is_gone_is_told_when_the_server_starts(
    cluster: Cluster,
) -> None:
    with cluster.client() as client:
        held = begin(client, STEPS)
        client.fine_tuning.jobs.pause(held.id)
        job = stopped_at(cluster, client, 15)
        damaged, gone = (cluster.data / "files" / each.spec.training_file for each in (job, held))
        flip(damaged)
        gone.unlink()
        cluster.start_server()
        failed = finish(client, job)
        assert failed.error is not None and failed.error.code == Reason.INVALID_FILE
        assert damaged.name in failed.error.message and "rows.jsonl" in failed.error.message
        assert any(gone.name in line for line in cluster.server.said().splitlines() if "error" in line)
        assert any(gone.name in event.message for event in log_of(client, held) if event.level == "error")
        client.fine_tuning.jobs.cancel(held.id)
        assert finish(client, begin(client, 4)).status == "succeeded"


def test_a_damaged_checkpoint_is_refused_by_name(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.client() as client:
        job = finish(client, begin(client, 20))
        first, last = sorted(client.fine_tuning.jobs.checkpoints.list(job.id), key=lambda each: each.step_number)
        (weights,) = (cluster.data / "checkpoints" / last.id).glob("*.safetensors")
        flip(weights)
        with pytest.raises(ColaError) as refused:
            client.fine_tuning.jobs.checkpoints.download(last.id, tmp_path / "last")
        assert refused.value.reason == Reason.INVALID_FILE and last.id in refused.value.message
        assert not (tmp_path / "last" / weights.name).exists()
        client.fine_tuning.jobs.checkpoints.download(first.id, tmp_path / "first")
        assert (tmp_path / "first" / weights.name).exists()


def test_a_job_is_held_under_another_base_model_of_the_same_name_and_other_jobs_go_on(
    cluster: Cluster, model: Path, other: Path, troupe: Troupe
) -> None:
    with troupe.cluster.client() as well:
        expected = troupe.undisturbed(well, STEPS)
    with cluster.client() as client:
        elsewhere = begin(client, STEPS, model="other")
        job = stopped_at(cluster, client, 15)
        cluster.models["llama"] = other
        cluster.start_server()
        assert finish(client, elsewhere).status == "succeeded"
        assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
        assert any("llama" in e.message and job.id in e.message for e in log_of(client, job) if e.level == "error")
        with pytest.raises(ColaError) as refused:
            client.fine_tuning.jobs.resume(job.id)
        assert refused.value.reason == Reason.BASE_MODEL_CHANGED
        assert "'llama'" in refused.value.message and job.id in refused.value.message
        cluster.server.stop()
        cluster.models["llama"] = model
        cluster.start_server()
        client.fine_tuning.jobs.resume(job.id)
        assert outcome(client, finish(client, job), cluster.root / "adapters") == expected


def test_a_second_server_on_the_data_folder_is_refused_and_the_first_serves_on(cluster: Cluster) -> None:
    first = cluster.server
    cluster.launch_server("127.0.0.1:0")
    try:
        assert cluster.server.process.wait(40) == 2
        assert "is in use by another process" in cluster.server.tail()
    finally:
        cluster.server = first
    with cluster.client() as client:
        assert finish(client, begin(client, 4)).status == "succeeded"
