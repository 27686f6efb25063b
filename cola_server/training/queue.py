"""The jobs of a server: each runs as a task from its submission on, and the line lets so many of them run at once.

`submit`, `cancel`, `pause` and `resume` may be called from any thread: the rules that allow them and the statuses that
they leave are those of `cola_server.jobs`.
"""

import asyncio
from collections.abc import Callable

import structlog

from cola_server.training.run import JobRun
from cola_server.training.services import Services
from cola_server.training.turn import Turn

DRAIN_SECONDS = 20.0  # with the rest of the shutdown it stays within the usual 30 of an orchestrator

log = structlog.get_logger(__name__)


class JobQueue:
    """See the module."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._line = asyncio.Semaphore(services.max_running_jobs)
        self._preparing = asyncio.Lock()  # one at a time, so that jobs come to the line in the order of submission
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns: dict[str, Turn] = {}
        self._closing = False

    def submit(self, job: str) -> None:
        """Lets the job run as soon as its turn comes."""
        self._call(self._submit, job)

    def cancel(self, job: str) -> None:
        """Ends the job's task; its workers are told, its batch in the model comes to nothing."""
        self._call(self._cancel, job)

    def pause(self, job: str) -> None:
        """The job gives up its turn at its next step; where it waits in line, it waits without a turn."""
        self._call(self._pause, job)

    def resume(self, job: str) -> None:
        """The job goes on when its turn comes."""
        self._call(self._resume, job)

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

    def _call(self, function: Callable[[str], None], job: str) -> None:
        self._loop.call_soon_threadsafe(function, job)

    def _submit(self, job: str) -> None:
        if self._closing or job in self._tasks:
            return
        turn = self._turns[job] = Turn(self._line)
        run = JobRun(job, self._services, turn, self._preparing)
        task = self._tasks[job] = self._loop.create_task(run.run(), name=job)
        task.add_done_callback(lambda task: self._done(job, task))

    def _cancel(self, job: str) -> None:
        if job in self._tasks:
            self._tasks[job].cancel()  # its run removes the snapshots, when it writes no more
        else:
            self._loop.run_in_executor(None, self._services.artefacts.remove_snapshots, job)

    def _pause(self, job: str) -> None:
        if job in self._turns:
            self._turns[job].pause()

    def _resume(self, job: str) -> None:
        if job in self._turns:
            self._turns[job].resume()
        else:
            self._submit(job)

    def _done(self, job: str, task: asyncio.Task[None]) -> None:
        del self._tasks[job], self._turns[job]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("job broke", job=job, exc_info=error)
