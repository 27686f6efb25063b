"""What a job leaves in the store while it runs: metrics, events, checkpoints, and its end."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from cola_common.errors import ColaError, Reason
from cola_common.jobs import FileObject, Job, JobFailure, JobStatus, StepMetrics, WirePlan
from cola_server.jobs import JobStore
from cola_server.jobs.rows import sources_of
from cola_server.training.snapshots import Snapshot


class Records:
    """One job's records. Every method commits off the event loop."""

    def __init__(self, job: str, store: JobStore) -> None:
        self._job = job
        self._store = store

    async def job(self) -> Job:
        """The job as it stands."""
        return await asyncio.to_thread(self._store.job, self._job)

    async def files(self) -> list[FileObject]:
        """The uploads that the job reads."""

        def read() -> list[FileObject]:
            sources = sources_of(self._store.job(self._job).spec)
            return [self._store.file(id) for id in sources if id.startswith("file-")]

        return await asyncio.to_thread(read)

    async def members(self) -> list[Job]:
        """The jobs of its collaboration, oldest first."""
        return await asyncio.to_thread(self._store.members, self._job)

    async def validated(self, examples: int, total_steps: int) -> None:
        """The files are read: the job may run."""

        def write() -> None:
            self._store.set_total_steps(self._job, total_steps)
            text = f"Files validated: {examples} examples, {total_steps} steps. Queued."
            with _unless_illegal():  # it was validated before, or has been paused or cancelled meanwhile
                self._store.transition(self._job, JobStatus.QUEUED, source=JobStatus.VALIDATING_FILES, event=text)

        await asyncio.to_thread(write)

    async def running(self) -> bool:
        """The job has its turn. Returns: False where its user has just paused or cancelled it."""

        def write() -> bool:
            with _unless_illegal():
                self._store.transition(self._job, JobStatus.RUNNING, source=JobStatus.QUEUED, event="Running.")
            return self._store.job(self._job).status == JobStatus.RUNNING

        return await asyncio.to_thread(write)

    async def begin_epoch(self, start: Snapshot | None, plan: WirePlan) -> int:
        """A new epoch, committed before anything is assigned under it; the log tells where it goes on from, and what
        travels from now on where that is new.
        """

        def write() -> int:
            step, tokens = (start.step, start.trained_tokens) if start else (0, 0)
            earlier = self._store.job(self._job).wire_plan
            epoch = self._store.begin_epoch(self._job, step=step, trained_tokens=tokens, wire_plan=plan)
            if plan != earlier:
                self._store.add_event(self._job, _wire_text(plan), data=plan.model_dump())
            if start:
                self._store.add_event(self._job, f"Going on from the snapshot after step {step}.", data={"step": step})
            elif epoch > 1:
                self._store.add_event(self._job, "Starting again: there is no snapshot yet.", data={"step": 0})
            return epoch

        return await asyncio.to_thread(write)

    async def await_group(self, text: str) -> None:
        """The job waits for others."""

        def write() -> None:
            if self._store.job(self._job).status == JobStatus.RUNNING:
                with _unless_illegal():
                    self._store.transition(self._job, JobStatus.QUEUED, source=JobStatus.RUNNING, event=text)
            else:
                self._store.add_event(self._job, text)

        await asyncio.to_thread(write)

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

        await asyncio.to_thread(
            self._store.record_step,
            self._job,
            metrics,
            trained_tokens=trained_tokens,
            estimated_finish=finish,
            message=text,
            data=dict(numbers),
        )

    async def tell(self, message: str, level: Literal["info", "warn", "error"] = "info") -> None:
        """An event in words."""
        await asyncio.to_thread(lambda: self._store.add_event(self._job, message, level=level))

    async def hold(self, error: ColaError) -> None:
        """The job waits for its user; one that was paused or has ended meanwhile stays so."""

        def write() -> None:
            with _unless_illegal():
                self._store.transition(self._job, JobStatus.PAUSED, event=f"Paused: {error.message}.", level="error")

        await asyncio.to_thread(write)

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


def _wire_text(plan: WirePlan) -> str:
    rows = f"{plan.rows} {plan.sketch_rows}" if plan.rows == "sketch" else plan.rows
    return f"On the wire: {rows} rows in {plan.values}, deltas in {plan.deltas}: {plan.reason}."


@contextmanager
def _unless_illegal() -> Iterator[None]:
    """Passes over a move that the job's status no longer allows: its user was faster."""
    try:
        yield
    except ColaError as error:
        if error.reason != Reason.ILLEGAL_TRANSITION:
            raise
