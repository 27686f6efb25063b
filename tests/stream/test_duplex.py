"""What a stream promises: whole messages in order, bounded memory, and three ends that are told apart."""

import asyncio
import dataclasses
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest

from cola_common.errors import ColaError, Reason
from cola_common.messages import (
    Ack,
    Capture,
    Credit,
    Drain,
    Draining,
    EncodedTensor,
    Goodbye,
    Heartbeat,
    Message,
    Part,
    ToServer,
    ToWorker,
    payload,
)
from cola_common.rpc.channels import connect
from cola_common.rpc.duplex import Duplex, MessageRefused, StreamBroken, StreamClosed, StreamEnded, StreamFinished
from cola_common.rpc.fleet import Context, add_fleet, attend
from cola_common.rpc.limits import CHUNK_BYTES, MAX_PAYLOAD_BYTES, SERVER_OPTIONS
from cola_common.wire import fleet_pb2, fleet_pb2_grpc

ServerSide = Duplex[ToWorker, ToServer]
WorkerSide = Duplex[ToServer, ToWorker]


@asynccontextmanager
async def serving(
    handler: Callable[[ServerSide], Awaitable[None]],
) -> AsyncIterator[tuple[grpc.aio.Channel, grpc.aio.Server]]:
    async def run(duplex: ServerSide, _context: Context) -> None:
        await handler(duplex)

    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_fleet(server, run)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect(f"127.0.0.1:{port}") as channel:
            yield channel, server
    finally:
        await server.stop(0)


def tensor(size: int, seed: int = 0) -> EncodedTensor:
    data = bytes((seed + place) % 251 for place in range(min(size, 251))) * (size // 251 + 1)
    return EncodedTensor("bf16", (size // 2,), 0, size, 0, data[:size])


def capture(*sizes: int, batch: int = 0) -> Capture:
    parts = tuple(Part("x", index, 0) for index in range(len(sizes)))
    return Capture("job", 1, batch, parts, tuple(tensor(size, seed) for seed, size in enumerate(sizes)))


def equal(left: Message, right: Message) -> bool:
    """Equal, with tensors' data compared as bytes."""

    def plain(message: Message) -> tuple[Message, list[bytes]]:
        if not payload(message):
            return message, []
        assert isinstance(message, Capture)
        empty = tuple(dataclasses.replace(each, data=b"") for each in message.tensors)
        return dataclasses.replace(message, tensors=empty), [bytes(each.data) for each in message.tensors]

    return plain(left) == plain(right)


def anything(_message: Message) -> None:
    """Admits all."""


@pytest.mark.parametrize(
    "sizes",
    [
        (0,),
        (2,),
        (2, 0, 4),
        (CHUNK_BYTES,),
        (CHUNK_BYTES - 2, 4),
        (3 * CHUNK_BYTES + 2, 10, 0, CHUNK_BYTES),
        (6,) * 300,
    ],
    ids=str,
)
async def test_tensors_arrive_as_sent_whatever_their_sizes(sizes: tuple[int, ...]) -> None:
    sent = capture(*sizes)

    async def handler(duplex: ServerSide) -> None:
        await duplex.send(sent)
        await duplex.send(Drain())
        await duplex.goodbye("done")

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        assert equal(await duplex.receive(), sent)
        assert await duplex.receive() == Drain()
        with pytest.raises(StreamFinished, match="done"):
            await duplex.receive()


async def test_messages_of_many_senders_do_not_mix_and_keep_each_senders_order() -> None:
    async def handler(duplex: ServerSide) -> None:
        async def sender(number: int) -> None:
            for batch in range(5):
                await duplex.send(dataclasses.replace(capture(CHUNK_BYTES + number, 100, batch=batch), epoch=number))

        await asyncio.gather(*(sender(number) for number in range(6)))
        await duplex.goodbye("done")

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        batches: dict[int, list[int]] = {}
        for _ in range(30):
            message = await duplex.receive()
            assert isinstance(message, Capture)
            sent = capture(CHUNK_BYTES + message.epoch, 100, batch=message.batch)
            assert equal(message, dataclasses.replace(sent, epoch=message.epoch))
            batches.setdefault(message.epoch, []).append(message.batch)
        assert batches == {number: list(range(5)) for number in range(6)}


async def test_both_directions_run_at_once() -> None:
    count = 200

    async def talk(duplex: ServerSide | WorkerSide, message: Message) -> int:
        async def read() -> int:
            return len([await duplex.receive() for _ in range(count)])

        async def write() -> None:
            for _ in range(count):
                await duplex.send(message)  # type: ignore[arg-type]

        got, _ = await asyncio.gather(read(), write())
        return got

    async def handler(duplex: ServerSide) -> None:
        assert await talk(duplex, Ack("job", 1, 2, "d")) == count
        await duplex.goodbye("done")

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        assert await talk(duplex, Credit("job", 1, 2, 3, 0.5)) == count
        with pytest.raises(StreamFinished):
            await duplex.receive()


# --- ends -----------------------------------------------------------------------------------------------------------


async def test_a_server_that_says_goodbye_is_finished_to_the_worker_even_if_it_reads_late() -> None:
    async def handler(duplex: ServerSide) -> None:
        for _ in range(20):
            await duplex.send(Heartbeat(1, 0.0))
        await duplex.goodbye("upgrade")

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        await duplex.send(Draining())
        await asyncio.sleep(0.3)
        assert [await duplex.receive() for _ in range(20)] == [Heartbeat(1, 0.0)] * 20
        for _ in range(2):  # an end stays the end
            with pytest.raises(StreamFinished) as finished:
                await duplex.receive()
            assert finished.value.reason == "upgrade"
        with pytest.raises(StreamFinished):
            await duplex.send(Draining())


async def test_a_worker_that_says_goodbye_is_finished_to_the_server_and_closed_to_itself() -> None:
    seen: list[StreamEnded | ToServer] = []

    async def handler(duplex: ServerSide) -> None:
        try:
            while True:
                seen.append(await duplex.receive())
        except StreamEnded as end:
            seen.append(end)

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        await duplex.send(Draining())
        await duplex.goodbye("going home")
        await duplex.goodbye("twice is once")
        with pytest.raises(StreamClosed):
            await duplex.send(Draining())
        with pytest.raises(StreamClosed):
            await duplex.receive()
    assert seen[0] == Draining()
    assert isinstance(seen[1], StreamFinished)
    assert seen[1].reason == "going home"
    assert len(seen) == 2


async def test_a_handler_that_returns_without_a_goodbye_breaks_the_stream() -> None:
    async def handler(duplex: ServerSide) -> None:
        await duplex.send(Heartbeat(1, 0.0))

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        assert await duplex.receive() == Heartbeat(1, 0.0)
        with pytest.raises(StreamBroken) as broken:
            await duplex.receive()
        assert broken.value.error is None


async def test_a_worker_that_closes_or_vanishes_breaks_the_stream_for_a_reading_server() -> None:
    ends: list[StreamEnded] = []
    begun = asyncio.Event()

    async def handler(duplex: ServerSide) -> None:
        begun.set()
        try:
            await duplex.receive()
        except StreamEnded as end:
            ends.append(end)

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        reading = asyncio.create_task(duplex.receive())
        await begun.wait()
        duplex.close()
        with pytest.raises(StreamClosed):
            await reading
        with pytest.raises(StreamClosed):
            await duplex.send(Draining())
        begun.clear()
        attending = attend(channel)
        await asyncio.wait([asyncio.create_task(begun.wait())], timeout=0.2)
        await channel.close()
        with pytest.raises(StreamBroken):
            await attending.receive()
        for _ in range(100):
            if len(ends) == 2:
                break
            await asyncio.sleep(0.02)
    assert [type(end) for end in ends] == [StreamBroken, StreamBroken]


async def test_a_worker_that_vanishes_breaks_the_stream_for_a_writing_server() -> None:
    ended: asyncio.Future[StreamEnded] = asyncio.get_running_loop().create_future()

    async def handler(duplex: ServerSide) -> None:
        try:
            while True:
                await duplex.send(capture(CHUNK_BYTES))
        except StreamEnded as end:
            ended.set_result(end)

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        await duplex.receive()
        duplex.close()
        async with asyncio.timeout(10):
            assert isinstance(await ended, StreamBroken)


async def test_the_servers_error_reaches_a_worker_that_reads_and_one_that_writes() -> None:
    async def handler(duplex: ServerSide) -> None:
        await duplex.receive()
        raise ColaError(Reason.DUPLICATE_WORKER, worker="wkr-1")

    async with serving(handler) as (channel, _):
        reader = attend(channel)
        await reader.send(Draining())
        with pytest.raises(StreamBroken, match="data folder of its own") as broken:
            await reader.receive()
        assert broken.value.error is not None
        assert broken.value.error.reason is Reason.DUPLICATE_WORKER

        writer = attend(channel)
        reading = asyncio.create_task(writer.receive())

        async def write() -> None:
            while True:
                await writer.send(Draining())
                await asyncio.sleep(0.01)

        with pytest.raises(StreamBroken, match="data folder of its own"):
            await write()
        with pytest.raises(StreamBroken):
            await reading


async def test_an_unexpected_error_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(_duplex: ServerSide) -> None:
        raise KeyError("secret")

    async with serving(handler) as (channel, _):
        with pytest.raises(StreamBroken) as broken:
            await attend(channel).receive()
    assert broken.value.error is not None
    assert broken.value.error.reason is Reason.INTERNAL
    assert "secret" not in str(broken.value.error)
    assert "secret" in caplog.text


async def test_a_server_that_cannot_be_reached_is_broken_as_unavailable() -> None:
    async with connect("127.0.0.1:1") as channel:
        for use in (lambda duplex: duplex.send(Draining()), lambda duplex: duplex.receive()):
            with pytest.raises(StreamBroken) as broken:
                await use(attend(channel))
            assert broken.value.error is not None
            assert broken.value.error.reason is Reason.UNAVAILABLE


async def test_a_server_that_stops_breaks_the_stream() -> None:
    async def handler(duplex: ServerSide) -> None:
        await duplex.receive()

    async with serving(handler) as (channel, server):
        duplex = attend(channel)
        reading = asyncio.create_task(duplex.receive())
        await asyncio.sleep(0.2)
        await server.stop(0)
        with pytest.raises(StreamBroken):
            await reading


async def test_cancelling_a_task_stays_a_cancellation_to_it_and_breaks_the_stream_for_others() -> None:
    async def handler(duplex: ServerSide) -> None:
        with pytest.raises(StreamBroken):
            await duplex.receive()

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        reading = asyncio.create_task(duplex.receive())
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        with pytest.raises(StreamBroken):
            await duplex.receive()


async def test_after_half_a_message_nothing_more_is_written() -> None:
    hold = asyncio.Event()

    async def handler(duplex: ServerSide) -> None:
        sending = asyncio.create_task(duplex.send(capture(50 * CHUNK_BYTES)))
        await asyncio.sleep(0.3)
        assert not sending.done()  # nobody reads
        sending.cancel()
        await asyncio.wait([sending])
        with pytest.raises(StreamBroken):
            await duplex.send(Drain())
        hold.set()

    async with serving(handler) as (channel, _):
        duplex = attend(channel)
        await hold.wait()
        with pytest.raises(StreamBroken):
            await duplex.receive()


# --- bounds ---------------------------------------------------------------------------------------------------------


async def test_a_refused_message_is_thrown_away_and_the_stream_goes_on() -> None:
    stale = ColaError(Reason.STALE_EPOCH, epoch=1, job="job", current=2)

    async def handler(duplex: ServerSide) -> None:
        await duplex.send(capture(3 * CHUNK_BYTES, 8))
        await duplex.send(capture(4))
        await duplex.goodbye("done")

    def admit(message: Message) -> None:
        assert all(bytes(each.data) == b"" for each in payload(message))
        if len(payload(message)) == 2:
            raise stale

    async with serving(handler) as (channel, _):
        duplex = attend(channel, admit=admit)
        with pytest.raises(MessageRefused) as refused:
            await duplex.receive()
        assert refused.value.error is stale
        assert isinstance(refused.value.message, Capture)
        assert [each.nbytes for each in refused.value.message.tensors] == [3 * CHUNK_BYTES, 8]
        assert equal(await duplex.receive(), capture(4))


async def test_no_memory_is_taken_for_what_a_peer_declares() -> None:
    lie = dataclasses.replace(tensor(10), nbytes=1 << 40)

    async with raw_server([envelope(lie)]) as channel:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        duplex = attend(channel)
        with pytest.raises(StreamBroken):
            await duplex.receive()  # throws away, until the stream ends
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


async def test_without_an_admission_rule_only_small_messages_are_taken() -> None:
    async def handler(duplex: ServerSide) -> None:
        await duplex.send(capture(MAX_PAYLOAD_BYTES + 2))
        await duplex.goodbye("done")

    async with serving(handler) as (channel, _):
        with pytest.raises(MessageRefused, match="allowed"):
            await attend(channel).receive()


def envelope(*tensors: EncodedTensor, data: bytes = b"") -> fleet_pb2.FromServer:
    headers = [fleet_pb2.TensorHeader(codec=t.codec, shape=t.shape, nbytes=t.nbytes) for t in tensors]
    parts = [fleet_pb2.Part(kind="x", index=index) for index in range(len(tensors))]
    return fleet_pb2.FromServer(capture=fleet_pb2.Capture(job="job", parts=parts), tensors=headers, data=data)


@asynccontextmanager
async def raw_server(envelopes: list[fleet_pb2.FromServer]) -> AsyncIterator[grpc.aio.Channel]:
    """A server made of generated code alone: another implementation of the protocol."""

    class Fleet(fleet_pb2_grpc.FleetServicer):
        async def Attend(self, request_iterator: object, context: object) -> AsyncIterator[fleet_pb2.FromServer]:
            for each in envelopes:
                yield each

    server = grpc.aio.server()
    fleet_pb2_grpc.add_FleetServicer_to_server(Fleet(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


async def test_another_implementation_of_the_protocol_is_understood() -> None:
    one = tensor(1000)
    data = bytes(one.data)
    sent = [envelope(one, data=data[:10])] + [
        fleet_pb2.FromServer(data=data[at : at + 99]) for at in range(10, 1000, 99)
    ]
    async with raw_server([*sent, fleet_pb2.FromServer(goodbye=fleet_pb2.Goodbye(reason="done"))]) as channel:
        duplex = attend(channel)
        message = await duplex.receive()
        assert isinstance(message, Capture)
        assert bytes(message.tensors[0].data) == data
        with pytest.raises(StreamFinished, match="done"):
            await duplex.receive()


VIOLATIONS = {
    "data without a message": [fleet_pb2.FromServer(data=b"abc")],
    "nothing": [fleet_pb2.FromServer()],
    "data without tensors": [fleet_pb2.FromServer(drain=fleet_pb2.Drain(), data=b"abc")],
    "more data than headers": [envelope(tensor(4), data=b"12345")],
    "a message within a message": [envelope(tensor(4), data=b"1"), fleet_pb2.FromServer(drain=fleet_pb2.Drain())],
    "an empty continuation": [envelope(tensor(4), data=b"1"), fleet_pb2.FromServer()],
    "tensors where none belong": [fleet_pb2.FromServer(drain=fleet_pb2.Drain(), tensors=[fleet_pb2.TensorHeader()])],
    "more tensors than parts": [fleet_pb2.FromServer(capture=fleet_pb2.Capture(), tensors=[fleet_pb2.TensorHeader()])],
}


@pytest.mark.parametrize("envelopes", VIOLATIONS.values(), ids=VIOLATIONS.keys())
async def test_a_breach_of_the_protocol_breaks_the_stream_and_says_so(envelopes: list[fleet_pb2.FromServer]) -> None:
    async with raw_server(envelopes) as channel:
        with pytest.raises(StreamBroken) as broken:
            await attend(channel, admit=anything).receive()
    assert broken.value.error is not None
    assert broken.value.error.reason is Reason.PROTOCOL_VIOLATION


async def test_an_envelope_over_the_message_limit_is_never_taken() -> None:
    huge = fleet_pb2.FromServer(goodbye=fleet_pb2.Goodbye(reason="x" * (5 << 20)))
    async with raw_server([huge]) as channel:
        with pytest.raises(StreamBroken) as broken:
            await attend(channel).receive()
    assert broken.value.error is not None
    assert "larger than max" in str(broken.value.error)


def test_a_goodbye_is_a_message_of_both_sides() -> None:
    assert Goodbye in ToServer.__args__
    assert Goodbye in ToWorker.__args__
