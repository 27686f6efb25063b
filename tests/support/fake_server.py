"""The client's side of the protocol, served from memory: what the SDK and the `cola` command are tested against.

It keeps to the protocol and knows none of the real server's rules. Tests tell it what jobs do, and what goes wrong.
"""

import asyncio
import hashlib
import math
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import xxhash

from cola_common import convert, ids
from cola_common.errors import ColaError, Reason
from cola_common.jobs import (
    Checkpoint,
    Estimate,
    FileObject,
    Job,
    JobEvent,
    JobFailure,
    JobSpec,
    JobStatus,
    ModelCard,
    StepMetrics,
    WirePlan,
    WorkerCard,
    check_transition,
)
from cola_common.rpc.auth import CLIENT, Access, Holder, TokenAuth
from cola_common.rpc.limits import SERVER_OPTIONS
from cola_common.rpc.status import translated
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

START = 1_790_000_000.0  # this server's clock begins here
PAGE = 3  # records a page where the caller leaves it to the server
PLAN = WirePlan(
    rows="exact",
    values="fp32",
    deltas="fp32",
    sketch_rows=0,
    max_error=0.0,
    error=0.0,
    reason="nothing is lost; 0.11 s of each step on the wire, 0.84 s in the model",
)


@dataclass
class State:
    """Everything that the server holds, and the faults that are to come. It outlives a restart."""

    files: dict[str, FileObject] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    events: dict[str, list[JobEvent]] = field(default_factory=dict)
    metrics: dict[str, dict[int, StepMetrics]] = field(default_factory=dict)
    checkpoints: dict[str, list[Checkpoint]] = field(default_factory=dict)
    adapters: dict[str, list[checkpoints_pb2.CheckpointChunk]] = field(default_factory=dict)
    models: list[ModelCard] = field(default_factory=list)
    workers: list[WorkerCard] = field(default_factory=list)
    estimate: Estimate = field(
        default_factory=lambda: Estimate(
            examples=1000,
            total_steps=250,
            trainable_parameters=460_800,
            server_bytes=52_000_000,
            server_limit_bytes=16_000_000_000,
            adapter_bytes=1_843_200,
            capture_bytes=41_287_680,
            pass_bytes=1_019_373_568,
            worker_bytes=60_000_000,
            snapshot_bytes=5_529_600,
            sent_bytes=14_200_000,
            received_bytes=1_843_200,
            seconds=None,
            wire_plan=PLAN,
        )
    )
    estimated: list[JobSpec] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[Reason]] = field(default_factory=dict)
    """Method -> what its next calls fail with, after all of their work is done, as if the answer had been lost."""
    break_events_after: int | None = None
    """Every stream of events breaks after so many of them."""
    largest_file: int = 1 << 30
    flip_uploads: bool = False
    """The first byte of what is uploaded changes on its way."""
    clock: float = START

    def tick(self, seconds: float = 0.001) -> float:
        self.clock += seconds
        return self.clock

    def event(self, job: str, message: str, **fields: Any) -> None:
        known = self.events[job]
        known.append(JobEvent(id=len(known) + 1, job=job, created_at=self.tick(), message=message, **fields))

    def become(self, job: str, status: JobStatus, **fields: Any) -> Job:
        """Moves a job to a status and tells of it, as a status event whose text is the status."""
        check_transition(job, self.jobs[job].status, status)
        if status is JobStatus.RUNNING and self.jobs[job].started_at is None:
            fields["started_at"] = self.tick()
        if status.terminal:
            fields["finished_at"] = self.tick()
        # The event first: a stream ends when the job has, and is to hold this event then.
        self.event(job, f"The job is {status.value}.", type="status", level="error" if status == "failed" else "info")
        self.jobs[job] = self.jobs[job].model_copy(update={"status": status, **fields})
        return self.jobs[job]

    def step(self, job: str, seconds: float = 0.12, **fields: Any) -> StepMetrics:
        """Runs one step of a job: a loss that falls, parts that overlap, records as the real server keeps them."""
        known = self.metrics[job]
        record = step_metrics(len(known) + 1, created_at=self.tick(seconds), seconds=seconds, **fields)
        known[record.step] = record
        tokens = self.jobs[job].trained_tokens + record.tokens
        self.jobs[job] = self.jobs[job].model_copy(update={"step": record.step, "trained_tokens": tokens})
        data: dict[str, float | str] = {"step": record.step, "train_loss": record.train_loss}
        self.event(job, f"Step {record.step}: training loss={record.train_loss:.4f}", type="metrics", data=data)
        return record

    def fail(self, job: str) -> None:
        error = JobFailure(code=Reason.NON_FINITE_LOSS, message="the loss of step 7 is not finite")
        self.become(job, JobStatus.FAILED, error=error)

    def checkpoint(self, job: str, files: dict[str, bytes], chunk_bytes: int = 1000) -> Checkpoint:
        """A checkpoint of the job's step, with these files."""
        record = Checkpoint(
            id=ids.new("ftckpt"),
            job=job,
            step_number=self.jobs[job].step,
            created_at=self.tick(),
            metrics={"train_loss": 2.25},
            digest=hashlib.sha256(files[max(files)]).hexdigest(),
        )
        self.checkpoints[job].append(record)
        self.adapters[record.id] = [
            chunk(name, content, offset, content[offset : offset + chunk_bytes])
            for name, content in files.items()
            for offset in range(0, max(len(content), 1), chunk_bytes)
        ]
        return record


def chunk(name: str, content: bytes, offset: int, data: bytes) -> checkpoints_pb2.CheckpointChunk:
    return checkpoints_pb2.CheckpointChunk(
        path=name, file_bytes=len(content), offset=offset, data=data, checksum=xxhash.xxh3_64_intdigest(data)
    )


def step_metrics(step: int, *, created_at: float, seconds: float = 0.12, **fields: Any) -> StepMetrics:
    noise = math.sin(12.9898 * step)
    values: dict[str, Any] = {
        "step": step,
        "epoch": 1,
        "train_loss": 1.6 + 2.4 * math.exp(-step / 60) + 0.15 * noise,
        "learning_rate": 1e-3 * max(1 - step / 500, 0),
        "grad_norm": 0.9 + 0.2 * noise,
        "tokens": 480,
        "target_tokens": 470,
        "created_at": created_at,
        "seconds": seconds,
        "model_seconds": 0.70 * seconds,
        "reduce_seconds": 0.03 * seconds,
        "encode_seconds": 0.08 * seconds,
        "wire_seconds": 0.12 * seconds,
        "worker_seconds": 0.15 * seconds,
        "decode_seconds": 0.02 * seconds,
        "fold_seconds": 0.01 * seconds,
        "sent_bytes": 14_200_000,
        "received_bytes": 921_600,
        "rows": 28_800,
        "sent_rows": 480,
        "raw_bytes": 132_710_400,
        "raw_delta_bytes": 1_843_200,
    }
    return StepMetrics.model_validate(values | fields)


class _Service:
    def __init__(self, state: State) -> None:
        self.state = state

    def done(self, method: str) -> None:
        """Counts a call; raises the fault that is planned for it."""
        self.state.calls[method] += 1
        planned = self.state.faults.get(method)
        if planned:
            reason = planned.pop(0)
            problem = {"address": "the server", "problem": "a planned fault"} if reason == Reason.UNAVAILABLE else {}
            raise ColaError(reason, **problem)


class _Files(_Service, files_pb2_grpc.FilesServicer):
    async def Create(self, request_iterator: Any, context: Any) -> Any:
        async with translated(context):
            header = (await anext(request_iterator)).header
            content = b""
            async for request in request_iterator:
                content += request.chunk
                if len(content) > self.state.largest_file:
                    raise ColaError(Reason.FILE_TOO_LARGE, file=header.filename, limit=self.state.largest_file)
            if self.state.flip_uploads:
                content = bytes([content[0] ^ 1]) + content[1:]
            known = self.state.keys.get(header.idempotency_key)
            if known is None:
                known = self.state.keys[header.idempotency_key] = ids.new("file")
                self.state.contents[known] = content
                self.state.files[known] = FileObject(
                    id=known,
                    filename=header.filename,
                    purpose=header.purpose,
                    bytes=len(content),
                    created_at=self.state.tick(),
                    digest=hashlib.sha256(content).hexdigest(),
                )
            self.done("Files.Create")
            return convert.file_to_wire(self.state.files[known])

    async def Retrieve(self, request: Any, context: Any) -> Any:
        async with translated(context):
            self.done("Files.Retrieve")
            return convert.file_to_wire(self._file(request.id))

    async def List(self, request: Any, context: Any) -> Any:
        async with translated(context):
            self.done("Files.List")
            data, more = _page(list(self.state.files.values()), request.after, request.limit)
            return files_pb2.ListFilesResponse(data=[convert.file_to_wire(file) for file in data], has_more=more)

    async def Delete(self, request: Any, context: Any) -> Any:
        async with translated(context):
            self._file(request.id)
            del self.state.files[request.id]
            self.done("Files.Delete")
            return files_pb2.DeleteFileResponse()

    async def Content(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with translated(context):
            self._file(request.id)
            content = self.state.contents[request.id]
            for start in range(0, len(content), 100_000):
                yield files_pb2.FileChunk(data=content[start : start + 100_000])
            self.done("Files.Content")

    def _file(self, file_id: str) -> FileObject:
        if file_id not in self.state.files:
            raise ColaError(Reason.UNKNOWN_FILE, file=file_id)
        return self.state.files[file_id]


class _Jobs(_Service, jobs_pb2_grpc.JobsServicer):
    async def Create(self, request: Any, context: Any) -> Any:
        async with translated(context):
            spec = convert.spec_from_wire(request.spec)
            known = self.state.keys.get(request.idempotency_key)
            if known is None:
                if spec.model not in [model.id for model in self.state.models]:
                    names = ", ".join(model.id for model in self.state.models)
                    raise ColaError(Reason.UNKNOWN_MODEL, model=spec.model, known=names)
                known = self.state.keys[request.idempotency_key] = ids.new("ftjob")
                self.state.jobs[known] = Job(
                    id=known, created_at=self.state.tick(), status=JobStatus.QUEUED, spec=spec, total_steps=200
                )
                self.state.events[known] = []
                self.state.metrics[known] = {}
                self.state.checkpoints[known] = []
                self.state.event(known, "The job is queued.", type="status")
            self.done("Jobs.Create")
            return convert.job_to_wire(self.state.jobs[known])

    async def Estimate(self, request: Any, context: Any) -> Any:
        async with translated(context):
            spec = convert.spec_from_wire(request.spec)
            self.state.estimated.append(spec)
            self.done("Jobs.Estimate")
            return convert.estimate_to_wire(self.state.estimate)

    async def Retrieve(self, request: Any, context: Any) -> Any:
        async with translated(context):
            self.done("Jobs.Retrieve")
            return convert.job_to_wire(self._job(request.id))

    async def List(self, request: Any, context: Any) -> Any:
        async with translated(context):
            self.done("Jobs.List")
            data, more = _page(list(self.state.jobs.values()), request.after, request.limit)
            return jobs_pb2.ListJobsResponse(data=[convert.job_to_wire(job) for job in data], has_more=more)

    async def Cancel(self, request: Any, context: Any) -> Any:
        return await self._become(request, context, "Jobs.Cancel", JobStatus.CANCELLED)

    async def Pause(self, request: Any, context: Any) -> Any:
        return await self._become(request, context, "Jobs.Pause", JobStatus.PAUSED)

    async def Resume(self, request: Any, context: Any) -> Any:
        return await self._become(request, context, "Jobs.Resume", JobStatus.QUEUED)

    async def _become(self, request: Any, context: Any, method: str, status: JobStatus) -> Any:
        async with translated(context):
            if self._job(request.id).status is not status:  # again is no error
                self.state.become(request.id, status)
            self.done(method)
            return convert.job_to_wire(self.state.jobs[request.id])

    async def ListEvents(self, request: Any, context: Any) -> Any:
        async with translated(context):
            self._job(request.job)
            self.done("Jobs.ListEvents")
            later = [event for event in self.state.events[request.job] if event.id > request.after]
            limit = request.limit or PAGE
            data = [convert.event_to_wire(event) for event in later[:limit]]
            return jobs_pb2.ListJobEventsResponse(data=data, has_more=len(later) > limit)

    async def StreamEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with translated(context):
            self._job(request.job)
            self.done("Jobs.StreamEvents")
            sent, told = request.after, 0
            while True:
                over = self.state.jobs[request.job].status.terminal
                for event in self.state.events[request.job][sent:]:
                    if told == self.state.break_events_after:
                        raise ColaError(Reason.SERVER_DRAINING)
                    yield convert.event_to_wire(event)
                    sent, told = event.id, told + 1
                if over:
                    return
                await asyncio.sleep(0.005)

    async def Metrics(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with translated(context):
            self._job(request.job)
            for step, record in sorted(self.state.metrics[request.job].items()):
                if step > request.after_step:
                    yield convert.metrics_to_wire(record)
            self.done("Jobs.Metrics")

    def _job(self, job_id: str) -> Job:
        if job_id not in self.state.jobs:
            raise ColaError(Reason.UNKNOWN_JOB, job=job_id)
        return self.state.jobs[job_id]


class _Checkpoints(_Service, checkpoints_pb2_grpc.CheckpointsServicer):
    async def List(self, request: Any, context: Any) -> Any:
        async with translated(context):
            self.done("Checkpoints.List")
            if request.job not in self.state.jobs:
                raise ColaError(Reason.UNKNOWN_JOB, job=request.job)
            data, more = _page(self.state.checkpoints[request.job], request.after, request.limit)
            found = [convert.checkpoint_to_wire(checkpoint) for checkpoint in data]
            return checkpoints_pb2.ListCheckpointsResponse(data=found, has_more=more)

    async def Download(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with translated(context):
            if request.id not in self.state.adapters:
                raise ColaError(Reason.UNKNOWN_CHECKPOINT, checkpoint=request.id)
            for part in self.state.adapters[request.id]:
                yield part
            self.done("Checkpoints.Download")


class _Models(_Service, models_pb2_grpc.ModelsServicer):
    async def List(self, request: Any, context: Any) -> Any:
        async with translated(context):
            self.done("Models.List")
            return models_pb2.ListModelsResponse(data=[convert.model_to_wire(model) for model in self.state.models])


class _Workers(_Service, workers_pb2_grpc.WorkersServicer):
    async def List(self, request: Any, context: Any) -> Any:
        async with translated(context):
            self.done("Workers.List")
            data = [convert.worker_to_wire(worker) for worker in self.state.workers]
            return workers_pb2.ListWorkersResponse(data=data)

    async def Drain(self, request: Any, context: Any) -> Any:
        async with translated(context):
            for place, worker in enumerate(self.state.workers):
                if worker.id == request.id and worker.status != "lost":
                    drained = self.state.workers[place] = worker.model_copy(update={"status": "draining"})
                    self.done("Workers.Drain")
                    return convert.worker_to_wire(drained)
            raise ColaError(Reason.UNKNOWN_WORKER, worker=request.id)


def _page(records: list[Any], after: str, limit: int) -> tuple[list[Any], bool]:
    start = [record.id for record in records].index(after) + 1 if after else 0
    end = start + (limit or PAGE)
    return records[start:end], end < len(records)


@dataclass
class Running:
    """A server that runs on a thread of its own, until the context manager that made it ends."""

    state: State
    address: str
    _loop: asyncio.AbstractEventLoop
    _server: grpc.aio.Server
    _token: str | None

    def stop(self) -> None:
        """Ends the server as a crash would: at once, all streams broken."""
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result()

    def start_again(self) -> None:
        """A new server at the same address, with the same state."""
        self._server, _ = asyncio.run_coroutine_threadsafe(
            _start(self.state, self._token, self.address), self._loop
        ).result()


async def _start(state: State, token: str | None, address: str) -> tuple[grpc.aio.Server, str]:
    interceptors = [TokenAuth(Access({token: Holder(CLIENT)}))] if token is not None else []
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
    files_pb2_grpc.add_FilesServicer_to_server(_Files(state), server)
    jobs_pb2_grpc.add_JobsServicer_to_server(_Jobs(state), server)
    checkpoints_pb2_grpc.add_CheckpointsServicer_to_server(_Checkpoints(state), server)
    models_pb2_grpc.add_ModelsServicer_to_server(_Models(state), server)
    workers_pb2_grpc.add_WorkersServicer_to_server(_Workers(state), server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, f"127.0.0.1:{port}"


@contextmanager
def running(token: str | None = None) -> Iterator[Running]:
    """A server with one model and two workers. Its state may be read and changed from the test's own thread."""
    state = State(
        models=[
            ModelCard(
                id="tiny",
                task="causal-lm",
                dtype="bf16",
                device="cuda:0",
                parameters=134_515_008,
                busy_seconds=30.0,
                waiting_seconds=10.0,
                jobless_seconds=60.0,
            )
        ],
        workers=[
            WorkerCard(
                id=f"wkr-{number:024x}",
                status=status,
                cores=8,
                memory_bytes=33_554_432_000,
                device="cpu",
                gflops=412.0,
                shards=shards,
                last_seen=START,
            )
            for number, status, shards in ((1, "attending", 30), (2, "lost", 0))
        ],
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server, address = asyncio.run_coroutine_threadsafe(_start(state, token, "127.0.0.1:0"), loop).result()
        served = Running(state, address, loop, server, token)
        yield served
        served.stop()
        del server, served  # gRPC's objects end on the loop that they were made on
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
