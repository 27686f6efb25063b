"""A tenant sees its own and nothing else: over every call of every service, on a listener with the real rules."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from cola_common import convert, ids
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Checkpoint, JobSpec, JobStatus
from cola_common.messages import Heartbeat
from cola_common.rpc import auth
from cola_common.rpc.auth import Access, Holder, header
from cola_common.rpc.channels import connect
from cola_common.rpc.status import from_rpc
from cola_common.wire import (
    checkpoints_pb2,
    checkpoints_pb2_grpc,
    files_pb2,
    files_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    workers_pb2,
    workers_pb2_grpc,
)
from cola_server.fleet import Fleet, FleetLimits
from cola_server.rpc import Listener, Pending
from tests.server.fleet import hello
from tests.server.test_service import Server
from tests.support.databases import new_store

ACCESS = Access(
    {
        "operators": Holder(auth.OPERATOR),
        "a's": Holder(auth.CLIENT, "a"),
        "b's": Holder(auth.CLIENT, "b"),
    }
)
STUBS: dict[str, tuple[Any, Any]] = {
    "Checkpoints": (checkpoints_pb2, checkpoints_pb2_grpc.CheckpointsStub),
    "Files": (files_pb2, files_pb2_grpc.FilesStub),
    "Jobs": (jobs_pb2, jobs_pb2_grpc.JobsStub),
    "Models": (models_pb2, models_pb2_grpc.ModelsStub),
    "Workers": (workers_pb2, workers_pb2_grpc.WorkersStub),
}


def calls(whose: str) -> set[str]:
    """`Service.Method` of all calls that see objects of that kind, by the one table."""
    found = set()
    for name, (file, _) in STUBS.items():
        for method in file.DESCRIPTOR.services_by_name[name].methods:
            path = f"/cola.v1.{name}/{method.name}"
            if next(whose for start, _, whose in auth.RULES if path.startswith(start)) == whose:
                found.add(f"{name}.{method.name}")
    return found


@dataclass
class Objects:
    """What a tenant has, or nobody."""

    file: str
    job: str
    checkpoint: str

    @property
    def spec(self) -> Message:
        return convert.spec_to_wire(JobSpec(model="smollm2", training_file=self.file))


NOBODYS = Objects(ids.new("file"), ids.new("ftjob"), ids.new("ftckpt"))

# A call that names what another tenant has. A file's upload names nothing: it has a test of its own.
TRIES: dict[str, Callable[[Objects], Message]] = {
    "Checkpoints.List": lambda o: checkpoints_pb2.ListCheckpointsRequest(job=o.job),
    "Checkpoints.Download": lambda o: checkpoints_pb2.DownloadCheckpointRequest(id=o.checkpoint),
    "Files.Retrieve": lambda o: files_pb2.RetrieveFileRequest(id=o.file),
    "Files.List": lambda o: files_pb2.ListFilesRequest(after=o.file),
    "Files.Delete": lambda o: files_pb2.DeleteFileRequest(id=o.file),
    "Files.Content": lambda o: files_pb2.FileContentRequest(id=o.file),
    "Jobs.Create": lambda o: jobs_pb2.CreateJobRequest(spec=o.spec, idempotency_key="new"),
    "Jobs.Estimate": lambda o: jobs_pb2.EstimateJobRequest(spec=o.spec),
    "Jobs.Retrieve": lambda o: jobs_pb2.RetrieveJobRequest(id=o.job),
    "Jobs.List": lambda o: jobs_pb2.ListJobsRequest(after=o.job),
    "Jobs.Cancel": lambda o: jobs_pb2.CancelJobRequest(id=o.job),
    "Jobs.Pause": lambda o: jobs_pb2.PauseJobRequest(id=o.job),
    "Jobs.Resume": lambda o: jobs_pb2.ResumeJobRequest(id=o.job),
    "Jobs.ListEvents": lambda o: jobs_pb2.ListJobEventsRequest(job=o.job),
    "Jobs.StreamEvents": lambda o: jobs_pb2.StreamJobEventsRequest(job=o.job),
    "Jobs.Metrics": lambda o: jobs_pb2.JobMetricsRequest(job=o.job),
}
UNKNOWN = {Reason.UNKNOWN_FILE, Reason.UNKNOWN_JOB, Reason.UNKNOWN_CHECKPOINT}


class World:
    """A server with an ended job of tenant a's, and a way to call it."""

    def __init__(self, server: Server, channel: grpc.aio.Channel) -> None:
        self.server = server
        self._stubs = {name: stub(channel) for name, (_, stub) in STUBS.items()}
        service = server.service.of("a")
        with service.upload("a.jsonl", "fine-tune", "a's key") as upload:
            upload.write(b'{"text": "secret"}')
            file = upload.finish().id
        job = service.create(JobSpec(model="smollm2", training_file=file), "a's key").id
        server.store.transition(job, JobStatus.FAILED, event="It is over.")
        id = ids.new("ftckpt")
        digest = server.artefacts.write_checkpoint(id, write_adapter)
        server.store.add_checkpoint(Checkpoint(id=id, job=job, step_number=1, created_at=1.0, digest=digest))
        self.a = Objects(file, job, id)

    async def call(self, name: str, request: object, token: str | None) -> list[Message] | ColaError:
        """All answers, or the error."""
        service, method = name.split(".")
        made = getattr(self._stubs[service], method)(request, metadata=[] if token is None else [header(token)])
        try:
            return [each async for each in made] if hasattr(made, "__aiter__") else [await made]
        except grpc.aio.AioRpcError as error:
            return from_rpc(error)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    new_store(tmp_path).close()
    server, fleet, backend = Server(tmp_path), Fleet(FleetLimits()), Pending(ACCESS)
    backend.set(server.service)
    fleet.attend(hello())
    listener = Listener(fleet, backend, lambda: Heartbeat(0, 0.0), access=ACCESS, tls_cert=None, tls_key=None)
    async with connect(await listener.start("127.0.0.1:0")) as channel:
        yield World(server, channel)
    await listener.stop(0)
    server.stop()


def test_every_call_about_a_tenants_own_is_tried() -> None:
    assert set(TRIES) == calls(auth.OWN) - {"Files.Create"}


@pytest.mark.parametrize("name", TRIES)
async def test_what_is_anothers_is_answered_as_if_it_never_was(name: str, world: World) -> None:
    before = world.server.store.job(world.a.job), world.server.store.files()
    theirs = await world.call(name, TRIES[name](world.a), "b's")
    nobodys = await world.call(name, TRIES[name](NOBODYS), "b's")
    assert isinstance(theirs, ColaError) and isinstance(nobodys, ColaError)
    assert theirs.reason == nobodys.reason
    assert theirs.reason in UNKNOWN
    assert theirs.status == "NOT_FOUND"
    message = theirs.message
    for field in ("file", "job", "checkpoint"):
        message = message.replace(getattr(world.a, field), getattr(NOBODYS, field))
    assert message == nobodys.message
    assert (world.server.store.job(world.a.job), world.server.store.files()) == before
    own = await world.call(name, TRIES[name](world.a), "a's")
    assert not isinstance(own, ColaError) or own.reason == Reason.ILLEGAL_TRANSITION  # the job has ended
    operators = await world.call(name, TRIES[name](world.a), "operators")
    assert isinstance(operators, ColaError) and operators.reason in UNKNOWN


async def test_lists_are_a_tenants_own(world: World) -> None:
    for name, request in (("Files.List", files_pb2.ListFilesRequest()), ("Jobs.List", jobs_pb2.ListJobsRequest())):
        for token, count in (("a's", 1), ("b's", 0), ("operators", 0)):
            (answer,) = await world.call(name, request, token)
            assert len(answer.data) == count
    (answer,) = await world.call("Jobs.Retrieve", jobs_pb2.RetrieveJobRequest(id=world.a.job), "a's")
    assert answer.tenant == "a"


async def test_a_key_of_anothers_finds_nothing(world: World) -> None:
    async def upload() -> AsyncIterator[Message]:
        yield files_pb2.CreateFileRequest(
            header=files_pb2.CreateFileHeader(filename="a.jsonl", purpose="fine-tune", idempotency_key="a's key")
        )
        yield files_pb2.CreateFileRequest(chunk=b'{"text": "secret"}')

    made = {}
    for token in ("a's", "b's"):
        (file,) = await world.call("Files.Create", upload(), token)
        mine = Objects(file.id, "", "")
        request = jobs_pb2.CreateJobRequest(spec=mine.spec, idempotency_key="a's key")
        (job,) = await world.call("Jobs.Create", request, token)
        made[token] = (file.id, job.id, job.tenant)
    assert made["a's"] == (world.a.file, world.a.job, "a")
    assert made["b's"][0] != world.a.file
    assert made["b's"][1] != world.a.job
    assert made["b's"][2] == "b"


async def test_what_is_the_servers_is_the_same_for_all_and_only_its_operator_drains_workers(world: World) -> None:
    assert calls(auth.SHARED) == {"Models.List", "Workers.List", "Workers.Drain"}
    for name, request in (
        ("Models.List", models_pb2.ListModelsRequest()),
        ("Workers.List", workers_pb2.ListWorkersRequest()),
    ):
        answers = [await world.call(name, request, token) for token in ("a's", "b's", "operators")]
        assert answers[0] == answers[1] == answers[2]
        assert len(answers[0][0].data) > 0
    (workers,) = await world.call("Workers.List", workers_pb2.ListWorkersRequest(), "a's")
    drain = workers_pb2.DrainWorkerRequest(id=workers.data[0].id)
    refused = await world.call("Workers.Drain", drain, "a's")
    assert isinstance(refused, ColaError) and refused.reason == Reason.PERMISSION_DENIED
    (card,) = await world.call("Workers.Drain", drain, "operators")
    assert card.status == "draining"


@pytest.mark.parametrize("name", sorted(calls(auth.OWN) | calls(auth.SHARED)))
async def test_without_a_token_nothing_is_answered(name: str, world: World) -> None:
    async def nothing() -> AsyncIterator[Message]:
        yield files_pb2.CreateFileRequest()

    for token in (None, "forged", "a's "):
        answer = await world.call(name, nothing() if name == "Files.Create" else EMPTY[name](), token)
        assert isinstance(answer, ColaError) and answer.reason == Reason.UNAUTHENTICATED


EMPTY: dict[str, Callable[[], Message]] = {
    **{name: lambda name=name: TRIES[name](NOBODYS) for name in TRIES},
    "Models.List": models_pb2.ListModelsRequest,
    "Workers.List": workers_pb2.ListWorkersRequest,
    "Workers.Drain": workers_pb2.DrainWorkerRequest,
}


def write_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"w")
