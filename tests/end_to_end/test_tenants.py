"""Two tenants on one server: each has its own jobs, its own bounds, and the token that says which they are."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_common.client import Client
from cola_common.errors import ColaError, Reason
from tests.end_to_end.jobs import finish, submit, until
from tests.support.cluster import Cluster

TOKENS = {"default": "operator-token-0123456789", "small": "small-token-0123456789", "large": "large-token-0123456789"}
WORKER = "worker-token-0123456789"
FILE = f"""
client = "{TOKENS["default"]}"
worker = "{WORKER}"
[tenants.small]
token = "{TOKENS["small"]}"
max_running = 1
max_queued = 3
[tenants.large]
token = "{TOKENS["large"]}"
weight = 4.0
"""


@pytest.fixture(scope="module")
def cluster(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("tenants")
    (root / "tokens.toml").write_text(FILE)
    (root / "worker.token").write_text(WORKER)
    flags = [f"--token-file={root / 'tokens.toml'}"]
    with Cluster(root, {"llama": models["llama"]}, workers=0, flags=flags) as cluster:
        yield cluster


def client(cluster: Cluster, tenant: str) -> Client:
    return Client(cluster.address, token=TOKENS[tenant])


def test_a_tenants_quota_holds_its_line_moves_up_and_another_is_kept_from_nothing(cluster: Cluster) -> None:
    with client(cluster, "small") as small, client(cluster, "large") as large:
        jobs = [submit(small) for _ in range(3)]  # there is no worker yet: the first one's turn lasts
        with pytest.raises(ColaError) as refused:
            submit(small)
        assert refused.value.reason == Reason.QUOTA_EXCEEDED
        assert "3" in refused.value.message
        retrieve = small.fine_tuning.jobs.retrieve
        until(lambda: retrieve(jobs[0].id).waiting_for_workers)
        until(lambda: [retrieve(job.id).queue_place for job in jobs] == [None, 1, 2])
        assert {job.id: job.queue_place for job in small.fine_tuning.jobs.list()}[jobs[2].id] == 2
        others = [submit(large) for _ in range(2)]
        until(lambda: all(large.fine_tuning.jobs.retrieve(job.id).waiting_for_workers for job in others))
        small.fine_tuning.jobs.pause(jobs[1].id)
        until(lambda: [retrieve(job.id).queue_place for job in jobs] == [None, None, 1])
        small.fine_tuning.jobs.resume(jobs[1].id)
        until(lambda: [retrieve(job.id).queue_place for job in jobs] == [None, 2, 1])
        cluster.start_worker("worker", [f"--token-file={cluster.root / 'worker.token'}"])
        for user, own in ((small, jobs), (large, others)):
            for job in own:
                assert finish(user, job).status == "succeeded"
        ended = [retrieve(job.id).finished_at or 0.0 for job in jobs]
        assert ended[0] < ended[2] < ended[1]
        assert {job.tenant for job in small.fine_tuning.jobs.list()} == {"small"}
        assert [job.id for job in large.fine_tuning.jobs.list()] == [job.id for job in others[::-1]]


def test_nothing_can_be_made_of_what_another_has(cluster: Cluster) -> None:
    with client(cluster, "large") as large, client(cluster, "default") as other:
        job = large.fine_tuning.jobs.list().data[0]
        checkpoint = large.fine_tuning.jobs.checkpoints.list(job.id).data[0]
        with pytest.raises(ColaError) as refused:
            other.fine_tuning.jobs.create(model="llama", training_file=job.spec.training_file)
        assert refused.value.reason == Reason.UNKNOWN_FILE
        with pytest.raises(ColaError) as refused:
            submit(other, adapter={"init_from": checkpoint.id})
        assert refused.value.reason == Reason.UNKNOWN_CHECKPOINT
        assert list(other.fine_tuning.jobs.list()) == []
        assert finish(large, submit(large, adapter={"init_from": checkpoint.id})).status == "succeeded"


def test_a_token_that_was_taken_out_is_good_for_nothing_and_the_tenants_jobs_are_kept(cluster: Cluster) -> None:
    with client(cluster, "small") as small:
        before = [job.id for job in small.fine_tuning.jobs.list()]
    file = cluster.root / "tokens.toml"
    file.write_text(FILE.replace(TOKENS["small"], "another-token-0123456789"))
    cluster.server.stop()
    cluster.start_server()
    with client(cluster, "small") as small, pytest.raises(ColaError) as refused:
        small.fine_tuning.jobs.list()
    assert refused.value.reason == Reason.UNAUTHENTICATED
    with Client(cluster.address, token="another-token-0123456789") as small:
        assert [job.id for job in small.fine_tuning.jobs.list()] == before
