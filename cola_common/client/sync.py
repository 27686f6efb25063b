"""The client for everybody else: the asyncio one, run on a background thread."""

import builtins
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack, final

from cola_common.client.aio import AsyncClient, AsyncFineTuning
from cola_common.client.background import BackgroundLoop
from cola_common.client.catalogue import AsyncModels, AsyncWorkers
from cola_common.client.checkpoints import AsyncCheckpoints
from cola_common.client.files import AsyncFiles, Purpose
from cola_common.client.jobs import AsyncJobs, JobFields
from cola_common.client.pages import AsyncPage, Page
from cola_common.client.uploads import FileSource
from cola_common.jobs import Checkpoint, Estimate, FileObject, Job, JobEvent, ModelCard, StepMetrics, WorkerCard

T = TypeVar("T")


def _page(loop: BackgroundLoop, page: AsyncPage[T]) -> Page[T]:
    following = page.following
    if following is None:
        return Page(page.data)

    async def fetch() -> AsyncPage[T]:
        return await following()

    return Page(page.data, lambda: _page(loop, loop.run(fetch())))


# Each class below has the methods of its asynchronous twin, which documents them.


@final
class Files:
    """`client.files`: `AsyncFiles`, synchronous."""

    def __init__(self, loop: BackgroundLoop, twin: AsyncFiles) -> None:
        self._loop, self._twin = loop, twin

    def create(self, *, file: FileSource, purpose: Purpose, idempotency_key: str | None = None) -> FileObject:
        """As `AsyncFiles.create`."""
        return self._loop.run(self._twin.create(file=file, purpose=purpose, idempotency_key=idempotency_key))

    def retrieve(self, file_id: str) -> FileObject:
        """As `AsyncFiles.retrieve`."""
        return self._loop.run(self._twin.retrieve(file_id))

    def list(self, *, after: str | None = None, limit: int | None = None) -> Page[FileObject]:
        """As `AsyncFiles.list`."""
        return _page(self._loop, self._loop.run(self._twin.list(after=after, limit=limit)))

    def delete(self, file_id: str) -> None:
        """As `AsyncFiles.delete`."""
        self._loop.run(self._twin.delete(file_id))

    def content(self, file_id: str) -> bytes:
        """As `AsyncFiles.content`."""
        return self._loop.run(self._twin.content(file_id))


@final
class Checkpoints:
    """`client.fine_tuning.jobs.checkpoints`: `AsyncCheckpoints`, synchronous."""

    def __init__(self, loop: BackgroundLoop, twin: AsyncCheckpoints) -> None:
        self._loop, self._twin = loop, twin

    def list(self, job_id: str, *, after: str | None = None, limit: int | None = None) -> Page[Checkpoint]:
        """As `AsyncCheckpoints.list`."""
        return _page(self._loop, self._loop.run(self._twin.list(job_id, after=after, limit=limit)))

    def download(self, checkpoint_id: str, folder: str | os.PathLike[str], *, merged: bool = False) -> Path:
        """As `AsyncCheckpoints.download`."""
        return self._loop.run(self._twin.download(checkpoint_id, folder, merged=merged))


@final
class Jobs:
    """`client.fine_tuning.jobs`: `AsyncJobs`, synchronous."""

    def __init__(self, loop: BackgroundLoop, twin: AsyncJobs) -> None:
        self._loop, self._twin = loop, twin
        self.checkpoints = Checkpoints(loop, twin.checkpoints)

    def create(self, *, idempotency_key: str | None = None, **fields: Unpack[JobFields]) -> Job:
        """As `AsyncJobs.create`."""
        return self._loop.run(self._twin.create(idempotency_key=idempotency_key, **fields))

    def estimate(self, **fields: Unpack[JobFields]) -> Estimate:
        """As `AsyncJobs.estimate`."""
        return self._loop.run(self._twin.estimate(**fields))

    def retrieve(self, job_id: str) -> Job:
        """As `AsyncJobs.retrieve`."""
        return self._loop.run(self._twin.retrieve(job_id))

    def list(self, *, after: str | None = None, limit: int | None = None) -> Page[Job]:
        """As `AsyncJobs.list`."""
        return _page(self._loop, self._loop.run(self._twin.list(after=after, limit=limit)))

    def cancel(self, job_id: str) -> Job:
        """As `AsyncJobs.cancel`."""
        return self._loop.run(self._twin.cancel(job_id))

    def pause(self, job_id: str) -> Job:
        """As `AsyncJobs.pause`."""
        return self._loop.run(self._twin.pause(job_id))

    def resume(self, job_id: str) -> Job:
        """As `AsyncJobs.resume`."""
        return self._loop.run(self._twin.resume(job_id))

    def list_events(self, job_id: str, *, after: int = 0, limit: int | None = None) -> Page[JobEvent]:
        """As `AsyncJobs.list_events`."""
        return _page(self._loop, self._loop.run(self._twin.list_events(job_id, after=after, limit=limit)))

    def stream_events(self, job_id: str, *, after: int = 0) -> Iterator[JobEvent]:
        """As `AsyncJobs.stream_events`."""
        return self._loop.iterate(self._twin.stream_events(job_id, after=after))

    def wait(self, job_id: str, *, timeout: float | None = None, raise_on_failure: bool = False) -> Job:
        """As `AsyncJobs.wait`."""
        return self._loop.run(self._twin.wait(job_id, timeout=timeout, raise_on_failure=raise_on_failure))

    def metrics(self, job_id: str, *, after_step: int = 0) -> builtins.list[StepMetrics]:
        """As `AsyncJobs.metrics`."""
        return self._loop.run(self._twin.metrics(job_id, after_step=after_step))


@final
class FineTuning:
    """`client.fine_tuning`."""

    def __init__(self, loop: BackgroundLoop, twin: AsyncFineTuning) -> None:
        self.jobs = Jobs(loop, twin.jobs)


@final
class Models:
    """`client.models`: `AsyncModels`, synchronous."""

    def __init__(self, loop: BackgroundLoop, twin: AsyncModels) -> None:
        self._loop, self._twin = loop, twin

    def list(self) -> Page[ModelCard]:
        """As `AsyncModels.list`."""
        return _page(self._loop, self._loop.run(self._twin.list()))


@final
class Workers:
    """`client.workers`: `AsyncWorkers`, synchronous."""

    def __init__(self, loop: BackgroundLoop, twin: AsyncWorkers) -> None:
        self._loop, self._twin = loop, twin

    def list(self) -> Page[WorkerCard]:
        """As `AsyncWorkers.list`."""
        return _page(self._loop, self._loop.run(self._twin.list()))

    def drain(self, worker_id: str) -> WorkerCard:
        """As `AsyncWorkers.drain`."""
        return self._loop.run(self._twin.drain(worker_id))


@final
class Client:
    """A server's files, jobs, models and workers; to be used from any thread. `AsyncClient` has the arguments.

    Raises: `ColaError(INVALID_CONFIG)`. The connection is made by the first call.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        root_certificates: str | Path | None = None,
        insecure: bool = False,
    ) -> None:
        async def build() -> AsyncClient:  # on the loop that it will use
            return AsyncClient(address, token, root_certificates, insecure)

        self._loop = BackgroundLoop()
        try:
            self._twin = self._loop.run(build())
        except BaseException:
            self._loop.close()
            raise
        self.files = Files(self._loop, self._twin.files)
        self.fine_tuning = FineTuning(self._loop, self._twin.fine_tuning)
        self.models = Models(self._loop, self._twin.models)
        self.workers = Workers(self._loop, self._twin.workers)

    def close(self) -> None:
        """Ends all calls, closes the connection and ends the background thread."""
        self._loop.close(self._twin.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
