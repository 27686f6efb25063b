"""Joint files and collaborations: what is refused at create, who is in a group, and that a lost member breaks it."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cola_common.errors import ColaError, Reason
from cola_common.jobs import Job, JobSpec, JobStatus
from tests.server.test_service import LABELLED, TEXTS, Server
from tests.support.databases import new_store


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    new_store(tmp_path).close()
    server = Server(tmp_path)
    yield server
    server.stop()


def refused(server: Server, spec: JobSpec, tenant: str = "default") -> ColaError:
    jobs = server.store.jobs()
    with pytest.raises(ColaError) as error:
        server.service.of(tenant).create(spec)
    assert server.store.jobs() == jobs
    return error.value


# --- joint files ----------------------------------------------------------------------------------------------------


def test_joint_files_are_looked_at_as_the_training_file_is(server: Server) -> None:
    good, labelled = server.upload(TEXTS), server.upload(LABELLED, "labelled.jsonl")
    missing = "file-" + "0" * 24
    assert refused(server, server.spec(joint_files=[good, missing])).reason == Reason.UNKNOWN_FILE
    error = refused(server, server.spec(joint_files=[good, labelled]))
    assert (error.reason, error.details["file"]) == (Reason.INVALID_DATASET, "labelled.jsonl")
    job = server.service.create(server.spec(joint_files=[good, good]))
    for file in (job.spec.training_file, good):
        with pytest.raises(ColaError) as kept:
            server.service.delete_file(file)
        assert kept.value.reason == Reason.FILE_IN_USE


def test_another_tenants_file_cannot_be_joined(server: Server) -> None:
    service = server.service.of("other")
    with service.upload("theirs.jsonl", "fine-tune") as upload:
        upload.write(b'{"text": "a"}')
        theirs = upload.finish().id
    assert refused(server, server.spec(joint_files=[theirs])).reason == Reason.UNKNOWN_FILE


def test_labels_are_those_of_all_files_together(server: Server) -> None:
    """Each user of a joint job may have seen one class alone."""
    parts = [server.upload([{"text": "a", "label": label}], f"{label}.jsonl") for label in ("x", "y", 3)]
    make = {"model": "minilm", "training_file": parts[0]}
    assert refused(server, server.spec(**make)).reason == Reason.INVALID_DATASET
    assert refused(server, server.spec(**make, joint_files=parts[:1])).reason == Reason.INVALID_DATASET
    error = refused(server, server.spec(**make, joint_files=parts[1:]))
    assert (error.details["file"], "integers" in error.message) == ("3.jsonl", True)
    assert server.service.create(server.spec(**make, joint_files=parts[1:2], validation_file=parts[1]))


# --- collaborations -------------------------------------------------------------------------------------------------


def member(server: Server, tenant: str = "default", **fields: Any) -> Job:
    return server.service.of(tenant).create(member_spec(server, tenant, **fields))


def member_spec(server: Server, tenant: str = "default", *, group: str = "g", size: int = 3, **fields: Any) -> JobSpec:
    with server.service.of(tenant).upload("data.jsonl", "fine-tune") as upload:
        upload.write(b'{"text": "a"}')
        file = upload.finish().id
    return server.spec(training_file=file, collaboration={"group": group, "size": size}, **fields)


def test_jobs_join_by_name_in_their_order_and_no_more_than_there_is_room_for(server: Server) -> None:
    first = member(server)
    assert first.group_id == first.id
    others = [member(server) for _ in range(2)]
    assert [job.group_id for job in others] == [first.id] * 2
    assert [job.id for job in server.store.members(others[0].id)] == [first.id, *(job.id for job in others)]
    error = refused(server, member_spec(server))
    assert (error.reason, error.details["param"]) == (Reason.INVALID_JOB, "collaboration.group")
    assert all(job.id in error.message for job in (first, *others))
    assert server.store.members(server.service.create(server.spec()).id) == []


def test_a_group_is_its_tenants(server: Server) -> None:
    first = member(server)
    theirs = member(server, "other")
    assert theirs.group_id == theirs.id
    assert [job.id for job in server.store.members(first.id)] == [first.id]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": 2}, "collaboration.size"),
        ({"model": "smollm2-chat"}, "model"),
        ({"hyperparameters": {"adaptation_interval": 2}}, "hyperparameters.adaptation_interval"),
    ],
)
def test_members_must_agree(server: Server, fields: dict[str, Any], param: str) -> None:
    first = member(server)
    error = refused(server, member_spec(server, **fields))
    assert (error.reason, error.details["param"]) == (Reason.INVALID_JOB, param)
    assert first.id in error.message
    alike = {"adapter": {"type": "mlp"}, "seed": 3, "hyperparameters": {"optimizer": "sgd", "batch_size": 1}}
    assert member(server, **alike).group_id == first.id


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"fold": "merged"}, "fold"),
        ({"collaboration": {"group": "g", "size": 1}}, "collaboration.size"),
        ({"collaboration": {"group": "a b", "size": 2}}, "collaboration.group"),
        ({"collaboration": {"group": "g"}}, "collaboration.size"),
        ({"collaboration": {"group": "g", "size": 2, "name": "g"}}, "collaboration.name"),
    ],
)
def test_a_group_that_cannot_be_is_refused_by_field(server: Server, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ColaError) as error:
        server.spec(**{"collaboration": {"group": "g", "size": 2}} | fields)
    assert error.value.details["param"] == param


def test_jobs_with_heads_of_their_own_cannot_collaborate(server: Server) -> None:
    error = refused(server, server.spec(LABELLED, model="minilm", collaboration={"group": "g", "size": 2}))
    assert (error.reason, error.details["param"]) == (Reason.INVALID_JOB, "collaboration")


def test_a_name_is_free_again_once_all_have_ended(server: Server) -> None:
    jobs = [member(server, size=2) for _ in range(2)]
    for job in jobs:
        assert refused(server, member_spec(server, size=2)).reason == Reason.INVALID_JOB
        server.store.transition(job.id, JobStatus.QUEUED)
        server.store.transition(job.id, JobStatus.SUCCEEDED)
    again = member(server, size=5)
    assert again.group_id == again.id
    assert [job.id for job in server.store.members(jobs[1].id)] == [job.id for job in jobs]


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_a_lost_member_breaks_the_group_in_the_same_commit(server: Server, end: str) -> None:
    statuses = [[], [JobStatus.QUEUED], [JobStatus.QUEUED, JobStatus.PAUSED], [JobStatus.QUEUED, JobStatus.RUNNING]]
    ended, *jobs = [member(server, size=6) for _ in range(6)]
    stranger, other = server.running(), member(server, group="other")
    for job, status in zip(jobs, itertools.chain(statuses, [[JobStatus.QUEUED]]), strict=True):
        for step in status:
            server.store.transition(job.id, step)
    server.store.transition(ended.id, JobStatus.QUEUED)
    server.store.transition(ended.id, JobStatus.SUCCEEDED)
    heard: list[str] = []
    server.service.subscribe(heard.append)
    if end == "cancel":
        server.service.cancel(jobs[-1].id)
    else:
        server.store.transition(jobs[-1].id, JobStatus.FAILED)
    assert heard == [jobs[-1].id, *(job.id for job in jobs[:-1])]
    for job in jobs[:-1]:
        broken = server.store.job(job.id)
        assert (broken.status, broken.finished_at is not None) == ("failed", True)
        assert broken.error is not None
        assert broken.error.code == Reason.GROUP_BROKEN
        assert jobs[-1].id in broken.error.message
        assert broken.error.message in server.service.events(job.id)[-1].message
    assert server.store.job(ended.id).status == "succeeded"
    assert server.store.job(stranger).status == "running"
    assert server.store.job(other.id).status == "validating_files"
    fresh = member(server)
    assert fresh.group_id == fresh.id
