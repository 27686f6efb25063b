"""`cola.v1.Jobs`: convert, call, translate."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from cola_common import convert
from cola_common.rpc.status import translated
from cola_common.wire import jobs_pb2, jobs_pb2_grpc, types_pb2
from cola_server.rpc.backend import Pending, blocking
from cola_server.rpc.files import page

Context = grpc.aio.ServicerContext[Any, Any]
EVENTS_AT_ONCE = 100


class Jobs(jobs_pb2_grpc.JobsServicer):
    """See the proto."""

    def __init__(self, backend: Pending) -> None:
        self._backend = backend

    async def Create(self, request: jobs_pb2.CreateJobRequest, context: Context) -> types_pb2.Job:  # noqa: N802
        async with translated(context):
            jobs = await self._backend.jobs(context)
            spec = convert.spec_from_wire(request.spec)
            return convert.job_to_wire(await blocking(jobs.create, spec, request.idempotency_key or None))

    async def Estimate(  # noqa: N802
        self, request: jobs_pb2.EstimateJobRequest, context: Context
    ) -> types_pb2.Estimate:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            spec = convert.spec_from_wire(request.spec)
            return convert.estimate_to_wire(await blocking(jobs.estimate, spec))

    async def Retrieve(self, request: jobs_pb2.RetrieveJobRequest, context: Context) -> types_pb2.Job:  # noqa: N802
        async with translated(context):
            jobs = await self._backend.jobs(context)
            return convert.job_to_wire(await blocking(jobs.retrieve, request.id))

    async def List(  # noqa: N802
        self, request: jobs_pb2.ListJobsRequest, context: Context
    ) -> jobs_pb2.ListJobsResponse:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            size = page(request.limit)
            after = request.after if request.HasField("after") else None
            found = await blocking(jobs.jobs, after, size + 1)
            return jobs_pb2.ListJobsResponse(
                data=[convert.job_to_wire(job) for job in found[:size]], has_more=len(found) > size
            )

    async def Cancel(self, request: jobs_pb2.CancelJobRequest, context: Context) -> types_pb2.Job:  # noqa: N802
        async with translated(context):
            jobs = await self._backend.jobs(context)
            return convert.job_to_wire(await blocking(jobs.cancel, request.id))

    async def Pause(self, request: jobs_pb2.PauseJobRequest, context: Context) -> types_pb2.Job:  # noqa: N802
        async with translated(context):
            jobs = await self._backend.jobs(context)
            return convert.job_to_wire(await blocking(jobs.pause, request.id))

    async def Resume(self, request: jobs_pb2.ResumeJobRequest, context: Context) -> types_pb2.Job:  # noqa: N802
        async with translated(context):
            jobs = await self._backend.jobs(context)
            return convert.job_to_wire(await blocking(jobs.resume, request.id))

    async def ListEvents(  # noqa: N802
        self, request: jobs_pb2.ListJobEventsRequest, context: Context
    ) -> jobs_pb2.ListJobEventsResponse:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            size = page(request.limit)
            found = await blocking(jobs.events, request.job, request.after, size + 1)
            return jobs_pb2.ListJobEventsResponse(
                data=[convert.event_to_wire(event) for event in found[:size]], has_more=len(found) > size
            )

    async def StreamEvents(  # noqa: N802
        self, request: jobs_pb2.StreamJobEventsRequest, context: Context
    ) -> AsyncIterator[types_pb2.JobEvent]:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            loop, changed = asyncio.get_running_loop(), asyncio.Event()

            def tell(job: str) -> None:
                if job == request.job:
                    loop.call_soon_threadsafe(changed.set)

            after = request.after
            unsubscribe = jobs.subscribe(tell)
            try:
                while True:
                    changed.clear()
                    over = (await blocking(jobs.retrieve, request.job)).status.terminal
                    while found := await blocking(jobs.events, request.job, after, EVENTS_AT_ONCE):
                        for event in found:
                            yield convert.event_to_wire(event)
                        after = found[-1].id
                    if over:
                        return
                    await changed.wait()
            finally:
                unsubscribe()

    async def Metrics(  # noqa: N802
        self, request: jobs_pb2.JobMetricsRequest, context: Context
    ) -> AsyncIterator[types_pb2.StepMetrics]:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            for metrics in await blocking(jobs.metrics, request.job, request.after_step):
                yield convert.metrics_to_wire(metrics)
