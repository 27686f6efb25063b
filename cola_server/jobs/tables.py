"""The tables: storage's own types. `cola_server.jobs.records` turns rows into what users see.

The schema changes by a migration only; a test compares the two.
"""

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine


class Table(DeclarativeBase):
    """Parent of all tables."""

    type_annotation_map: ClassVar[dict[type, TypeEngine[Any]]] = {float: Double()}


class FileRow(Table):
    """An uploaded file; its bytes are an artefact."""

    __tablename__ = "files"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    """Order of creation."""
    id: Mapped[str] = mapped_column(unique=True)
    tenant: Mapped[str] = mapped_column(index=True)
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    """`tenant/key`: a tenant's name has no slash, so that keys of two tenants are never one."""
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float]
    digest: Mapped[str]


class JobRow(Table):
    """A job: its spec as it was asked for, and where it is."""

    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    """Order of creation."""
    id: Mapped[str] = mapped_column(unique=True)
    tenant: Mapped[str] = mapped_column(index=True)
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    """As a file's."""
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    group_id: Mapped[str | None] = mapped_column(index=True)
    """Of a collaboration's jobs: the first one's id."""
    base_digest: Mapped[str | None]
    """Of the base model that the job began on; none for a job that is older than this column."""
    status: Mapped[str] = mapped_column(index=True)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    fine_tuned_model: Mapped[str | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    estimated_finish: Mapped[float | None]
    trained_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    epoch: Mapped[int] = mapped_column(default=0)
    waiting_for_workers: Mapped[bool] = mapped_column(default=False)
    wire_plan: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """What travels, as planned for the newest epoch."""
    last_event: Mapped[int] = mapped_column(default=0)
    """The id of the job's newest event."""


class EventRow(Table):
    """One line of a job's log: appended, never changed."""

    __tablename__ = "events"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    created_at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(JSON)


class MetricsRow(Table):
    """What one step cost and gave; a repeated step overwrites. Columns as in `cola_common.jobs.StepMetrics`."""

    __tablename__ = "metrics"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    epoch: Mapped[int]
    train_loss: Mapped[float]
    valid_loss: Mapped[float | None]
    learning_rate: Mapped[float]
    grad_norm: Mapped[float]
    tokens: Mapped[int]
    target_tokens: Mapped[int]
    created_at: Mapped[float]
    seconds: Mapped[float]
    model_seconds: Mapped[float]
    encode_seconds: Mapped[float]
    wire_seconds: Mapped[float]
    worker_seconds: Mapped[float]
    fold_seconds: Mapped[float]
    sent_bytes: Mapped[int] = mapped_column(BigInteger)
    received_bytes: Mapped[int] = mapped_column(BigInteger)
    reduce_seconds: Mapped[float] = mapped_column(default=0.0)
    decode_seconds: Mapped[float] = mapped_column(default=0.0)
    rows: Mapped[int] = mapped_column(BigInteger, default=0)
    sent_rows: Mapped[int] = mapped_column(BigInteger, default=0)
    raw_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    raw_delta_bytes: Mapped[int] = mapped_column(BigInteger, default=0)


class CheckpointRow(Table):
    """An adapter at a step; its folder is an artefact. A job has one at most for a step."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job", "step_number"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step_number: Mapped[int]
    created_at: Mapped[float]
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    digest: Mapped[str]
