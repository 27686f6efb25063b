"""A worker's life across connections: attends, and attends again, until it is to leave or is not wanted."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress

import structlog

from cola_common.errors import ColaError, Reason
from cola_common.messages import PROTOCOL, Capacity, Hello, ToServer, ToWorker
from cola_common.rpc.duplex import Duplex, StreamBroken
from cola_common.tensor import CODECS
from cola_worker.backoff import wait_seconds
from cola_worker.expected import REDUCTIONS
from cola_worker.session import Session
from cola_worker.shards import Shards

FINAL = frozenset(
    {
        Reason.DUPLICATE_WORKER,
        Reason.UNAUTHENTICATED,
        Reason.PERMISSION_DENIED,
        Reason.PROTOCOL_VERSION,
        Reason.WORKER_QUARANTINED,
    }
)
"""What a server says that coming again cannot change."""

Connect = Callable[[], AbstractAsyncContextManager[Duplex[ToServer, ToWorker]]]

log = structlog.get_logger(__name__)


class Supervisor:
    """Keeps one worker attending. `worker` is its id, `boot` the start of this process in Unix nanoseconds."""

    def __init__(self, connect: Connect, *, worker: str, boot: int, capacity: Capacity, shards: Shards) -> None:
        self._connect = connect
        self._worker = worker
        self._boot = boot
        self._capacity = capacity
        self._shards = shards
        self._session: Session | None = None
        self._leaving = asyncio.Event()

    def drain(self) -> None:
        """Leaves the server in good order; `run` returns then."""
        self._leaving.set()
        if self._session is not None:
            self._session.drain()

    async def run(self) -> None:
        """Returns when the worker has left. Raises: `ColaError` when it is told that it need not come again."""
        failures = 0
        while not self._leaving.is_set():
            failures = 0 if await self._attend() else failures + 1
            seconds = wait_seconds(failures)
            if not self._leaving.is_set():
                log.info("trying again", seconds=round(seconds, 2))
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._leaving.wait()

    async def _attend(self) -> bool:
        """One session. Returns: whether the server let the worker in."""
        session = None
        try:
            async with self._connect() as duplex:
                session = self._session = Session(duplex, await self._hello(), self._shards)
                await session.run()
        except StreamBroken as broken:
            if broken.error is not None and broken.error.reason in FINAL:
                raise broken.error from None
            log.warning("no connection", problem=str(broken))
        except ColaError as error:
            if error.reason != Reason.PROTOCOL_VIOLATION:
                raise
            log.warning("the server cannot be followed", problem=error.message)
        finally:
            self._session = None
        if session is None:
            return False
        if session.draining:
            self._leaving.set()
        return session.welcomed

    async def _hello(self) -> Hello:
        return Hello(
            protocol_min=PROTOCOL,
            protocol_max=PROTOCOL,
            worker=self._worker,
            boot=self._boot,
            capacity=self._capacity,
            codecs=CODECS,
            owned=await asyncio.to_thread(self._shards.owned),
            reductions=REDUCTIONS,
        )
