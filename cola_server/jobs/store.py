"""Jobs, their events and metrics, files and checkpoints, in an SQL database. Knows no rules but those that a database
must keep: a status moves along legal transitions, events are only appended, a repeated step overwrites, a key that
was seen before makes nothing new.

Synchronous; any thread may call. What a method did is committed when it returns.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cola_common import ids
from cola_common.errors import ColaError, Reason
from cola_common.jobs import (
    DEFAULT_TENANT,
    Checkpoint,
    FileObject,
    Job,
    JobEvent,
    JobFailure,
    JobSpec,
    JobStatus,
    StepMetrics,
    WirePlan,
    check_transition,
)
from cola_server.jobs import groups, records, rows
from cola_server.jobs.database import Database
from cola_server.jobs.tables import CheckpointRow, EventRow, FileRow, JobRow, MetricsRow

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics", "status"]


class JobStore:
    """All records of a server, at a database URL such as `sqlite:////var/lib/cola/cola.db`; `of` gives a tenant's."""

    def __init__(self, url: str, *, create: bool) -> None:
        """`create` allows to make the database where there is none: not where there are artefacts, whose database it
        would have been. Raises: as `cola_server.jobs.database.Database`.
        """
        self._database = Database(url, create=create)
        self._callbacks: list[Callable[[str], None]] = []
        self._lock = threading.Lock()  # guards `_callbacks`
        self._tenant: str | None = None

    def of(self, tenant: str) -> "JobStore":
        """The same store as a tenant sees it: others' files and jobs are not there; what is made is the tenant's."""
        store = copy.copy(self)
        store._tenant = tenant
        return store

    @property
    def tenant(self) -> str:
        """Whose what is made here is."""
        return self._tenant or DEFAULT_TENANT

    def close(self) -> None:
        """Closes the database."""
        self._database.close()

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Has `callback` called with a job's id after each commit that changed the job or its events.

        It is called on the thread that committed and must neither block nor raise. Returns: what ends it.
        """
        with self._lock:
            self._callbacks.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                self._callbacks.remove(callback)

        return unsubscribe

    # --- jobs -------------------------------------------------------------------------------------------------------

    def create_job(
        self,
        spec: JobSpec,
        idempotency_key: str | None = None,
        *,
        base_digest: str | None = None,
        most: int | None = None,
    ) -> Job:
        """A new job in `validating_files`, or the one that this key made before; `base_digest` is its base model's.

        Raises: `ColaError(UNKNOWN_FILE | UNKNOWN_CHECKPOINT)` for what the spec names and is not here;
        `ColaError(INVALID_JOB)` for a key that made a job of another spec; `ColaError(QUOTA_EXCEEDED)` where the
        tenant has `most` unfinished jobs; and as `groups.to_join`.
        """
        with self._writing() as session:
            if (row := self._keyed_job(session, spec, idempotency_key)) is not None:
                return records.job(row)
            for source in rows.sources_of(spec):
                rows.find_source(session, source, self._tenant)
            if most is not None and self._count_unfinished(session) >= most:
                raise ColaError(Reason.QUOTA_EXCEEDED, tenant=self.tenant, limit=most)
            row = JobRow(
                id=ids.new("ftjob"),
                tenant=self.tenant,
                idempotency_key=self._scoped(idempotency_key),
                spec=spec.model_dump(mode="json"),
                base_digest=base_digest,
                status=JobStatus.VALIDATING_FILES.value,
                created_at=time.time(),
            )
            if spec.collaboration is not None:
                row.group_id = groups.to_join(session, self.tenant, spec) or row.id
            session.add(row)
            session.flush()
            job = records.job(row)
        self._changed(job.id)
        return job

    def job_by_key(self, spec: JobSpec, idempotency_key: str) -> Job | None:
        """The job that this key made, if it made one. Raises: `ColaError(INVALID_JOB)` if that is of another spec."""
        with self._reading() as session:
            row = self._keyed_job(session, spec, idempotency_key)
            return None if row is None else records.job(row)

    def job(self, id: str) -> Job:
        """Raises: `ColaError(UNKNOWN_JOB)`."""
        with self._reading() as session:
            return records.job(rows.find_job(session, id, self._tenant))

    def members(self, id: str) -> list[Job]:
        """The jobs of a job's collaboration, oldest first. Raises: `ColaError(UNKNOWN_JOB)`."""
        with self._reading() as session:
            group = rows.find_job(session, id, self._tenant).group_id
            return [] if group is None else [records.job(row) for row in groups.members(session, group)]

    def base_digest(self, id: str) -> str | None:
        """The digest of the base model that a job began on; None for jobs that are older than digests.

        Raises: `ColaError(UNKNOWN_JOB)`.
        """
        with self._reading() as session:
            return rows.find_job(session, id, self._tenant).base_digest

    def jobs(self, after: str | None = None, limit: int = 20) -> list[Job]:
        """Jobs, newest first, older than `after`. Raises: `ColaError(UNKNOWN_JOB)` for an unknown `after`."""
        query = rows.owned(select(JobRow).order_by(JobRow.number.desc()).limit(limit), JobRow, self._tenant)
        with self._reading() as session:
            if after is not None:
                query = query.where(JobRow.number < rows.find_job(session, after, self._tenant).number)
            return [records.job(row) for row in session.scalars(query)]

    def unfinished(self) -> list[Job]:
        """All jobs that are not in a terminal status, oldest first."""
        query = rows.owned(
            select(JobRow).where(JobRow.status.not_in(rows.TERMINAL)).order_by(JobRow.number), JobRow, self._tenant
        )
        with self._reading() as session:
            return [records.job(row) for row in session.scalars(query)]

    def transition(
        self,
        id: str,
        status: JobStatus,
        *,
        source: JobStatus | None = None,
        error: JobFailure | None = None,
        fine_tuned_model: str | None = None,
        event: str | None = None,
        level: Level = "info",
    ) -> Job:
        """Moves a job to `status`, from `source` alone if that is given. An `event` is told in the same commit; in it
        the job's collaboration fails too, where it ends without success.

        A full disk has room for this: jobs must be paused when there is none for anything else.

        Raises: `ColaError(UNKNOWN_JOB)`, `ColaError(ILLEGAL_TRANSITION)`.
        """

        def move() -> tuple[Job, list[str]]:
            with self._writing() as session:
                row = rows.find_job(session, id, self._tenant, lock=True)
                check_transition(id, JobStatus(row.status), status)
                if source is not None and row.status != source.value:
                    raise ColaError(Reason.ILLEGAL_TRANSITION, job=id, status=row.status, wanted=status)
                rows.move(row, status)
                if error is not None:
                    row.error = error.model_dump(mode="json")
                if fine_tuned_model is not None:
                    row.fine_tuned_model = fine_tuned_model
                if event is not None:
                    rows.append_event(session, row, event, level, "status", {"status": status.value})
                lost = status in (JobStatus.FAILED, JobStatus.CANCELLED)
                return records.job(row), groups.break_up(session, row) if lost else []

        try:
            job, others = move()
        except ColaError as full:
            if full.reason != Reason.STORAGE_FULL:
                raise
            self._database.let_reserve_go()
            job, others = move()
        for changed in (id, *others):
            self._changed(changed)
        return job

    def set_total_steps(self, id: str, total_steps: int) -> None:
        """Notes how many steps the job takes, once its files have been read. Raises: `ColaError(UNKNOWN_JOB)`."""
        with self._writing() as session:
            rows.find_job(session, id, self._tenant, lock=True).total_steps = total_steps
        self._changed(id)

    def set_waiting(self, id: str, waiting: bool) -> None:
        """Notes whether the job waits for workers. Raises: `ColaError(UNKNOWN_JOB)`."""
        with self._writing() as session:
            rows.find_job(session, id, self._tenant, lock=True).waiting_for_workers = waiting
        self._changed(id)

    def begin_epoch(self, id: str, *, step: int = 0, trained_tokens: int = 0, wire_plan: WirePlan | None = None) -> int:
        """The next epoch of a job, which goes on from `step`: what lies past it is taken back, but for metrics, which
        stay until their steps are repeated. On disk before this returns: no epoch is ever given out twice.

        Raises: `ColaError(UNKNOWN_JOB)`.
        """
        self._database.reserve()  # an attempt begins: what a full disk took may be free again
        with self._writing() as session:
            row = rows.find_job(session, id, self._tenant, lock=True)
            row.epoch += 1
            row.step, row.trained_tokens = step, trained_tokens
            row.wire_plan = None if wire_plan is None else wire_plan.model_dump()
            epoch = row.epoch
        self._changed(id)
        return epoch

    # --- events and metrics -----------------------------------------------------------------------------------------

    def add_event(
        self,
        job: str,
        message: str,
        level: Level = "info",
        type: EventType = "message",
        data: dict[str, float | str] | None = None,
    ) -> JobEvent:
        """Appends an event to a job's log; the first has id 1. Raises: `ColaError(UNKNOWN_JOB)`."""
        with self._writing() as session:
            row = rows.find_job(session, job, self._tenant, lock=True)
            event = records.event(rows.append_event(session, row, message, level, type, data or {}))
        self._changed(job)
        return event

    def events(self, job: str, after: int = 0, limit: int = 100) -> list[JobEvent]:
        """Events later than `after`, oldest first. Raises: `ColaError(UNKNOWN_JOB)`."""
        query = select(EventRow).where(EventRow.job == job, EventRow.id > after).order_by(EventRow.id).limit(limit)
        with self._reading() as session:
            rows.find_job(session, job, self._tenant)
            return [records.event(row) for row in session.scalars(query)]

    def record_step(
        self,
        job: str,
        metrics: StepMetrics,
        *,
        trained_tokens: int,
        estimated_finish: float | None,
        message: str,
        data: dict[str, float | str],
    ) -> None:
        """Notes a step in one commit: its metrics, in the place of those of an earlier run of it, how far the job is,
        and an event. Raises: `ColaError(UNKNOWN_JOB)`.
        """
        with self._writing() as session:
            row = rows.find_job(session, job, self._tenant, lock=True)
            row.step, row.trained_tokens, row.estimated_finish = metrics.step, trained_tokens, estimated_finish
            session.merge(MetricsRow(job=job, **metrics.model_dump()))
            rows.append_event(session, row, message, "info", "metrics", data)
        self._changed(job)

    def metrics(self, job: str, after_step: int = 0) -> list[StepMetrics]:
        """The metrics of all steps later than `after_step`, in order. Raises: `ColaError(UNKNOWN_JOB)`."""
        query = select(MetricsRow).where(MetricsRow.job == job, MetricsRow.step > after_step).order_by(MetricsRow.step)
        with self._reading() as session:
            rows.find_job(session, job, self._tenant)
            return [records.metrics(row) for row in session.scalars(query)]

    # --- files ------------------------------------------------------------------------------------------------------

    def add_file(self, file: FileObject, idempotency_key: str | None = None) -> FileObject:
        """Notes an uploaded file. Returns: it, or the one that this key made before.

        Raises: `ColaError(INVALID_FILE)` for a key that made a file of other bytes.
        """
        with self._writing() as session:
            if idempotency_key is not None:
                query = select(FileRow).where(FileRow.idempotency_key == self._scoped(idempotency_key))
                known = session.scalar(query)
                if known is not None:
                    if (known.digest, known.filename, known.purpose) != (file.digest, file.filename, file.purpose):
                        problem = "the idempotency key was used for another file; make a new key"
                        raise ColaError(Reason.INVALID_FILE, file=file.filename, problem=problem)
                    return records.file(known)
            key = self._scoped(idempotency_key)
            session.add(FileRow(tenant=self.tenant, idempotency_key=key, **file.model_dump(exclude={"object"})))
        return file

    def file(self, id: str) -> FileObject:
        """Raises: `ColaError(UNKNOWN_FILE)`."""
        with self._reading() as session:
            return records.file(rows.find_file(session, id, self._tenant))

    def files(self, after: str | None = None, limit: int = 20) -> list[FileObject]:
        """Files, newest first, older than `after`. Raises: `ColaError(UNKNOWN_FILE)` for an unknown `after`."""
        query = rows.owned(select(FileRow).order_by(FileRow.number.desc()).limit(limit), FileRow, self._tenant)
        with self._reading() as session:
            if after is not None:
                query = query.where(FileRow.number < rows.find_file(session, after, self._tenant).number)
            return [records.file(row) for row in session.scalars(query)]

    def delete_file(self, id: str) -> None:
        """Forgets a file. Raises: `ColaError(UNKNOWN_FILE)`; `ColaError(FILE_IN_USE)` while a job needs it."""
        with self._writing() as session:
            row = rows.find_file(session, id, self._tenant)
            users = select(JobRow).where(JobRow.status.not_in(rows.TERMINAL), JobRow.tenant == row.tenant)
            for user in session.scalars(users):
                if id in rows.sources_of(JobSpec.model_validate(user.spec)):
                    raise ColaError(Reason.FILE_IN_USE, file=id, job=user.id)
            session.delete(row)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def add_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Notes a checkpoint. Returns: it, or the one that the job has of this step: a repeated step makes no second.

        Raises: `ColaError(UNKNOWN_JOB)`.
        """
        with self._writing() as session:
            rows.find_job(session, checkpoint.job, self._tenant)
            known = session.scalar(
                select(CheckpointRow).where(
                    CheckpointRow.job == checkpoint.job, CheckpointRow.step_number == checkpoint.step_number
                )
            )
            if known is not None:
                return records.checkpoint(known)
            session.add(CheckpointRow(**checkpoint.model_dump(exclude={"object"})))
        return checkpoint

    def checkpoint(self, id: str) -> Checkpoint:
        """Raises: `ColaError(UNKNOWN_CHECKPOINT)`."""
        with self._reading() as session:
            return records.checkpoint(rows.find_checkpoint(session, id, self._tenant))

    def checkpoints(self, job: str, after: str | None = None, limit: int = 20) -> list[Checkpoint]:
        """A job's checkpoints, newest first, older than `after`.

        Raises: `ColaError(UNKNOWN_JOB)`, `ColaError(UNKNOWN_CHECKPOINT)` for an unknown `after`.
        """
        query = select(CheckpointRow).where(CheckpointRow.job == job).order_by(CheckpointRow.number.desc()).limit(limit)
        with self._reading() as session:
            rows.find_job(session, job, self._tenant)
            if after is not None:
                query = query.where(CheckpointRow.number < rows.find_checkpoint(session, after, self._tenant).number)
            return [records.checkpoint(row) for row in session.scalars(query)]

    def artefacts(self) -> list[FileObject | Checkpoint]:
        """All files and checkpoints, of all tenants: what there should be artefacts of."""
        with self._reading() as session:
            files = [records.file(row) for row in session.scalars(select(FileRow).order_by(FileRow.number))]
            made = select(CheckpointRow).order_by(CheckpointRow.number)
            return [*files, *(records.checkpoint(row) for row in session.scalars(made))]

    # ----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with self._database.reading() as connection, Session(connection) as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with self._database.writing() as connection, Session(connection) as session:
            yield session
            session.flush()

    def _changed(self, job: str) -> None:
        with self._lock:
            callbacks = tuple(self._callbacks)
        for callback in callbacks:
            callback(job)

    def _scoped(self, key: str | None) -> str | None:
        return None if key is None else f"{self.tenant}/{key}"

    def _count_unfinished(self, session: Session) -> int:
        unfinished = select(func.count()).where(JobRow.status.not_in(rows.TERMINAL), JobRow.tenant == self.tenant)
        return session.scalar(unfinished) or 0

    def _keyed_job(self, session: Session, spec: JobSpec, key: str | None) -> JobRow | None:
        if key is None:
            return None
        row = session.scalar(select(JobRow).where(JobRow.idempotency_key == self._scoped(key)))
        if row is not None and JobSpec.model_validate(row.spec) != spec:
            problem = f"was used for another spec, of job {row.id}; make a new key"
            raise ColaError(Reason.INVALID_JOB, param="idempotency_key", problem=problem)
        return row
