"""Collaborations in the database: who is in a group, who may join it, and what becomes of it when a member fails.

A group goes by the id of its first job. All of this happens within the transaction that makes or moves the job.
"""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from cola_common.errors import ColaError, Reason
from cola_common.jobs import Collaboration, JobFailure, JobSpec, JobStatus
from cola_server.jobs import rows
from cola_server.jobs.tables import JobRow


def members(session: Session, group_id: str) -> Sequence[JobRow]:
    """The jobs of a group, oldest first, those that have ended included."""
    return session.scalars(select(JobRow).where(JobRow.group_id == group_id).order_by(JobRow.number)).all()


def to_join(session: Session, tenant: str, spec: JobSpec) -> str | None:
    """The group that a new job of that spec joins; None where it is the first of one.

    Raises: `ColaError(INVALID_JOB)` where the group is full, or agreed on something else.
    """
    assert spec.collaboration is not None
    name = spec.collaboration.group
    query = select(JobRow).where(
        JobRow.tenant == tenant, JobRow.group_id.is_not(None), JobRow.status.not_in(rows.TERMINAL)
    )
    id = next((row.group_id for row in session.scalars(query) if _collaboration(row).group == name), None)
    if id is None:
        return None
    there = members(session, id)
    first, size = _spec(there[0]), _collaboration(there[0]).size
    for param, mine, theirs in (
        ("collaboration.size", spec.collaboration.size, size),
        ("model", spec.model, first.model),
        (
            "hyperparameters.adaptation_interval",
            spec.hyperparameters.adaptation_interval,
            first.hyperparameters.adaptation_interval,
        ),
    ):
        if mine != theirs:
            problem = f"{mine!r}, but the group {name!r} of job {there[0].id} has {theirs!r}"
            raise ColaError(Reason.INVALID_JOB, param=param, problem=problem)
    if len(there) >= size:
        problem = (
            f"all {len(there)} members of {name!r} are there; the name is free again once they have ended: "
            + ", ".join(row.id for row in there)
        )
        raise ColaError(Reason.INVALID_JOB, param="collaboration.group", problem=problem)
    return id


def break_up(session: Session, member: JobRow) -> list[str]:
    """A member has failed or was cancelled: those that have not ended fail with it. Returns: their ids."""
    if member.group_id is None:
        return []
    error = ColaError(Reason.GROUP_BROKEN, group=_collaboration(member).group, job=member.id, status=member.status)
    failure = JobFailure(code=error.reason, message=error.message)
    others = [row for row in members(session, member.group_id) if row.status not in rows.TERMINAL]
    for row in others:
        rows.move(row, JobStatus.FAILED)
        row.error = failure.model_dump(mode="json")
        text = f"The job has failed: {error.message}"
        rows.append_event(session, row, text, "error", "status", {"status": row.status})
    return [row.id for row in others]


def _spec(row: JobRow) -> JobSpec:
    return JobSpec.model_validate(row.spec)


def _collaboration(member: JobRow) -> Collaboration:
    collaboration = _spec(member).collaboration
    assert collaboration is not None, "who has a group has been asked to"
    return collaboration
