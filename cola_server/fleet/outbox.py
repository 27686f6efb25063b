"""What waits to be sent to one worker: bounded, in order, and never in the way of another worker's jobs.

A batch reserves its bytes before its forward pass; captures then flow as the worker's window allows, and both the
window and the reservation are freed by the worker's credit, which it gives when it has accumulated a capture. Credit
never waits for a delta, so the chain cannot close to a circle.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from cola_common.messages import Capture, ToWorker
from cola_server.fleet.pace import Way


class OutboxClosed(Exception):
    """The worker is gone; nothing that is put here will be sent."""


class Outbox:
    """One worker's queue. Belongs to the event loop."""

    def __init__(self, *, window_bytes: int, buffer_bytes: int) -> None:
        self.way = Way()
        self._loop = asyncio.get_running_loop()
        self._window = window_bytes
        self._buffer = buffer_bytes
        self._queue: deque[ToWorker] = deque()
        self._reserved = 0
        self._in_flight = 0
        self._closed = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def in_flight(self) -> int:
        """Capture bytes sent and not yet credited."""
        return self._in_flight

    @property
    def reserved(self) -> int:
        """Bytes that batches have reserved and the worker has not yet credited."""
        return self._reserved

    async def reserve(self, nbytes: int) -> None:
        """Waits until `nbytes` fit into the buffer. Raises: `OutboxClosed`."""
        assert nbytes <= self._buffer, "a batch over the buffer is refused when its job is created"
        await self._until(lambda: self._reserved + nbytes <= self._buffer)
        self._reserved += nbytes

    def release(self, nbytes: int) -> None:
        """Gives back what was reserved and will not be sent."""
        self._reserved -= nbytes
        self._wake()

    def credit(self, nbytes: int, there: float) -> None:
        """The worker has accumulated `nbytes` of captures, which were `there` seconds with it; a peer that credits more
        than it got is held at zero.
        """
        self.way.credited(nbytes, there, self._loop.time())
        nbytes = min(nbytes, self._in_flight)
        self._in_flight -= nbytes
        self.release(nbytes)

    def put(self, message: ToWorker) -> None:
        """Appends; after `close` it does nothing."""
        if not self._closed:
            self._queue.append(message)
            self._wake()

    async def next(self) -> ToWorker | None:
        """The next message that may be sent now; None once this is closed."""
        try:
            await self._until(self._sendable)
        except OutboxClosed:
            return None
        message = self._queue.popleft()
        size = capture_bytes(message)
        if size:
            self._in_flight += size
            self.way.sent(size, self._loop.time())
        return message

    def drop_captures(self, job: str, epoch: int) -> None:
        """Forgets captures that wait for a (job, epoch) that is over, and what they had reserved."""
        stale = [m for m in self._queue if isinstance(m, Capture) and (m.job, m.epoch) == (job, epoch)]
        gone = {id(m) for m in stale}
        self._queue = deque(m for m in self._queue if id(m) not in gone)
        self.release(sum(capture_bytes(m) for m in stale))

    def close(self) -> None:
        """Drops what waits and lets every waiter know."""
        self._closed = True
        self._queue.clear()
        self._wake()

    def _sendable(self) -> bool:
        if not self._queue:
            return False
        size = capture_bytes(self._queue[0])
        return size == 0 or self._in_flight == 0 or self._in_flight + size <= self._window

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not self._closed and not ready():
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter
        if self._closed:
            raise OutboxClosed

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def capture_bytes(message: ToWorker) -> int:
    """What a message counts against window and buffer: the tensor bytes of a capture, nothing for the rest."""
    return sum(t.nbytes for t in message.tensors) if isinstance(message, Capture) else 0
