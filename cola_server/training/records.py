"""What a job leaves in the store while it runs: metrics, events, checkpoints, and its end."""

import asyncio
from collections.abc import Mapping
from typing import Literal

from cola_common.errors import ColaError, Reason
from cola_common.jobs import Job, JobFailure, JobStatus, StepMetrics
from cola_server.jobs import JobStore


class Records:
    """One job's records. Every method commits off the event loop."""

    def __init__(self, job: str, store: JobStore) -> None:
        self._job = job
        self._store = store

    async def job(self) -> Job:
        """The job as it stands."""
        return await asyncio.to_thread(self._store.job, self._job)

    async def validated(self, examples: int, total_steps: int) -> None:
        """The files are read: the job may run."""

        def write() -> None:
            self._store.set_total_steps(self._job, total_steps)
            if self._store.job(self._job).status == JobStatus.VALIDATING_FILES:
                text = f"Files validated: {examples} examples, {total_steps} steps. Queued."
                self._store.transition(self._job, JobStatus.QUEUED, event=text)

        await asyncio.to_thread(write)

    async def running(self) -> bool:
        """The job has its turn. Returns: False where its user has just paused or cancelled it."""
        move = self._store.transition
        try:
            await asyncio.to_thread(move, self._job, JobStatus.RUNNING, source=JobStatus.QUEUED, event="Running.")
        except ColaError as error:
            if error.reason != Reason.ILLEGAL_TRANSITION:
                raise
            return False
        return True

    async def begin_epoch(self) -> int:
        """A new epoch, committed before anything is assigned under it."""
        return await asyncio.to_thread(self._store.begin_epoch, self._job)

    async def waiting(self, waiting: bool) -> None:
        """Whether the job waits for workers."""

        def write() -> None:
            self._store.set_waiting(self._job, waiting)
            if waiting:
                self._store.add_event(self._job, "Waiting for workers.", level="warn")

        await asyncio.to_thread(write)

    async def step(self, metrics: StepMetrics, *, trained_tokens: int, finish: float, total_steps: int) -> None:
        """What a step cost and gave."""
        text = f"Step {metrics.step}/{total_steps}: training loss={metrics.train_loss:.4f}"
        numbers: Mapping[str, float | str] = {"step": metrics.step, "train_loss": metrics.train_loss}
        if metrics.valid_loss is not None:
            text += f", validation loss={metrics.valid_loss:.4f}"
            numbers = {**numbers, "valid_loss": metrics.valid_loss}

        def write() -> None:
            self._store.put_metrics(self._job, metrics)
            self._store.progress(self._job, step=metrics.step, trained_tokens=trained_tokens, estimated_finish=finish)
            self._store.add_event(self._job, text, type="metrics", data=dict(numbers))

        await asyncio.to_thread(write)

    async def tell(self, message: str, level: Literal["info", "warn", "error"] = "info") -> None:
        """An event in words."""
        await asyncio.to_thread(lambda: self._store.add_event(self._job, message, level=level))

    async def finish(self, error: ColaError | None) -> None:
        """The job's end, unless it was cancelled first."""

        def write() -> None:
            if self._store.job(self._job).status.terminal:
                return
            if error is None:
                text = "The job has succeeded."
                self._store.transition(self._job, JobStatus.SUCCEEDED, fine_tuned_model=self._job, event=text)
            else:
                failure = JobFailure(code=error.reason, message=error.message, param=error.details.get("param"))
                text = f"The job has failed: {error.message}"
                self._store.transition(self._job, JobStatus.FAILED, error=failure, event=text, level="error")

        await asyncio.to_thread(write)
