"""Rows by their ids, within a session."""

import time

from sqlalchemy import select
from sqlalchemy.orm import Session

from cola_common.errors import ColaError, Reason
from cola_common.jobs import JobSpec
from cola_server.jobs.tables import CheckpointRow, EventRow, FileRow, JobRow


def find_job(session: Session, id: str, *, lock: bool = False) -> JobRow:
    """Raises: `ColaError(UNKNOWN_JOB)`. `lock` holds it until the transaction ends."""
    query = select(JobRow).where(JobRow.id == id)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise ColaError(Reason.UNKNOWN_JOB, job=id)
    return row


def find_file(session: Session, id: str) -> FileRow:
    """Raises: `ColaError(UNKNOWN_FILE)`."""
    row = session.scalar(select(FileRow).where(FileRow.id == id))
    if row is None:
        raise ColaError(Reason.UNKNOWN_FILE, file=id)
    return row


def find_checkpoint(session: Session, id: str) -> CheckpointRow:
    """Raises: `ColaError(UNKNOWN_CHECKPOINT)`."""
    row = session.scalar(select(CheckpointRow).where(CheckpointRow.id == id))
    if row is None:
        raise ColaError(Reason.UNKNOWN_CHECKPOINT, checkpoint=id)
    return row


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
    named = (spec.training_file, spec.validation_file, spec.adapter.init_from)
    return [id for id in named if id is not None]


def find_source(session: Session, id: str) -> FileRow | CheckpointRow:
    """Raises: `ColaError(UNKNOWN_FILE | UNKNOWN_CHECKPOINT)`."""
    return find_checkpoint(session, id) if id.startswith("ftckpt-") else find_file(session, id)
