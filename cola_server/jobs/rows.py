"""Rows by their ids, within a session. With a `tenant` its rows alone: another's is told as one that is not there."""

import time
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from cola_common.errors import ColaError, Reason
from cola_common.jobs import JobSpec, JobStatus
from cola_server.jobs.tables import CheckpointRow, EventRow, FileRow, JobRow

TERMINAL = tuple(status.value for status in JobStatus if status.terminal)

Q = TypeVar("Q", bound=Select[Any])


def owned(query: Q, table: type[JobRow | FileRow], tenant: str | None) -> Q:
    """The rows of a query on `table` that are the tenant's; all, where none is given."""
    return query if tenant is None else query.where(table.tenant == tenant)


def find_job(session: Session, id: str, tenant: str | None, *, lock: bool = False) -> JobRow:
    """Raises: `ColaError(UNKNOWN_JOB)`. `lock` holds it until the transaction ends."""
    query = owned(select(JobRow).where(JobRow.id == id), JobRow, tenant)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise ColaError(Reason.UNKNOWN_JOB, job=id)
    return row


def find_file(session: Session, id: str, tenant: str | None) -> FileRow:
    """Raises: `ColaError(UNKNOWN_FILE)`."""
    row = session.scalar(owned(select(FileRow).where(FileRow.id == id), FileRow, tenant))
    if row is None:
        raise ColaError(Reason.UNKNOWN_FILE, file=id)
    return row


def find_checkpoint(session: Session, id: str, tenant: str | None) -> CheckpointRow:
    """Raises: `ColaError(UNKNOWN_CHECKPOINT)`."""
    query = select(CheckpointRow).join(JobRow).where(CheckpointRow.id == id)
    row = session.scalar(owned(query, JobRow, tenant))
    if row is None:
        raise ColaError(Reason.UNKNOWN_CHECKPOINT, checkpoint=id)
    return row


def move(row: JobRow, status: JobStatus) -> None:
    """The job's new status, and what goes with it."""
    now = time.time()
    row.status = status.value
    if status == JobStatus.RUNNING:
        row.started_at = row.started_at or now
    else:
        row.waiting_for_workers = False
        row.estimated_finish = None
    if status.terminal:
        row.finished_at = now


def append_event(
    session: Session, row: JobRow, message: str, level: str, type: str, data: dict[str, float | str]
) -> EventRow:
    """The next event of a job; `row` must be locked, for it counts them."""
    row.last_event += 1
    event = EventRow(
        job=row.id, id=row.last_event, created_at=time.time(), level=level, type=type, message=message, data=data
    )
    session.add(event)
    return event


def sources_of(spec: JobSpec) -> list[str]:
    """The ids of all files and checkpoints that a job needs."""
    named = (spec.training_file, *spec.joint_files, spec.validation_file, spec.adapter.init_from)
    return [id for id in named if id is not None]


def find_source(session: Session, id: str, tenant: str | None) -> FileRow | CheckpointRow:
    """Raises: `ColaError(UNKNOWN_FILE | UNKNOWN_CHECKPOINT)`."""
    return find_checkpoint(session, id, tenant) if id.startswith("ftckpt-") else find_file(session, id, tenant)
