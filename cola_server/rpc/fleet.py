"""`cola.v1.Fleet.Attend`: one worker's stream between the network and the fleet.

Five tasks: one reads, one writes what waits in the outbox, one sends heartbeats, one watches the lease, and this one
waits for the first of them, or for the server's own wish, to end it. Whatever the end, the fleet is told once, and a
worker that does not read keeps nobody from being told.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from cola_common.errors import ColaError, Reason
from cola_common.messages import Heartbeat, Hello, ToServer, ToWorker, Welcome
from cola_common.rpc.duplex import Duplex, MessageRefused, StreamBroken, StreamEnded, StreamFinished
from cola_server.rpc.backend import Attendance, Fleet

HELLO_SECONDS = 10.0  # a stream whose worker says nothing is closed
FLUSH_SECONDS = 5.0  # what is being written when the server wants an end, and the Goodbye, may take so long

Stream = Duplex[ToWorker, ToServer]


class FleetDoor:
    """Lets workers in; `attend` is the handler of each stream. `pulse` is the server's own heartbeat."""

    def __init__(self, fleet: Fleet, pulse: Callable[[], Heartbeat]) -> None:
        self._fleet = fleet
        self._pulse = pulse

    async def attend(self, stream: Stream, _context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Runs one worker's stream. Raises: `ColaError`, which becomes the stream's status."""
        fleet = self._fleet
        try:
            hello = await _hello(stream)
        except StreamEnded:
            return
        attendance, welcome = fleet.attend(hello)
        problem = "the server ended its stream"
        try:
            stream.admit = lambda message: fleet.admit(attendance, message)
            stream.chunk_bytes = welcome.chunk_bytes
            problem = await _Conversation(stream, fleet, attendance, self._pulse).run(welcome)
        except StreamEnded as end:
            problem = _told(end)
        except ColaError as error:
            problem = error.details.get("problem", error.message)
            raise
        finally:
            fleet.leave(attendance, problem)


class _Conversation:
    def __init__(self, stream: Stream, fleet: Fleet, attendance: Attendance, pulse: Callable[[], Heartbeat]) -> None:
        self._stream = stream
        self._fleet = fleet
        self._attendance = attendance
        self._pulse = pulse

    async def run(self, welcome: Welcome) -> str:
        """Returns: why it is over. Raises: `StreamEnded`, and `ColaError` where the worker is sent away."""
        loop = asyncio.get_running_loop()
        writer = loop.create_task(self._write(welcome))
        others = (self._read(), self._send_heartbeats(), self._watch_lease())
        tasks: list[asyncio.Task[None]] = [*(loop.create_task(other) for other in others), writer]
        try:
            ends: list[asyncio.Future[Any]] = [*tasks, self._attendance.ended]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            error = self._attendance.ended.result()
            self._attendance.outbox.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await asyncio.wait([writer])
                    if error is None:
                        await self._stream.goodbye("the server is done with this worker")
            if error is not None:
                raise error
            return "it was let go"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            try:
                self._fleet.accept(self._attendance, await self._stream.receive())
            except MessageRefused as refused:
                self._fleet.refuse(self._attendance, refused.message, refused.error)

    async def _write(self, welcome: Welcome) -> None:
        await self._stream.send(welcome)
        while (message := await self._attendance.outbox.next()) is not None:
            await self._stream.send(message)

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._fleet.limits.heartbeat_seconds)
            if not self._stream.sending:  # a long message being written is a sign of life itself
                await self._stream.send(self._pulse())

    async def _watch_lease(self) -> None:
        """A task of its own: what is sent to a worker that does not read waits for as long as the connection lasts."""
        lease = self._fleet.limits.lease_seconds
        while True:
            left = self._stream.heard + lease - time.monotonic()
            if left <= 0:
                problem = f"it was silent for {lease:g} s"
                raise ColaError(Reason.WORKER_LOST, worker=self._attendance.worker, problem=problem)
            await asyncio.sleep(left)


async def _hello(stream: Stream) -> Hello:
    receiving: asyncio.Task[Any] = asyncio.ensure_future(stream.receive())
    done, _ = await asyncio.wait({receiving}, timeout=HELLO_SECONDS)
    if not done:
        receiving.cancel()
        raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"no Hello within {HELLO_SECONDS:.0f} s")
    hello = receiving.result()
    if not isinstance(hello, Hello):
        raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"{type(hello).__name__} before Hello")
    return hello


def _told(end: StreamEnded) -> str:
    if isinstance(end, StreamFinished):
        return f"it said Goodbye: {end.reason}"
    if isinstance(end, StreamBroken):
        return f"its stream broke: {end}"
    return "its stream was closed"
