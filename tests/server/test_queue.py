"""The queue of jobs: what is asked of one that is not under way."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cola_common import ids
from cola_common.jobs import Job, JobSpec, JobStatus
from cola_server.jobs import Artefacts
from cola_server.tenants import Quotas
from cola_server.training.admission import Admission
from cola_server.training.queue import JobQueue
from tests.server.test_turn import settle


@pytest.fixture
def artefacts(tmp_path: Path) -> Iterator[Artefacts]:
    artefacts = Artefacts(tmp_path / "data")
    yield artefacts
    artefacts.close()


async def test_the_snapshots_of_a_held_job_go_with_it_when_it_is_cancelled(artefacts: Artefacts) -> None:
    """As after a restart: nothing runs that could remove them."""
    cohorts = SimpleNamespace(rest=lambda tenant: None)
    services: Any = SimpleNamespace(artefacts=artefacts, quotas=Quotas(), admission=Admission(0), cohorts=cohorts)
    queue = JobQueue(services)
    held, other = ids.new("ftjob"), ids.new("ftjob")
    for job in (held, other):
        artefacts.write_snapshot(job, "1.safetensors", b"x")
    spec = JobSpec(model="llama", training_file=ids.new("file"))
    queue.cancel(Job(id=held, created_at=0.0, status=JobStatus.PAUSED, spec=spec))
    await settle()
    await asyncio.get_running_loop().shutdown_default_executor()  # what it does aside is done
    assert artefacts.ids() == {other}
