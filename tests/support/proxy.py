"""The network between two processes on loopback, with the faults of a real one: latency, a slow link, cuts."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Literal, Self

from cola_common.rpc.addresses import split

BYTES = 1 << 16  # read at a time
HELD = 4  # reads that are held back a direction and connection; then the sender's own buffers fill, as they would

Way = Literal["up", "down"]
"""up: towards the target."""


class Proxy:
    """A context manager: carries TCP connections from `address` on to `target`. Its methods are a test's to call.

    `latency` is seconds each way, `rate` bytes a second each way and connection; both may be set at any time.
    """

    def __init__(self, target: str, *, latency: float = 0.0, rate: float | None = None) -> None:
        self.address = ""
        self.latency = latency
        self.rate = rate
        self._target = split(target)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._passable: dict[Way, asyncio.Event] = {"up": asyncio.Event(), "down": asyncio.Event()}

    def __enter__(self) -> Self:
        self._thread.start()
        self.restore()
        listener = _socket()
        listener.bind(("127.0.0.1", 0))
        self.address = "{}:{}".format(*listener.getsockname())
        self._server: asyncio.Server = self._await(asyncio.start_server(self._accept, sock=listener))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._server.close)
        self.sever()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, *ways: Way) -> None:
        """From now on nothing passes, and nobody is told: connections stay, and new ones are taken and stay silent.

        Without `ways`, both.
        """
        self._call(lambda: [self._passable[way].clear() for way in ways or ("up", "down")])

    def restore(self) -> None:
        """What was held back goes on its way, as TCP would send it again."""
        self._call(lambda: [passable.set() for passable in self._passable.values()])

    def sever(self) -> None:
        """Ends every connection; what was held back is lost."""
        self._await(self._sever())

    async def _sever(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            onwards = _socket()
            try:
                await asyncio.get_running_loop().sock_connect(onwards, self._target)
            except BaseException:
                onwards.close()
                raise
            there, back = await asyncio.open_connection(sock=onwards)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._carry(reader, back, "up"))
                    group.create_task(self._carry(there, writer, "down"))
            finally:
                back.transport.abort()
        except (*_GONE, asyncio.CancelledError):
            pass  # the ends learn it from their sockets
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        held: asyncio.Queue[_Read] = asyncio.Queue(HELD)
        async with asyncio.TaskGroup() as group:
            delivery = group.create_task(self._deliver(held, writer, way))
            while data := await reader.read(BYTES):
                await held.put((time.monotonic() + self.latency, data))
            await held.put((time.monotonic() + self.latency, b""))
            await delivery
        raise ConnectionResetError  # one end has closed: the other is told once all that it sent is through

    async def _deliver(
        self, held: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter, way: Way
    ) -> None:
        while True:
            due, data = await held.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self._passable[way].wait()
            if not data:
                return
            if self.rate is not None:
                await asyncio.sleep(len(data) / self.rate)
            writer.write(data)
            await writer.drain()

    def _call(self, function: Callable[[], object]) -> None:
        async def call() -> None:
            function()

        self._await(call())

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)


def _socket() -> socket.socket:
    """A link of this kind holds a few kilobytes, not the megabytes that loopback would."""
    made = socket.socket()
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BYTES)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it for sockets of its own alone
    return made


_Read = tuple[float, bytes]  # when it is due, and what it is
_GONE = (OSError, BaseExceptionGroup)
