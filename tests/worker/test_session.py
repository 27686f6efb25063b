"""A session over loopback: what goes in, what comes out, and every way to end."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.messages import (
    PROTOCOL,
    Ack,
    Capacity,
    Credit,
    Delta,
    Drain,
    Draining,
    Heartbeat,
    Hello,
    Part,
    Refusal,
    Revoke,
    ToServer,
)
from cola_common.rpc.duplex import StreamBroken
from cola_common.tensor import CODECS, encode
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
    assert replace(delta, worker_seconds=0, tensors=()) == replace(expected, worker_seconds=0, tensors=())
    for ours, theirs in zip(delta.tensors, expected.tensors, strict=True):
        assert (bytes(ours.data), ours.checksum) == (bytes(theirs.data), theirs.checksum)
    await stream.send(Ack(driver.job, driver.epoch, delta.step, delta.digest))
    return delta


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
    assert {o.job for o in Shards(tmp_path / "worker").owned()} == {driver.job}


async def test_a_stream_that_breaks_keeps_what_the_worker_had(driver: Driver, tmp_path: Path) -> None:
    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        await train_step(stream, driver, 0)
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


async def test_a_trainer_that_hangs_ends_the_process_and_not_the_session_alone(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(Trainer, "handle", lambda *_: go_on.wait(10) and [])

    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        while (await until(stream, Heartbeat)).busy_seconds == 0:
            pass
        await stream.goodbye("done")

    async with serving(script) as address, worker_stream(address) as stream:
        with pytest.raises(ColaError) as caught:
            await Session(stream, HELLO, Shards(tmp_path)).run()
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


@pytest.mark.parametrize("keep", [True, False])
async def test_a_revocation_just_before_the_end_is_followed(
    keep: bool, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the trainer is behind and has not come to it when the stream ends."""
    go_on = threading.Event()
    handle = Trainer.handle

    def slow(trainer: Trainer, message: ToTrainer) -> list[ToServer]:
        go_on.wait(10)
        return handle(trainer, message)

    async def script(stream: Stream) -> None:
        await welcome(stream)
        await stream.send(driver.assignment())
        while (await until(stream, Heartbeat)).busy_seconds == 0:
            pass
        for capture in driver.captures(random_batch(driver.plans, 0)):
            await stream.send(capture)
        await stream.send(Revoke(driver.job, 1, "cancelled", keep=keep))
        await stream.goodbye("the server stops")
        asyncio.get_running_loop().call_later(0.2, go_on.set)

    monkeypatch.setattr(Trainer, "handle", slow)
    driver.trainers = ()
    async with serving(script) as address:
        await attend(address, tmp_path / "worker")
    assert len(Shards(tmp_path / "worker").owned()) == (len(driver.plans) if keep else 0)


def test_nothing_here_waits_for_long() -> None:
    """What an orchestrator gives a process between SIGTERM and SIGKILL is 30 s."""
    assert module.DRAIN_SECONDS + module.GOODBYE_SECONDS + module.STOP_SECONDS < 30
