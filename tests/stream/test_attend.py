"""The server's side of a worker's stream: what ends it, and that the fleet is told at once whatever the worker does."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from cola_common.errors import ColaError, Reason
from cola_common.messages import (
    PROTOCOL,
    Capacity,
    Capture,
    Delta,
    Drain,
    Draining,
    EncodedTensor,
    Heartbeat,
    Hello,
    Part,
    Refusal,
    ToServer,
    ToWorker,
    Welcome,
)
from cola_common.rpc.channels import connect
from cola_common.rpc.duplex import Duplex, StreamBroken, StreamEnded, StreamFinished
from cola_common.rpc.fleet import add_fleet, attend
from cola_common.rpc.limits import SERVER_OPTIONS
from cola_server.fleet import Attendance, Fleet, FleetLimits
from cola_server.rpc import fleet as module
from cola_server.rpc.fleet import FleetDoor

Worker = Duplex[ToServer, ToWorker]

LEASE = 0.6
LIMITS = FleetLimits(lease_seconds=LEASE, heartbeat_seconds=0.1, window_bytes=1 << 30)
WORKER = "wkr-" + "0" * 24


class Told(Fleet):
    """Remembers when it was told of which end."""

    def __init__(self) -> None:
        super().__init__(LIMITS)
        self.attending: list[Attendance] = []
        self.ends: asyncio.Queue[tuple[float, str]] = asyncio.Queue()

    def attend(self, hello: Hello) -> tuple[Attendance, Welcome]:
        attendance, welcome = super().attend(hello)
        self.attending.append(attendance)
        return attendance, welcome

    def leave(self, attendance: Attendance, problem: str) -> None:
        super().leave(attendance, problem)
        self.ends.put_nowait((time.monotonic(), problem))


@asynccontextmanager
async def door() -> AsyncIterator[tuple[Told, Callable[..., Awaitable[Worker]]]]:
    """A fleet behind its door, and how a worker attends."""
    fleet = Told()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_fleet(server, FleetDoor(fleet, lambda: Heartbeat(0, 0.0)).attend)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channels = []

    async def enter(boot: int = 1) -> Worker:
        channels.append(connect(f"127.0.0.1:{port}"))
        stream = attend(channels[-1])
        await stream.send(Hello(PROTOCOL, PROTOCOL, WORKER, boot, Capacity(1, 1 << 30, "cpu", 1.0), ("fp32",), ()))
        assert isinstance(await stream.receive(), Welcome)
        return stream

    try:
        yield fleet, enter
    finally:
        for channel in channels:
            await channel.close()
        await server.stop(0)


async def beat(stream: Worker, seconds: float, busy: float = 0.0) -> None:
    """Heartbeats for so long, or until the stream ends."""
    end = time.monotonic() + seconds
    with suppress(StreamEnded):
        while time.monotonic() < end:
            await stream.send(Heartbeat(0, busy))
            await asyncio.sleep(0.05)


async def drained(stream: Worker) -> StreamEnded:
    """Takes what comes. Returns: the end."""
    while True:
        try:
            await stream.receive()
        except StreamEnded as end:
            return end


def large(attendance: Attendance) -> None:
    """Puts more into the outbox than a transport takes from who does not read."""
    data = EncodedTensor("fp32", (4 << 20,), 0, 16 << 20, 0, bytes(16 << 20))
    for batch in range(4):
        attendance.outbox.put(Capture("job", 1, batch, (Part("x", 0, 0),), (data,)))


@pytest.mark.parametrize("reads", [True, False])
async def test_a_silent_worker_is_lost_when_its_lease_ends_and_not_later(reads: bool) -> None:
    async with door() as (fleet, enter):
        stream = await enter()
        reading = asyncio.create_task(drained(stream)) if reads else None
        large(fleet.attending[0])
        await beat(stream, 0.5)
        silent = time.monotonic()
        when, problem = await asyncio.wait_for(fleet.ends.get(), 5)
        assert LEASE - 0.1 < when - silent < LEASE + 0.3
        assert problem == f"it was silent for {LEASE:g} s"
        assert [card.status for card in fleet.cards()] == ["lost"]
        if reading is not None:
            end = await reading
            assert isinstance(end, StreamBroken) and end.error is not None
            assert end.error.reason is Reason.WORKER_LOST


async def test_a_worker_that_speaks_is_never_lost_though_it_reads_nothing() -> None:
    async with door() as (fleet, enter):
        stream = await enter()
        large(fleet.attending[0])
        await beat(stream, 3 * LEASE)
        assert fleet.ends.empty()


async def test_a_long_message_on_a_slow_link_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    async with door() as (fleet, enter):
        stream = await enter()
        transport = stream._transport
        write = transport.write

        async def slowly(envelope: bytes) -> None:
            await asyncio.sleep(0.2)
            await write(envelope)

        monkeypatch.setattr(transport, "write", slowly)
        stream.chunk_bytes = 1000
        began = time.monotonic()
        await stream.send(
            Delta("job", 1, 0, ((0, "A"),), (), "", 0.0, (EncodedTensor("fp32", (2500,), 0, 10_000, 0, bytes(10_000)),))
        )
        while not isinstance(answer := await stream.receive(), Refusal):
            pass
        assert answer.reason == Reason.STALE_EPOCH
        assert time.monotonic() - began > 2 * LEASE
        assert fleet.ends.empty()


@pytest.mark.parametrize("error", [None, ColaError(Reason.DUPLICATE_WORKER, worker=WORKER)])
async def test_a_worker_that_does_not_read_cannot_hold_up_its_end(
    error: ColaError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.3)
    async with door() as (fleet, enter):
        stream = await enter()
        large(fleet.attending[0])
        beating = asyncio.create_task(beat(stream, 10))
        await asyncio.sleep(0.2)
        fleet.attending[0].end(error)
        asked = time.monotonic()
        when, _ = await asyncio.wait_for(fleet.ends.get(), 5)
        assert when - asked < 0.6
        stream.close()
        await beating


async def test_a_hung_trainer_is_told_to_the_fleet_and_to_the_worker() -> None:
    async with door() as (fleet, enter):
        stream = await enter()
        reading = asyncio.create_task(drained(stream))
        await beat(stream, 0.2, busy=9.0)
        assert fleet.ends.empty()
        await beat(stream, 5, busy=11.0)
        assert (await fleet.ends.get())[1] == "its trainer has been at one message for 11 s"
        end = await reading
        assert isinstance(end, StreamBroken) and end.error is not None
        assert end.error.reason is Reason.WORKER_LOST


async def test_of_two_processes_with_one_identity_the_older_is_told_why_and_the_newer_stays() -> None:
    async with door() as (fleet, enter):
        older = await enter(boot=1)
        reading = asyncio.create_task(drained(older))
        newer = await enter(boot=2)
        end = await asyncio.wait_for(reading, 5)
        assert isinstance(end, StreamBroken) and end.error is not None
        assert end.error.reason is Reason.DUPLICATE_WORKER
        with pytest.raises(StreamBroken, match="another process attended"):
            await enter(boot=1)
        await beat(newer, 2 * LEASE)
        assert [card.status for card in fleet.cards()] == ["attending"]


async def test_the_same_process_is_let_in_although_its_old_stream_seems_to_live() -> None:
    async with door() as (fleet, enter):
        first = await enter(boot=1)
        beating = asyncio.create_task(beat(first, 2 * LEASE))
        second = await enter(boot=1)
        assert isinstance(await asyncio.wait_for(drained(first), 5), StreamFinished)
        await beat(second, 2 * LEASE)
        await beating
        assert [card.status for card in fleet.cards()] == ["attending"]
        assert fleet.attending[1].ended.done() is False


async def test_fifty_comings_and_goings_leave_nobody_behind() -> None:
    """Streams that break without a word, over and over: each end is told once to a fleet that knows the worker."""
    async with door() as (fleet, enter):
        for boot in range(50):
            stream = await enter(boot=boot)
            stream.close()
            await asyncio.wait_for(fleet.ends.get(), 5)
        assert [card.status for card in fleet.cards()] == ["lost"]


async def test_a_worker_that_the_server_drains_is_asked_to_leave_and_then_let_go() -> None:
    """One that only heard Goodbye would come again."""
    async with door() as (fleet, enter):
        stream = await enter()
        assert fleet.drain(WORKER).status == "draining"
        while not isinstance(await stream.receive(), Drain):
            pass
        assert fleet.ends.empty() and fleet.candidates(job="job") == []
        await stream.send(Draining())
        assert isinstance(await drained(stream), StreamFinished)
        await fleet.ends.get()
        with pytest.raises(ColaError) as unknown:
            fleet.drain(WORKER)
        assert unknown.value.reason is Reason.UNKNOWN_WORKER
