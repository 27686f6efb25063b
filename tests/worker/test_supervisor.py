"""A worker comes back by itself, with what it owns, until it is told that it need not."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cola_common.errors import CATALOGUE, ColaError, Reason
from cola_common.messages import (
    PROTOCOL,
    Capacity,
    Drain,
    Draining,
    Hello,
    Revoke,
    Snapshot,
    SnapshotRequest,
    ToServer,
    ToWorker,
)
from cola_common.rpc.duplex import Duplex
from cola_common.tensor import CODECS
from cola_worker import backoff as module
from cola_worker.backoff import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS
from cola_worker.shards import Shards
from cola_worker.supervisor import FINAL, Supervisor
from cola_worker.trainer import Trainer
from tests.worker.driver import FAMILIES, PLAN, Driver, shard_plans
from tests.worker.stand_in import WELCOME, Stream, serving, until, welcome, worker_stream

WORKER = "wkr-" + "1" * 24
CAPACITY = Capacity(cores=2, memory_bytes=1 << 30, device="cpu", gflops=3.0)


def connect(address: str) -> Callable[[], AbstractAsyncContextManager[Duplex[ToServer, ToWorker]]]:
    return lambda: worker_stream(address)


def supervisor(address: str, folder: Path) -> Supervisor:
    return Supervisor(connect(address), worker=WORKER, boot=7, capacity=CAPACITY, shards=Shards(folder))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(module, "LONGEST_WAIT_SECONDS", 0.1)


UNREAD = (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED)
"""What a server says of a call's token, before it reads the Hello. All else it answers to the Hello."""


def error(reason: Reason) -> ColaError:
    fields = {"worker": WORKER, "problem": "a test", "theirs": "2", "ours": "1", "method": "Attend"}
    return ColaError(reason, **fields)


async def leave(stream: Stream) -> None:
    """The end of a life that a server asked to end."""
    await welcome(stream)
    await stream.send(Drain())
    await until(stream, Draining)
    await stream.goodbye("drained")


@pytest.mark.parametrize("end", ["goodbye", "broken", "error", "silence", "no welcome"])
async def test_a_worker_comes_again_as_itself(end: str, tmp_path: Path) -> None:
    hellos: list[Hello] = []

    async def first(stream: Stream) -> None:
        if end == "no welcome":
            await stream.receive()
            await stream.send(Drain())
            return
        hellos.append(await welcome(stream, replace(WELCOME, lease_seconds=0.3)))
        if end == "goodbye":
            await stream.goodbye("the server stops")
        if end == "error":
            raise ColaError(Reason.SERVER_DRAINING)
        if end == "silence":
            await until(stream, Hello)  # which never comes

    async def second(stream: Stream) -> None:
        hellos.append(await welcome(stream))
        await stream.send(Drain())
        await until(stream, Draining)
        await stream.goodbye("drained")

    async with serving(first, first, second) as address:
        await supervisor(address, tmp_path).run()
    expected = Hello(
        protocol_min=PROTOCOL,
        protocol_max=PROTOCOL,
        worker=WORKER,
        boot=7,
        capacity=CAPACITY,
        codecs=CODECS,
        owned=(),
        reductions=("all", "exact", "sketch"),
    )
    assert hellos == [expected] * (1 if end == "no welcome" else 3)


async def test_what_was_kept_is_offered_in_the_next_life(tmp_path: Path) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), Trainer(Shards(tmp_path / "driver")))
    hellos: list[Hello] = []

    async def first(stream: Stream) -> None:
        hellos.append(await welcome(stream))
        await stream.send(driver.assignment())
        await stream.send(SnapshotRequest(driver.job, 1, 0))
        assert (await until(stream, Snapshot)).kept
        await stream.send(Revoke(driver.job, 1, "paused", keep=True))
        await stream.goodbye("the server stops")

    async def second(stream: Stream) -> None:
        hellos.append(await welcome(stream))
        await stream.goodbye("the server stops")

    async with serving(first, second, leave) as address:
        await supervisor(address, tmp_path / "worker").run()
    assert hellos[0].owned == ()
    assert {(o.job, o.site, o.step) for o in hellos[1].owned} == {(driver.job, p.site, 0) for p in driver.plans}


@pytest.mark.parametrize("reason", sorted(FINAL))
@pytest.mark.parametrize("when", ["before the welcome", "after it"])
async def test_a_worker_that_is_not_wanted_stops_with_the_reason(reason: Reason, when: str, tmp_path: Path) -> None:
    lives = 0

    async def script(stream: Stream) -> None:
        nonlocal lives
        lives += 1
        if when == "after it":
            await welcome(stream)
        elif reason not in UNREAD:
            await stream.receive()
        raise error(reason)

    async with serving(script) as address:
        with pytest.raises(ColaError) as caught:
            await supervisor(address, tmp_path).run()
    assert (caught.value.reason, caught.value.message) == (reason, error(reason).message)
    # Of a Hello that is being written and that nobody will read gRPC may tell that alone: the worker comes once more.
    assert lives == 1 or (reason in UNREAD and when == "before the welcome")
    assert CATALOGUE[reason].status != "UNAVAILABLE"


async def test_waits_grow_and_are_jittered_and_a_welcome_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def uniform(low: float, high: float) -> float:
        assert low == 0
        asked.append(high)
        return 0.0

    async def refuse(stream: Stream) -> None:
        raise ColaError(Reason.UNAVAILABLE, address="here", problem="a test")

    async def once(stream: Stream) -> None:
        await welcome(stream)

    monkeypatch.setattr(random, "uniform", uniform)
    async with serving(refuse, refuse, refuse, refuse, once, refuse, leave) as address:
        await supervisor(address, tmp_path).run()
    assert asked[:6] == [0.04, 0.08, 0.1, 0.1, 0.02, 0.04]


async def test_a_server_that_is_down_is_waited_for(tmp_path: Path) -> None:
    async with serving(leave) as address:
        pass
    worker = supervisor(address, tmp_path)
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(0.3)
    assert not running.done()
    worker.drain()
    await asyncio.wait_for(running, 5)


async def test_draining_ends_a_wait_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 60.0)
    waiting = asyncio.Event()

    async def refuse(stream: Stream) -> None:
        waiting.set()
        raise ColaError(Reason.UNAVAILABLE, address="here", problem="a test")

    async with serving(refuse) as address:
        worker = supervisor(address, tmp_path)
        running = asyncio.create_task(worker.run())
        await waiting.wait()
        await asyncio.sleep(0.2)
        start = time.monotonic()
        worker.drain()
        await running
    assert time.monotonic() - start < 5


async def test_a_wrong_setting_is_told_and_not_tried_again(tmp_path: Path) -> None:
    tries = 0

    @asynccontextmanager
    async def wrong() -> AsyncIterator[Any]:
        nonlocal tries
        tries += 1
        raise ColaError(Reason.INVALID_CONFIG, setting="root_certificates", problem="no such file")
        yield

    with pytest.raises(ColaError) as caught:
        await Supervisor(wrong, worker=WORKER, boot=7, capacity=CAPACITY, shards=Shards(tmp_path)).run()
    assert (caught.value.reason, tries) == (Reason.INVALID_CONFIG, 1)


def test_a_server_that_is_back_is_found_within_five_seconds() -> None:
    assert 0 < FIRST_WAIT_SECONDS < LONGEST_WAIT_SECONDS < 5
