"""What a job takes is told before it is made, and holds; what does not fit beside others waits, and what never can is
refused.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_common.client import Client
from cola_common.errors import ColaError, Reason
from tests.end_to_end.jobs import finish, messages, submit, until
from tests.support.cluster import Cluster

ROWS = b"\n".join([b'{"text": "' + b" ".join([b"w1"] * 30) + b'"}'] * 16)
ADAPTER = {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}
LARGE = {"batch_size": 16, "max_length": 64, "max_steps": 20}
COHORT_TOKENS = 16


def test_an_estimate_is_what_the_job_then_takes(whole: Cluster) -> None:
    hyperparameters = {"max_steps": 3, "max_length": 32, "batch_size": 4, "adaptation_interval": 2}
    with whole.client() as client:
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        fields = {"training_file": file.id, "adapter": ADAPTER, "hyperparameters": hyperparameters}
        estimate = client.fine_tuning.jobs.estimate(model="llama", **fields)
        before = client.fine_tuning.jobs.list().data
        job = finish(client, client.fine_tuning.jobs.create(model="llama", **fields))
        assert [j.id for j in client.fine_tuning.jobs.list()][1:] == [j.id for j in before]
        assert job.total_steps == estimate.total_steps == 3
        for step in client.fine_tuning.jobs.metrics(job.id):
            assert (step.sent_bytes, step.received_bytes) == (estimate.sent_bytes, estimate.received_bytes)
        took = client.fine_tuning.jobs.estimate(model="llama", **fields).seconds
        assert took is not None and 0 < took < 60
        (model,) = (card for card in client.models.list() if card.id == "llama")
        assert model.busy_seconds > 0 and model.jobless_seconds > 0 and model.waiting_seconds > 0


def test_an_estimate_refuses_what_create_refuses_and_keeps_no_adapter(whole: Cluster, tmp_path: Path) -> None:
    with whole.client() as client:
        job = finish(client, submit(client))
        (checkpoint, *_) = client.fine_tuning.jobs.checkpoints.list(job.id)
        folder = client.fine_tuning.jobs.checkpoints.download(checkpoint.id, tmp_path / "adapter")
        files = [file.id for file in client.files.list()]
        fields = {"model": "llama", "training_file": job.spec.training_file}
        adapter = {**ADAPTER, "init_from": str(folder)}
        assert client.fine_tuning.jobs.estimate(**fields, adapter=adapter).trainable_parameters > 0
        for wrong, reason in (
            ({"model": "lama"}, Reason.UNKNOWN_MODEL),
            ({"training_file": "file-" + 24 * "0"}, Reason.UNKNOWN_FILE),
            ({"adapter": {**ADAPTER, "r": 1000}}, Reason.RANK_TOO_LARGE),
            ({"adapter": {**adapter, "target_modules": ["nothing"]}}, Reason.UNKNOWN_TARGET),
        ):
            with pytest.raises(ColaError) as refused:
                client.fine_tuning.jobs.estimate(**{**fields, **wrong})
            assert refused.value.reason == reason
        assert [file.id for file in client.files.list()] == files


@pytest.fixture(scope="module")
def narrow(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Client]]:
    """A server with memory for one large job, and not for two."""
    root = tmp_path_factory.mktemp("narrow")
    flags = [f"--cohort-tokens={COHORT_TOKENS}"]
    llama = {"llama": models["llama"]}
    with Cluster(root / "wide", llama, workers=0, flags=flags) as wide, wide.client() as client:
        file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
        estimate = client.fine_tuning.jobs.estimate(
            model="llama", training_file=file, adapter=ADAPTER, hyperparameters=LARGE
        )
    token_bytes = estimate.pass_bytes // (16 * 64)
    memory = COHORT_TOKENS * token_bytes + int(1.5 * estimate.server_bytes)
    flags.append(f"--memory-bytes={memory}")
    with Cluster(root / "narrow", llama, workers=0, flags=flags) as cluster, cluster.client() as client:
        yield cluster, client


def test_what_does_not_fit_beside_another_waits_for_it_with_its_place_shown(narrow: tuple[Cluster, Client]) -> None:
    cluster, client = narrow
    first, second, third = (submit(client, rows=ROWS, adapter=ADAPTER, hyperparameters=LARGE) for _ in range(3))
    small = submit(client, rows=ROWS, adapter=ADAPTER, hyperparameters={"batch_size": 1, "max_length": 16})
    retrieve = client.fine_tuning.jobs.retrieve
    until(lambda: retrieve(first.id).waiting_for_workers)  # it has its place, and keeps it
    until(lambda: [retrieve(job.id).queue_place for job in (second, third, small)] == [1, 2, 3])
    client.fine_tuning.jobs.cancel(second.id)
    until(lambda: [retrieve(job.id).queue_place for job in (third, small)] == [1, 2])
    cluster.start_worker("worker")
    done = [finish(client, job) for job in (first, third, small)]
    assert [job.status for job in done] == ["succeeded"] * 3
    assert done[0].finished_at is not None and done[1].started_at is not None
    assert done[0].finished_at <= done[1].started_at


def test_a_job_that_a_server_with_less_memory_goes_on_with_is_held_and_not_lost(narrow: tuple[Cluster, Client]) -> None:
    cluster, client = narrow
    job = submit(client, rows=ROWS, adapter=ADAPTER, hyperparameters={**LARGE, "max_steps": 4})
    enough = cluster.flags[-1]
    for worker in cluster.workers:
        worker.stop()
    cluster.workers.clear()
    for flag in ("--memory-bytes=1200000", enough):
        cluster.server.stop()
        cluster.flags[-1] = flag
        cluster.start_server()
        if flag != enough:
            until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused")
            assert any("all of it is" in text for text in messages(client, job))
    cluster.start_worker("worker")
    client.fine_tuning.jobs.resume(job.id)
    assert finish(client, job).status == "succeeded"


def test_what_can_never_fit_is_refused_by_name_and_an_estimate_tells_why(narrow: tuple[Cluster, Client]) -> None:
    _, client = narrow
    jobs = [job.id for job in client.fine_tuning.jobs.list()]
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    fields = {
        "model": "llama",
        "training_file": file,
        "adapter": ADAPTER,
        "hyperparameters": {**LARGE, "batch_size": 32},
    }
    estimate = client.fine_tuning.jobs.estimate(**fields)
    assert estimate.server_bytes > estimate.server_limit_bytes
    with pytest.raises(ColaError) as refused:
        client.fine_tuning.jobs.create(**fields)
    assert refused.value.reason == Reason.JOB_TOO_LARGE
    assert str(estimate.server_bytes) in refused.value.message
    assert str(estimate.server_limit_bytes) in refused.value.message
    assert [job.id for job in client.fine_tuning.jobs.list()] == jobs
