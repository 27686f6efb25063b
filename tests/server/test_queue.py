"""The queue of jobs: what is asked of one that is not under way."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cola_common import ids
from cola_server.jobs import Artefacts
from cola_server.training.queue import JobQueue
from tests.server.test_turn import settle


@pytest.fixture
def artefacts(tmp_path: Path) -> Iterator[Artefacts]:
    artefacts = Artefacts(tmp_path / "data")
    yield artefacts
    artefacts.close()


async def test_the_snapshots_of_a_held_job_go_with_it_when_it_is_cancelled(artefacts: Artefacts) -> None:
    """As after a restart: nothing runs that could remove them."""
    services: Any = SimpleNamespace(artefacts=artefacts, max_running_jobs=1)
    queue = JobQueue(services)
    held, other = ids.new("ftjob"), ids.new("ftjob")
    for job in (held, other):
        artefacts.write_snapshot(job, "1.safetensors", b"x")
    queue.cancel(held)
    await settle()
    await asyncio.get_running_loop().shutdown_default_executor()  # what it does aside is done
    assert artefacts.ids() == {other}
