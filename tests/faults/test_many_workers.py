"""Many workers that lose their server at once, and come back at once."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import pytest

from cola_common import ids
from cola_common.messages import Capacity, ToServer, ToWorker
from cola_common.rpc.channels import connect
from cola_common.rpc.duplex import Duplex
from cola_common.rpc.fleet import attend
from cola_worker.shards import Shards
from cola_worker.supervisor import Supervisor
from tests.support.cluster import Cluster

MANY = 100


@asynccontextmanager
async def _stream(address: str) -> AsyncIterator[Duplex[ToServer, ToWorker]]:
    async with connect(address) as channel:
        yield attend(channel)


async def _crowd(address: str, folder: Path, leave: asyncio.Event) -> None:
    """The worker's own supervisor and session, so many times over, without a trainer that has anything to do."""
    capacity = Capacity(cores=1, memory_bytes=1 << 30, device="cpu", gflops=1.0)
    crowd = [
        Supervisor(
            lambda: _stream(address),
            worker=ids.new("wkr"),
            boot=time.time_ns(),
            capacity=capacity,
            shards=Shards(folder / str(number)),
        )
        for number in range(MANY)
    ]
    lives = [asyncio.create_task(supervisor.run()) for supervisor in crowd]
    await leave.wait()
    for supervisor in crowd:
        supervisor.drain()
    await asyncio.gather(*lives)


@pytest.fixture
def crowd(model: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A server that a hundred workers of this process attend."""
    with Cluster(tmp_path, {"llama": model}, workers=0) as cluster:
        loop, leave = asyncio.new_event_loop(), asyncio.Event()
        work = _crowd(cluster.address, tmp_path / "crowd", leave)
        thread = threading.Thread(target=lambda: loop.run_until_complete(work))
        thread.start()
        try:
            cluster.await_workers(MANY)
            yield cluster
        finally:
            loop.call_soon_threadsafe(leave.set)
            thread.join(30)
            loop.close()


@pytest.mark.alone
def test_workers_that_lost_their_server_are_back_within_five_seconds_and_not_all_at_once(crowd: Cluster) -> None:
    crowd.server.kill()
    time.sleep(2)  # they have tried in vain, and wait longer each time
    before = len(crowd.server.said())
    crowd.start_server()
    serves = time.monotonic()
    crowd.await_workers(MANY)
    assert time.monotonic() - serves <= 5
    times = re.findall(r"^(\S+) .*worker attends", crowd.server.said()[before:], re.MULTILINE)
    came = sorted(datetime.fromisoformat(each).timestamp() for each in times)
    assert len(came) == MANY
    assert came[-1] - came[0] > 1.0, "they came in one rush"
