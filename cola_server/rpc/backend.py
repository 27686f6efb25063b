"""What the servicers stand on: interfaces, and the wait for them.

The server listens before torch is imported and the models are loaded; a call about jobs that comes early waits here.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, Self, TypeVar

import grpc

from cola_common.errors import ColaError
from cola_common.jobs import (
    Checkpoint,
    Estimate,
    FileObject,
    Job,
    JobEvent,
    JobSpec,
    ModelCard,
    StepMetrics,
    WorkerCard,
)
from cola_common.messages import Hello, Message, ToWorker, Welcome
from cola_common.rpc.auth import Access

P = ParamSpec("P")
T = TypeVar("T")


class Upload(Protocol):
    """A file that is being sent. A context manager: left without `finish`, nothing stays."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def write(self, chunk: bytes) -> None:
        """Raises: `ColaError(FILE_TOO_LARGE | UNSAFE_FORMAT)`."""

    def finish(self) -> FileObject:
        """Raises: `ColaError(INVALID_FILE | UNSAFE_FORMAT)`."""


class Jobs(Protocol):
    """The rules of what users ask for. Synchronous; any thread may call."""

    def create(self, spec: JobSpec, idempotency_key: str | None = None) -> Job: ...
    def estimate(self, spec: JobSpec) -> Estimate: ...
    def retrieve(self, id: str) -> Job: ...
    def jobs(self, after: str | None = None, limit: int = 20) -> list[Job]: ...
    def cancel(self, id: str) -> Job: ...
    def pause(self, id: str) -> Job: ...
    def resume(self, id: str) -> Job: ...
    def events(self, job: str, after: int = 0, limit: int = 100) -> list[JobEvent]: ...
    def metrics(self, job: str, after_step: int = 0) -> list[StepMetrics]: ...
    def checkpoints(self, job: str, after: str | None = None, limit: int = 20) -> list[Checkpoint]: ...
    def checkpoint_files(self, id: str) -> list[tuple[str, Path]]: ...
    def merged_files(self, id: str) -> AbstractContextManager[list[tuple[str, Path]]]: ...
    def upload(self, filename: str, purpose: str, idempotency_key: str | None = None) -> Upload: ...
    def file(self, id: str) -> FileObject: ...
    def files(self, after: str | None = None, limit: int = 20) -> list[FileObject]: ...
    def file_path(self, id: str) -> Path: ...
    def delete_file(self, id: str) -> None: ...
    def models(self) -> Sequence[ModelCard]: ...
    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]: ...


class Outbox(Protocol):
    """Messages that wait for one worker. `next` gives None once it is closed."""

    async def next(self) -> ToWorker | None: ...
    def close(self) -> None: ...


class Attendance(Protocol):
    """One worker's connected life; `ended` is done when the server wants it over, with the reason or with None."""

    @property
    def worker(self) -> str: ...
    @property
    def outbox(self) -> Outbox: ...
    @property
    def ended(self) -> "asyncio.Future[ColaError | None]": ...


class Limits(Protocol):
    """How long a worker may be silent, and how often both sides speak."""

    @property
    def lease_seconds(self) -> float: ...
    @property
    def heartbeat_seconds(self) -> float: ...


class Fleet(Protocol):
    """All workers. Belongs to the event loop; an attendance is what `attend` gave."""

    @property
    def limits(self) -> Limits: ...
    def attend(self, hello: Hello) -> tuple[Any, Welcome]: ...
    def leave(self, attendance: Any, problem: str) -> None: ...
    def accept(self, attendance: Any, message: Message) -> None: ...
    def admit(self, attendance: Any, message: Message) -> None: ...
    def refuse(self, attendance: Any, message: Message, error: ColaError) -> None: ...
    def cards(self) -> list[WorkerCard]: ...
    def drain(self, id: str) -> WorkerCard: ...


class Service(Protocol):
    """The jobs of all tenants."""

    def of(self, tenant: str) -> Jobs:
        """As this tenant sees them: what is others' is not there."""


class Pending:
    """The jobs, or the wait for them."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._service: asyncio.Future[Service] = asyncio.get_running_loop().create_future()

    def set(self, service: Service) -> None:
        """Lets all calls through."""
        self._service.set_result(service)

    async def jobs(self, context: grpc.aio.ServicerContext[Any, Any]) -> Jobs:
        """The jobs as the caller's tenant sees them. Waits for the server to have started.

        The tenant comes from the call's own metadata: nothing has to find its way from the interceptor to here.
        """
        tenant = self._access.tenant(context.invocation_metadata())
        return (await asyncio.shield(self._service)).of(tenant)


async def blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs what reads files or the database off the event loop."""
    return await asyncio.to_thread(function, *args, **kwargs)
