"""Fine-tuning jobs: create, follow, steer."""

import asyncio
import builtins
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, Unpack, final

from cola_common import ids
from cola_common.client.checkpoints import AsyncCheckpoints
from cola_common.client.connection import (
    PATIENCE_SECONDS,
    Connection,
    new_key,
    page_size,
    part_key,
    pause,
    transient,
)
from cola_common.client.files import AsyncFiles
from cola_common.client.pages import AsyncPage
from cola_common.convert import estimate_from_wire, event_from_wire, job_from_wire, metrics_from_wire, spec_to_wire
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Estimate, Job, JobEvent, JobSpec, JobStatus, StepMetrics
from cola_common.wire import jobs_pb2, types_pb2
from cola_common.wire.jobs_pb2_grpc import JobsStub

OUTAGE_SECONDS = 600.0
"""How long someone who follows a job waits for a server that was there and is gone: time enough to restart it."""

REOPEN_SECONDS = 1.0  # those who follow do not all return in the moment in which a server is back


class JobFields(TypedDict, total=False):
    """What `create` takes; `cola_common.jobs.JobSpec` documents it."""

    model: Required[str]
    training_file: Required[str]
    joint_files: Sequence[str] | None
    validation_file: str | None
    seed: int | None
    suffix: str | None
    metadata: Mapping[str, str] | None
    method: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None
    hyperparameters: Mapping[str, Any] | None
    fold: Literal["unmerged", "merged"] | None
    wire: Mapping[str, Any] | Literal["auto"] | None
    collaboration: Mapping[str, Any] | None


class JobFailedError(Exception):
    """A job that was waited for failed or was cancelled; `job` tells more."""

    def __init__(self, job: Job) -> None:
        self.job = job
        super().__init__(f"job {job.id} {job.status}" + ("" if job.error is None else f": {job.error.message}"))


@final
class AsyncJobs:
    """`client.fine_tuning.jobs`."""

    def __init__(self, connection: Connection, files: AsyncFiles) -> None:
        self._connection = connection
        self._files = files
        self._stub = JobsStub(connection.channel)
        self.checkpoints = AsyncCheckpoints(connection)

    async def create(self, *, idempotency_key: str | None = None, **fields: Unpack[JobFields]) -> Job:
        """Submits a job; `cola_common.jobs.JobSpec` documents the fields, and None is a field's default.

        `adapter["init_from"]` is a checkpoint's id, the id of an uploaded adapter, or the folder of an adapter on this
        machine, which is uploaded first. The same `idempotency_key` finds the same job, even from another process.

        Raises: `ColaError`, such as INVALID_JOB with the wrong field, UNKNOWN_MODEL, UNKNOWN_TARGET and RANK_TOO_LARGE.
        """
        spec, _ = await self._spec(fields, idempotency_key)
        request = jobs_pb2.CreateJobRequest(spec=spec, idempotency_key=idempotency_key or new_key())
        return job_from_wire(await self._connection.call(self._stub.Create, request))

    async def estimate(self, **fields: Unpack[JobFields]) -> Estimate:
        """What such a job would take, in memory, bytes and time. Nothing is made; fields and errors as `create`'s."""
        spec, uploaded = await self._spec(fields, None)
        try:
            request = jobs_pb2.EstimateJobRequest(spec=spec)
            return estimate_from_wire(await self._connection.call(self._stub.Estimate, request))
        finally:
            if uploaded is not None:
                await self._files.delete(uploaded)

    async def _spec(self, fields: JobFields, idempotency_key: str | None) -> tuple[types_pb2.JobSpec, str | None]:
        """A spec as the wire has it, and the id of the adapter that was uploaded for it, if one was."""
        given = {name: value for name, value in fields.items() if value is not None}
        adapter, uploaded = fields.get("adapter"), None
        folder = _adapter_folder(adapter)
        if adapter is not None and folder is not None:
            given["adapter"] = {**adapter, "init_from": str(folder)}
            JobSpec.parse(given)  # a wrong field is told before anything is uploaded
            key = part_key(idempotency_key, "adapter.init_from")
            file = await self._files.create(file=folder, purpose="adapter", idempotency_key=key)
            given["adapter"], uploaded = {**adapter, "init_from": file.id}, file.id
        return spec_to_wire(JobSpec.parse(given)), uploaded

    async def retrieve(self, job_id: str) -> Job:
        """A job as it stands. Raises: `ColaError(UNKNOWN_JOB)`."""
        return await self._retrieve(job_id, patience=PATIENCE_SECONDS)

    async def _retrieve(self, job_id: str, *, patience: float) -> Job:
        request = jobs_pb2.RetrieveJobRequest(id=job_id)
        return job_from_wire(await self._connection.call(self._stub.Retrieve, request, patience=patience))

    async def list(self, *, after: str | None = None, limit: int | None = None) -> AsyncPage[Job]:
        """Jobs, `limit` a page, from behind the job `after`."""
        request = jobs_pb2.ListJobsRequest(after=after, limit=page_size(limit))
        answer = await self._connection.call(self._stub.List, request)
        data = [job_from_wire(job) for job in answer.data]
        if not answer.has_more or not data:
            return AsyncPage(data)
        return AsyncPage(data, lambda: self.list(after=data[-1].id, limit=limit))

    async def cancel(self, job_id: str) -> Job:
        """Ends a job for good; again is no error. Raises: `ColaError(UNKNOWN_JOB)`, `ColaError(ILLEGAL_TRANSITION)`."""
        request = jobs_pb2.CancelJobRequest(id=job_id)
        return job_from_wire(await self._connection.call(self._stub.Cancel, request))

    async def pause(self, job_id: str) -> Job:
        """Stops a job until it is resumed; again is no error.

        Raises: `ColaError(UNKNOWN_JOB)`, `ColaError(ILLEGAL_TRANSITION)`.
        """
        request = jobs_pb2.PauseJobRequest(id=job_id)
        return job_from_wire(await self._connection.call(self._stub.Pause, request))

    async def resume(self, job_id: str) -> Job:
        """Queues a paused job again; again is no error.

        Raises: `ColaError`, such as UNKNOWN_JOB, ILLEGAL_TRANSITION, and BASE_MODEL_CHANGED where the server's base
            model is not the one that the job began on.
        """
        request = jobs_pb2.ResumeJobRequest(id=job_id)
        return job_from_wire(await self._connection.call(self._stub.Resume, request))

    async def list_events(self, job_id: str, *, after: int = 0, limit: int | None = None) -> AsyncPage[JobEvent]:
        """The events so far, oldest first, from behind the event `after`. Raises: `ColaError(UNKNOWN_JOB)`."""
        request = jobs_pb2.ListJobEventsRequest(job=job_id, after=after, limit=page_size(limit))
        answer = await self._connection.call(self._stub.ListEvents, request)
        data = [event_from_wire(event) for event in answer.data]
        if not answer.has_more or not data:
            return AsyncPage(data)
        return AsyncPage(data, lambda: self.list_events(job_id, after=data[-1].id, limit=limit))

    async def stream_events(self, job_id: str, *, after: int = 0) -> AsyncGenerator[JobEvent, None]:
        """Every event from behind the event `after`, as it happens, each once; ends when the job does.

        A connection that breaks is made again, for `OUTAGE_SECONDS` each time.

        Raises: `ColaError(UNKNOWN_JOB)`; `ColaError(UNAVAILABLE)`.
        """
        await self.retrieve(job_id)  # a wrong id or address is told at once
        while True:
            request = jobs_pb2.StreamJobEventsRequest(job=job_id, after=after)
            whole = False
            try:
                async with aclosing(self._connection.stream(self._stub.StreamEvents, request)) as events:
                    async for event in events:
                        after = event.id
                        yield event_from_wire(event)
                whole = True
            except ColaError as error:
                if not transient(error):
                    raise
            job = await self._retrieve(job_id, patience=OUTAGE_SECONDS)
            if whole and job.status.terminal:
                return
            await pause(REOPEN_SECONDS)

    async def wait(
        self,
        job_id: str,
        *,
        timeout: float | None = None,
        raise_on_failure: bool = False,
    ) -> Job:
        """Waits until a job has ended, well or not, and returns it.

        Raises: `TimeoutError` after `timeout` seconds; `JobFailedError` if asked to, for a job that failed or was
            cancelled; `ColaError` as `stream_events`.
        """
        try:
            async with asyncio.timeout(timeout):
                job = await self.retrieve(job_id)
                while not job.status.terminal:
                    async with aclosing(self.stream_events(job_id)) as events:
                        async for _ in events:
                            pass
                    job = await self.retrieve(job_id)
        except TimeoutError:
            raise TimeoutError(f"job {job_id} has not ended after {timeout:g} s; it goes on") from None
        if raise_on_failure and job.status is not JobStatus.SUCCEEDED:
            raise JobFailedError(job)
        return job

    async def metrics(self, job_id: str, *, after_step: int = 0) -> builtins.list[StepMetrics]:
        """One record for each step behind `after_step`, in their order. Raises: `ColaError(UNKNOWN_JOB)`."""
        request = jobs_pb2.JobMetricsRequest(job=job_id, after_step=after_step)

        async def attempt() -> builtins.list[StepMetrics]:
            async with aclosing(self._connection.stream(self._stub.Metrics, request)) as records:
                return [metrics_from_wire(record) async for record in records]

        return await self._connection.repeat(attempt)


def _adapter_folder(adapter: Mapping[str, Any] | None) -> Path | None:
    """The folder that `init_from` names; None where it names what the server has, or nothing.

    Raises: `ColaError(INVALID_ADAPTER)` where it names neither.
    """
    source = None if adapter is None else adapter.get("init_from")
    if not isinstance(source, str | os.PathLike):
        return None  # nothing, or a wrong type, which the spec's own check tells
    text = os.fspath(source)
    if ids.valid("ftckpt", text) or ids.valid("file", text):
        return None
    if not Path(text).is_dir():
        problem = "it is no id of a checkpoint or a file, and no folder on this machine"
        raise ColaError(Reason.INVALID_ADAPTER, source=text, problem=problem)
    return Path(text)
