"""The jobs of a server: each runs as a task from its submission on, and the line lets so many of them run at once.

`submit`, `cancel`, `pause`, `resume` and `place` may be called from any thread: the rules that allow them and the
statuses that they leave are those of `cola_server.jobs`.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from cola_common.jobs import Job
from cola_server.training.group import Group
from cola_server.training.line import Line
from cola_server.training.records import Records
from cola_server.training.run import JobRun
from cola_server.training.services import Services
from cola_server.training.turn import Turn

READERS = 3  # of the threads that also record steps and answer calls, of which there are five at least
DRAIN_SECONDS = 20.0  # with the rest of the shutdown it stays within the usual 30 of an orchestrator

log = structlog.get_logger(__name__)


class JobQueue:
    """See the module."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._line = Line(services.quotas, services.admission, services.cohorts.rest)
        self._readers = asyncio.Semaphore(READERS)
        self._orders: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns: dict[str, Turn] = {}
        self._groups: dict[str, Group] = {}
        self._closing = False

    def submit(self, job: Job) -> None:
        """Lets the job run as soon as its turn comes."""
        self._call(self._submit, job)

    def cancel(self, job: Job) -> None:
        """Ends the job's task; its workers are told, its batch in the model comes to nothing."""
        self._call(self._cancel, job)

    def pause(self, job: Job) -> None:
        """The job gives up its turn at its next step; one that waits in line leaves it."""
        self._call(self._pause, job)

    def resume(self, job: Job) -> None:
        """The job goes on when its turn comes, at the end of the line."""
        self._call(self._resume, job)

    def place(self, job: str) -> int | None:
        """Where the job stands in the line."""
        turn = self._turns.get(job)
        return None if turn is None else turn.number

    async def drain(self) -> None:
        """Lets running jobs come to a snapshot at their next step, for `DRAIN_SECONDS` at most, and starts none."""
        self._closing = True
        for turn in self._turns.values():
            turn.stop()
        running = [self._tasks[job] for job, turn in self._turns.items() if turn.held]
        if running:
            await asyncio.wait(running, timeout=DRAIN_SECONDS)

    async def close(self) -> None:
        """Ends every task. The jobs keep their statuses: a server that starts again goes on with them."""
        self._closing = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _call(self, function: Callable[[Job], None], job: Job) -> None:
        self._loop.call_soon_threadsafe(function, job)

    def _submit(self, job: Job) -> None:
        id, tenant = job.id, job.tenant
        if self._closing or id in self._tasks:
            return
        group = self._group(job)
        turn = self._turns[id] = Turn(group or self._line, id, job.tenant)
        run = JobRun(id, self._services, turn, lambda: self._preparing(tenant), group)
        task = self._tasks[id] = self._loop.create_task(run.run(), name=id)
        task.add_done_callback(lambda task: self._done(job, task))
        if group is not None:
            group.join(id, turn, task)

    def _group(self, job: Job) -> Group | None:
        """The group that the job is in, made for the first of its members that comes."""
        about = job.spec.collaboration
        if job.group_id is None or about is None:
            return None
        if job.group_id not in self._groups:
            self._groups[job.group_id] = Group(job.group_id, about.group, about.size, self._line, self._wait_for_group)
        return self._groups[job.group_id]

    async def _wait_for_group(self, job: str, text: str) -> None:
        await Records(job, self._services.store).await_group(text)

    @asynccontextmanager
    async def _preparing(self, tenant: str) -> AsyncIterator[None]:
        """Held while a job's files are read: by one of a tenant's jobs, so that they come to the line in the order of
        their submission, and nobody's flood keeps another's waiting.
        """
        async with self._orders[tenant], self._readers:
            yield

    def _cancel(self, job: Job) -> None:
        if job.id in self._tasks:
            self._tasks[job.id].cancel()  # its run removes the snapshots, when it writes no more
        else:
            self._loop.run_in_executor(None, self._services.artefacts.remove_snapshots, job.id)
        if job.group_id in self._groups:
            self._groups[job.group_id].dissolve(job.id)

    def _pause(self, job: Job) -> None:
        if job.id in self._turns:
            self._turns[job.id].pause()

    def _resume(self, job: Job) -> None:
        if job.id in self._turns:
            self._turns[job.id].resume()
        else:
            self._submit(job)

    def _done(self, job: Job, task: asyncio.Task[None]) -> None:
        del self._tasks[job.id], self._turns[job.id]
        if job.group_id in self._groups and self._groups[job.group_id].leave_off(job.id):
            del self._groups[job.group_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("job broke", job=job.id, exc_info=error)
