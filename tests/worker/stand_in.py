"""A server of a few lines on loopback: it does what a test scripts, on the project's own stream."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc

from cola_common.messages import Hello, ToServer, ToWorker, Welcome
from cola_common.rpc.channels import connect
from cola_common.rpc.duplex import Duplex
from cola_common.rpc.fleet import Attend, add_fleet, attend
from cola_common.rpc.limits import SERVER_OPTIONS

T = TypeVar("T")

Stream = Duplex[ToWorker, ToServer]
Script = Callable[[Stream], Awaitable[None]]

WELCOME = Welcome(
    session="sess-" + "0" * 24, lease_seconds=10, heartbeat_seconds=0.05, window_bytes=1 << 20, chunk_bytes=1 << 16
)


@asynccontextmanager
async def serving(*scripts: Script) -> AsyncIterator[str]:
    """Serves `scripts`, one for each stream in turn and the last for all that follow. Yields: the address."""
    left = list(scripts)

    async def handle(stream: Stream, _context: object) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(stream)

    attending: Attend = handle
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_fleet(server, attending)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def worker_stream(address: str) -> AsyncIterator[Duplex[ToServer, ToWorker]]:
    async with connect(address) as channel:
        yield attend(channel)


async def welcome(stream: Stream, answer: Welcome = WELCOME) -> Hello:
    """The first exchange of every session."""
    hello = await stream.receive()
    assert isinstance(hello, Hello)
    await stream.send(answer)
    return hello


async def until(stream: Stream, kind: type[T]) -> T:
    """The next message of that kind; others, such as heartbeats, are passed over."""
    while True:
        message = await stream.receive()
        if isinstance(message, kind):
            return message
