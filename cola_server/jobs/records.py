"""Rows to records: storage's types to the domain's."""

from cola_common.jobs import (
    Checkpoint,
    FileObject,
    Job,
    JobEvent,
    JobFailure,
    JobSpec,
    JobStatus,
    StepMetrics,
    WirePlan,
)
from cola_server.jobs.tables import CheckpointRow, EventRow, FileRow, JobRow, MetricsRow


def job(row: JobRow) -> Job:
    """The job as its user sees it."""
    return Job(
        id=row.id,
        tenant=row.tenant,
        group_id=row.group_id,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        estimated_finish=row.estimated_finish,
        status=JobStatus(row.status),
        spec=JobSpec.model_validate(row.spec),
        error=None if row.error is None else JobFailure.model_validate(row.error),
        fine_tuned_model=row.fine_tuned_model,
        trained_tokens=row.trained_tokens,
        step=row.step,
        total_steps=row.total_steps,
        epoch=row.epoch,
        waiting_for_workers=row.waiting_for_workers,
        wire_plan=None if row.wire_plan is None else WirePlan.model_validate(row.wire_plan),
    )


def event(row: EventRow) -> JobEvent:
    """The event as its user sees it."""
    return JobEvent.model_validate({name: getattr(row, name) for name in JobEvent.model_fields if name != "object"})


def metrics(row: MetricsRow) -> StepMetrics:
    """The step's metrics as their user sees them."""
    return StepMetrics.model_validate({name: getattr(row, name) for name in StepMetrics.model_fields})


def file(row: FileRow) -> FileObject:
    """The file as its user sees it."""
    return FileObject.model_validate({name: getattr(row, name) for name in FileObject.model_fields if name != "object"})


def checkpoint(row: CheckpointRow) -> Checkpoint:
    """The checkpoint as its user sees it."""
    return Checkpoint.model_validate({name: getattr(row, name) for name in Checkpoint.model_fields if name != "object"})
