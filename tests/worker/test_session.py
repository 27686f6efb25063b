"""A session over loopback: what goes in, what comes out, and every way to end."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.messages import (
    PROTOCOL,
    Ack,
    Capacity,
    Capture,
    Credit,
    Delta,
    Drain,
    Draining,
    Heartbeat,
    Hello,
    Part,
    Refusal,
    Revoke,
    Snapshot,
    SnapshotRequest,
    ToServer,
)
from cola_common.rpc.duplex import StreamBroken
from cola_common.tensor import CODECS, encode
from cola_server.fleet.progress import LONGEST_SECONDS
from cola_worker import session as module
from cola_worker.session import Session
from cola_worker.shards import Shards
from cola_worker.thread import TrainerThread
from cola_worker.trainer import ToTrainer, Trainer
from tests.worker.driver import FAMILIES, Driver, changed, random_batch, shard_plans
from tests.worker.stand_in import WELCOME, Stream, serving, until, welcome, worker_stream

ADAMW = changed(optimizer="adamw", learning_rate=0.02)
HELLO = Hello(
    protocol_min=PROTOCOL,
    protocol_max=PROTOCOL,
    worker="wkr-" + "0" * 24,
    boot=1,
    capacity=Capacity(cores=1, memory_bytes=1 << 30, device="cpu", gflops=1.0),
    codecs=CODECS,
    owned=(),
)


async def attend(address: str, folder: Path, then: Callable[[Session], Awaitable[None]] | None = None) -> Session:
    """A whole session; `then` runs beside it."""
    async with worker_stream(address) as stream:
        session = Session(stream, HELLO, Shards(folder))
        async with asyncio.TaskGroup() as tasks:
            if then is not None:
                tasks.create_task(then(session))
            await session.run()
    return session


async def train_step(stream: Stream, driver: Driver, seed: int) -> Delta:
    """Captures out, delta in; the driver's own trainer does the same work and must say the same."""
    batch = random_batch(driver.plans, seed)
    for capture in driver.captures(batch):
        await stream.send(capture)
        assert (await until(stream, Credit)).bytes == sum(t.nbytes for t in capture.tensors)
    await stream.send(driver.step_end(batch, 1))
    delta = await until(stream, Delta)
    (expected,) = driver.train([batch])
    untimed = {"worker_seconds": 0.0, "decode_seconds": 0.0, "tensors": ()}
    assert replace(delta, **untimed) == replace(expected, **untimed)  # type: ignore[arg-type]
    for ours, theirs in zip(delta.tensors, expected.tensors, strict=True):
        assert (bytes(ours.data), ours.checksum) == (bytes(theirs.data), theirs.checksum)
    await stream.send(Ack(driver.job, driver.epoch, delta.step, delta.digest))
    return delta


async def take_snapshot(stream: Stream, driver: Driver) -> None:
    await stream.send(SnapshotRequest(driver.job, driver.epoch, driver.step))
    snapshot = await until(stream, Snapshot)
    assert (snapshot.step, snapshot.kept) == (driver.step, True)


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    driver = Driver.of(ADAMW, shard_plans(FAMILIES["lora"]), Trainer(Shards(tmp_path / "driver")))
    driver.assign()
    return driver


@pytest.mark.parametrize("chunk_bytes", [0, 64, 1 << 20, 1 << 40])
async def test_what_goes_over_the_stream_is_what_the_trainer_does(
    chunk_bytes: int, driver: Driver, tmp_path: Path
) -> None:
    async def script(stream: Stream) -> None:
        assert await welcome(stream, replace(WELCOME, chunk_bytes=chunk_bytes)) == HELLO
        await stream.send(driver.assignment())
        for step in range(3):
            await train_step(stream, driver, step)
        await stream.goodbye("done")

    async with serving(script) as address:
        session = await attend(address, tmp_path / "worker")
    assert session.welcomed
    assert not session.draining
    assert driver.step == 3


@pytest.mark.parametrize("rows", ["all", "exact"])
@pytest.mark.parametrize(("values", "deltas"), [("int8", "int8"), ("fp16", "int4"), ("fp32", "bf16")])
async def test_gradients_and_coded_deltas_go_over_the_stream(
    rows: str, values: str, deltas: str, tmp_path: Path
) -> None:
    plans, theirs = shard_plans(FAMILIES["lora"], rows), Trainer(Shards(tmp_path / "driver"))
    driver = Driver.of(ADAMW, plans, theirs, values=values, deltas=deltas)
    driver.assign()

    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        for step in range(2):
            assert {tensor.codec for tensor in (await train_step(stream, driver, step)).tensors} == {deltas}
        await take_snapshot(stream, driver)
        driver.snapshot()
        driver.go_on()
        await stream.send(driver.assignment())  # with all that its snapshot holds
        await train_step(stream, driver, 2)
        await stream.goodbye("done")

    async with serving(script) as address:
        await attend(address, tmp_path / "worker")
    assert driver.step == 3


async def test_a_capture_that_was_not_assigned_is_refused_and_credited_and_not_read(
    driver: Driver, tmp_path: Path
) -> None:
    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        capture = driver.captures(random_batch(driver.plans, 0))[0]
        wide = encode(torch.zeros(9, 50_000), "fp32")
        await stream.send(replace(capture, parts=(Part("x", 1, 0),), tensors=(wide,)))
        refusal, credit = await until(stream, Refusal), await until(stream, Credit)
        assert (refusal.job, refusal.epoch, refusal.reason) == (driver.job, 1, Reason.PROTOCOL_VIOLATION)
        assert credit.bytes == wide.nbytes
        await stream.send(replace(capture, epoch=9))
        assert (await until(stream, Refusal)).reason == Reason.STALE_EPOCH
        assert (await until(stream, Credit)).bytes == sum(t.nbytes for t in capture.tensors)
        await stream.send(replace(driver.assignment(), values="int3"))
        assert (await until(stream, Refusal)).reason == Reason.UNSUPPORTED_CODEC
        await train_step(stream, driver, 1)
        await stream.send(Revoke(driver.job, 1, "a test", keep=False))
        await stream.send(capture)
        assert (await until(stream, Refusal)).reason == Reason.STALE_EPOCH
        await stream.goodbye("done")

    async with serving(script) as address:
        await attend(address, tmp_path / "worker")


async def test_heartbeats_tell_of_the_trainer_and_not_of_the_loop(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    handle = Trainer.handle

    def slow(trainer: Trainer, message: ToTrainer) -> list[ToServer]:
        go_on.wait(10)
        return handle(trainer, message)

    async def script(stream: Stream) -> None:
        await welcome(stream)
        idle = await until(stream, Heartbeat)
        assert idle == Heartbeat(0, 0.0)
        await stream.send(driver.assignment())
        beats = [await until(stream, Heartbeat) for _ in range(6)]
        assert {b.progress for b in beats} == {0}
        assert beats[-1].busy_seconds > beats[-2].busy_seconds > beats[-3].busy_seconds > 0
        go_on.set()
        while (await until(stream, Heartbeat)) != Heartbeat(1, 0.0):
            pass
        await stream.goodbye("done")

    monkeypatch.setattr(Trainer, "handle", slow)
    async with serving(script) as address:
        await attend(address, tmp_path / "worker")
    assert go_on.is_set()


@pytest.mark.parametrize("asked_by", ["signal", "server"])
async def test_draining_gives_the_jobs_back_and_keeps_their_state(
    asked_by: str, driver: Driver, tmp_path: Path
) -> None:
    assigned = asyncio.Event()

    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        await train_step(stream, driver, 0)
        assigned.set()
        if asked_by == "server":
            await stream.send(Drain())
        await until(stream, Draining)
        await train_step(stream, driver, 1)  # what has begun may end
        await take_snapshot(stream, driver)
        await stream.send(Revoke(driver.job, 1, "the worker leaves", keep=True))
        await stream.goodbye("all jobs have gone")

    async def then(session: Session) -> None:
        await assigned.wait()
        if asked_by == "signal":
            session.drain()

    async with serving(script) as address:
        session = await attend(address, tmp_path / "worker", then)
    assert session.draining
    assert {(o.job, o.step) for o in Shards(tmp_path / "worker").owned()} == {(driver.job, 2)}


async def test_a_server_that_does_not_let_go_is_left(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DRAIN_SECONDS", 0.2)
    monkeypatch.setattr(module, "GOODBYE_SECONDS", 0.2)
    ends: list[Exception] = []

    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        try:
            await until(stream, Delta)
        except Exception as end:
            ends.append(end)
            raise

    async def then(session: Session) -> None:
        session.drain()

    async with serving(script) as address:
        await attend(address, tmp_path / "worker", then)
        await asyncio.sleep(0.1)
    assert [str(end) for end in ends] == ["drained"]  # a Goodbye, not a broken stream


async def test_a_stream_that_breaks_leaves_what_the_last_snapshot_kept(driver: Driver, tmp_path: Path) -> None:
    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        await train_step(stream, driver, 0)
        await take_snapshot(stream, driver)
        await train_step(stream, driver, 1)
        raise ColaError(Reason.SERVER_DRAINING)

    async with serving(script) as address:
        with pytest.raises(ExceptionGroup) as caught:
            await attend(address, tmp_path / "worker")
    (broken,) = caught.value.exceptions
    assert isinstance(broken, StreamBroken)
    assert broken.error is not None
    assert broken.error.reason == Reason.SERVER_DRAINING
    assert {(o.job, o.step) for o in Shards(tmp_path / "worker").owned()} == {(driver.job, 1)}


@pytest.mark.parametrize("first", ["nothing", "something else"])
async def test_a_server_without_a_welcome_is_not_followed(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WELCOME_SECONDS", 0.3)

    async def script(stream: Stream) -> None:
        await stream.receive()
        if first == "something else":
            await stream.send(Drain())
        await asyncio.sleep(5)

    async with serving(script) as address, worker_stream(address) as stream:
        session = Session(stream, HELLO, Shards(tmp_path))
        with pytest.raises(ColaError) as caught:
            await session.run()
    assert caught.value.reason == Reason.PROTOCOL_VIOLATION
    assert not session.welcomed


async def test_a_second_welcome_is_not_followed(tmp_path: Path) -> None:
    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(WELCOME)
        await until(stream, Delta)

    async with serving(script) as address, worker_stream(address) as stream:
        with pytest.raises(ColaError) as caught:
            await Session(stream, HELLO, Shards(tmp_path)).run()
    assert caught.value.reason == Reason.PROTOCOL_VIOLATION


async def test_a_defect_of_the_trainer_ends_the_session_by_its_name(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(trainer: Trainer, message: ToTrainer) -> list[ToServer]:
        raise ZeroDivisionError("a defect")

    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        await until(stream, Delta)

    monkeypatch.setattr(Trainer, "handle", broken)
    async with serving(script) as address, worker_stream(address) as stream:
        with pytest.raises(ZeroDivisionError):
            await Session(stream, HELLO, Shards(tmp_path)).run()


@pytest.mark.parametrize("draining", [False, True])
async def test_a_trainer_that_hangs_ends_the_process_and_not_the_session_alone(
    draining: bool, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(module, "STOP_SECONDS" if draining else "HANG_SECONDS", 0.2)
    monkeypatch.setattr(Trainer, "handle", lambda *_: go_on.wait(10) and [])

    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        while (await until(stream, Heartbeat)).busy_seconds == 0:
            pass
        await stream.goodbye("done")

    async with serving(script) as address, worker_stream(address) as stream:
        session = Session(stream, HELLO, Shards(tmp_path))
        running = asyncio.create_task(session.run())
        if draining:  # a signal, while the session waits for its trainer
            await asyncio.sleep(0.5)
            session.drain()
        with pytest.raises(ColaError) as caught:
            await asyncio.wait_for(running, 5)
    assert caught.value.reason == Reason.INTERNAL
    go_on.set()
    await asyncio.sleep(0.1)  # the thread ends while its loop still lives


async def test_a_backlog_slows_its_sender_down(driver: Driver, tmp_path: Path) -> None:
    """No more than the limit and one message is ever held for a trainer that is behind."""
    go_on, handled = threading.Event(), []

    class Slow(Trainer):
        def handle(self, message: ToTrainer) -> list[ToServer]:
            go_on.wait(10)
            handled.append(message)
            return [Draining()]

        def close(self) -> None:
            pass

    frames = driver.captures(random_batch(driver.plans, 0)) * 4
    size = max(sum(t.nbytes for t in f.tensors) for f in frames)
    answers: asyncio.Queue[ToServer] = asyncio.Queue()
    thread = TrainerThread(Slow(Shards(tmp_path)), answers.put_nowait, backlog_bytes=2 * size)
    put = 0

    async def feed() -> None:
        nonlocal put
        for frame in frames:
            await thread.put(frame)
            put += 1

    feeding = asyncio.create_task(feed())
    await asyncio.sleep(0.1)
    assert 0 < put < len(frames)
    go_on.set()
    await feeding
    for _ in frames:
        await answers.get()
    assert handled == frames
    assert thread.progress == len(frames)
    assert await thread.stop(5)


async def test_credit_tells_how_long_its_capture_was_here_whatever_it_waited_for(
    driver: Driver, tmp_path: Path
) -> None:
    busy = 0.1

    class Slow(Trainer):
        def handle(self, message: ToTrainer) -> list[ToServer]:
            time.sleep(busy)
            return super().handle(message)

    frames = driver.captures(random_batch(driver.plans, 0))
    answers: asyncio.Queue[ToServer] = asyncio.Queue()
    thread = TrainerThread(Slow(Shards(tmp_path)), answers.put_nowait, backlog_bytes=1)
    began = time.monotonic()
    await thread.put(driver.assignment())
    feeding = [asyncio.create_task(thread.put(frame)) for frame in frames]
    credits_ = [await answers.get() for _ in frames]
    ended = time.monotonic() - began
    for number, credit in enumerate(credits_):
        assert isinstance(credit, Credit)
        assert (number + 1) * busy < credit.seconds < ended  # behind those before it
    await asyncio.gather(*feeding)
    assert await thread.stop(5)


@pytest.mark.parametrize("keep", [True, False])
async def test_a_revocation_just_before_the_end_is_followed(
    keep: bool, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the trainer is behind and has not come to it when the stream ends."""
    go_on = threading.Event()
    handle = Trainer.handle

    def slow(trainer: Trainer, message: ToTrainer) -> list[ToServer]:
        if isinstance(message, Capture):
            go_on.wait(10)
        return handle(trainer, message)

    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        await take_snapshot(stream, driver)
        for capture in driver.captures(random_batch(driver.plans, 0)):
            await stream.send(capture)
        while (await until(stream, Heartbeat)).busy_seconds == 0:
            pass
        await stream.send(Revoke(driver.job, 1, "cancelled", keep=keep))
        await stream.goodbye("the server stops")
        asyncio.get_running_loop().call_later(0.2, go_on.set)

    monkeypatch.setattr(Trainer, "handle", slow)
    driver.trainers = ()
    async with serving(script) as address:
        await attend(address, tmp_path / "worker")
    assert len(Shards(tmp_path / "worker").owned()) == (len(driver.plans) if keep else 0)


# --- the lease --------------------------------------------------------------------------------------------------------

LEASE = 0.5


async def lived(address: str, folder: Path) -> tuple[StreamBroken, float]:
    """Returns: how a session broke, and after how many seconds."""
    began = time.monotonic()
    async with worker_stream(address) as stream:
        with pytest.raises(StreamBroken) as caught:
            await Session(stream, HELLO, Shards(folder)).run()
    return caught.value, time.monotonic() - began


@pytest.mark.parametrize("reads", [True, False])
async def test_a_worker_that_hears_nothing_for_its_lease_gives_the_session_up(reads: bool, tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def script(stream: Stream) -> None:
        await welcome(stream, replace(WELCOME, lease_seconds=LEASE))
        if not reads:  # as a server that is frozen
            await asyncio.sleep(3 * LEASE)
        try:
            await until(stream, Delta)
        finally:
            gone.set()

    async with serving(script) as address:
        broken, seconds = await lived(address, tmp_path)
        assert broken.error is not None
        assert broken.error.message == "the server cannot be reached: it was silent for 0.5 s"
        assert LEASE <= seconds < LEASE + 0.5
        await asyncio.wait_for(gone.wait(), 5)
    assert not [thread for thread in threading.enumerate() if thread.name == "trainer"]


@pytest.mark.parametrize("what", ["heartbeats", "a long message"])
async def test_a_server_that_speaks_is_followed_for_as_long_as_it_does(
    what: str, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one message takes longer than the lease, on a slow link: each envelope of it is heard."""
    spoken = 0.0

    async def script(stream: Stream) -> None:
        nonlocal spoken
        await welcome(stream, replace(WELCOME, lease_seconds=LEASE))
        began = time.monotonic()
        if what == "heartbeats":
            for _ in range(30):
                await stream.send(Heartbeat(0, 0.0))
                await asyncio.sleep(LEASE / 10)
        else:
            transport = stream._transport
            write = transport.write

            async def slowly(envelope: bytes) -> None:
                await asyncio.sleep(LEASE / 4)
                await write(envelope)

            monkeypatch.setattr(transport, "write", slowly)
            stream.chunk_bytes = 40
            await stream.send(driver.assignment())
        spoken = time.monotonic() - began
        await until(stream, Delta)

    async with serving(script) as address:
        _, seconds = await lived(address, tmp_path)
    assert spoken > 2 * LEASE
    assert seconds >= spoken + LEASE - 0.05


async def test_a_worker_that_does_not_listen_blames_nobody_for_silence(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that is behind by a window keeps the session from reading. That is not the server's silence."""
    handle = Trainer.handle

    def slow(trainer: Trainer, message: ToTrainer) -> list[ToServer]:
        if isinstance(message, Capture):
            time.sleep(2 * LEASE)
        return handle(trainer, message)

    batch = random_batch(driver.plans, 0)
    captures = driver.captures(batch)
    window = max(sum(t.nbytes for t in capture.tensors) for capture in captures)

    async def script(stream: Stream) -> None:
        await welcome(stream, replace(WELCOME, lease_seconds=LEASE, window_bytes=window))
        await stream.send(driver.assignment())
        for capture in captures:
            await stream.send(capture)
        await stream.send(driver.step_end(batch, 1))
        beating = asyncio.create_task(beat(stream))
        await until(stream, Delta)
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await stream.goodbye("done")

    async def beat(stream: Stream) -> None:
        while True:
            await stream.send(Heartbeat(0, 0.0))
            await asyncio.sleep(LEASE / 5)

    monkeypatch.setattr(Trainer, "handle", slow)
    assert len(captures) > 2
    async with serving(script) as address:
        assert (await attend(address, tmp_path / "worker")).welcomed


async def test_a_trainer_that_is_slow_when_the_stream_breaks_is_waited_for(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the server learns of the end at once."""
    monkeypatch.setattr(module, "STOP_SECONDS", 0.1)
    handle, handled = Trainer.handle, []
    gone = 0.0

    def slow(trainer: Trainer, message: ToTrainer) -> list[ToServer]:
        time.sleep(3 * LEASE)
        handled.append(message)
        return handle(trainer, message)

    async def script(stream: Stream) -> None:
        nonlocal gone
        began = time.monotonic()
        await welcome(stream, replace(WELCOME, lease_seconds=LEASE))
        await stream.send(driver.assignment())
        with suppress(StreamBroken):
            await until(stream, Delta)
        gone = time.monotonic() - began

    monkeypatch.setattr(Trainer, "handle", slow)
    async with serving(script) as address:
        _, seconds = await lived(address, tmp_path / "worker")
    assert len(handled) == 1
    assert 0 < gone < 2 * LEASE < seconds


def test_nothing_here_waits_for_long() -> None:
    """What an orchestrator gives a process between SIGTERM and SIGKILL is 30 s."""
    assert module.HANG_SECONDS == LONGEST_SECONDS  # who is waited for by the server may take as long here
    assert module.DRAIN_SECONDS + module.GOODBYE_SECONDS + module.STOP_SECONDS < 30
