"""Records as tables for a terminal."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from cola_common.client.quantities import bytes_text, count_text, seconds_text, time_text
from cola_common.jobs import (
    AdapterSpec,
    Checkpoint,
    FileObject,
    Job,
    JobEvent,
    JobStatus,
    ModelCard,
    StepMetrics,
    WorkerCard,
)

T = TypeVar("T")

STATUS_STYLES = {
    JobStatus.VALIDATING_FILES: "cyan",
    JobStatus.QUEUED: "cyan",
    JobStatus.RUNNING: "blue",
    JobStatus.PAUSED: "yellow",
    JobStatus.SUCCEEDED: "green",
    JobStatus.FAILED: "red",
    JobStatus.CANCELLED: "magenta",
}
WORKER_STYLES = {"attending": "green", "draining": "yellow", "lost": "red", "quarantined": "magenta"}
LEVEL_STYLES = {"info": "", "warn": "yellow", "error": "red"}


@final
@dataclass(frozen=True)
class Column(Generic[T]):
    """A heading and what stands under it."""

    heading: str
    cell: Callable[[T], str | Text]
    justify: JustifyMethod = "left"
    fold: bool = False
    """Long texts break into lines; others stay whole, as ids must to be copied."""


def table(columns: Sequence[Column[T]], records: Iterable[T]) -> Table:
    """A record a row."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column.heading, justify=column.justify, no_wrap=not column.fold, overflow="fold")
    for record in records:
        result.add_row(*(column.cell(record) for column in columns))
    return result


def details(fields: Iterable[tuple[str, str | Text]]) -> Table:
    """One record, a field a row; fields without a text are left out."""
    result = Table.grid(padding=(0, 2))
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for name, text in fields:
        if text:
            result.add_row(name, text)
    return result


def status_text(job: Job) -> Text:
    """A job's status in its colour, with what it waits for."""
    text = Text(job.status.value, STATUS_STYLES[job.status])
    return text.append(", waits for workers", "yellow") if job.waiting_for_workers else text


def steps_text(job: Job) -> str:
    """`"120/400"`, or an empty text while nothing is known."""
    if job.total_steps is None:
        return str(job.step or "")
    return f"{job.step}/{job.total_steps}"


def adapter_text(adapter: AdapterSpec) -> str:
    """`"lora r=8"`, `"mlp 128"`."""
    if adapter.type == "lora":
        return f"lora r={adapter.r}"
    if adapter.type == "mlp":
        return f"mlp {'-'.join(map(str, adapter.hidden_sizes))}"
    return "linear"


def targets_text(adapter: AdapterSpec) -> str:
    """The modules that an adapter names."""
    targets = adapter.target_modules
    return targets if isinstance(targets, str) else " ".join(targets)


def job_details(job: Job) -> Table:
    """All that a user asks of one job."""
    spec, h = job.spec, job.spec.hyperparameters
    length = f"{h.max_steps} steps" if h.max_steps is not None else f"{h.n_epochs} epochs"
    batches = f"batches of {h.batch_size} × {h.max_length} tokens"
    interval = f", a step every {h.adaptation_interval} batches" if h.adaptation_interval > 1 else ""
    return details(
        [
            ("id", job.id),
            ("status", status_text(job)),
            ("error", Text("" if job.error is None else f"{job.error.code}: {job.error.message}", "red")),
            ("steps", steps_text(job)),
            ("trained tokens", f"{job.trained_tokens:,}" if job.trained_tokens else ""),
            ("model", job.model),
            ("fine-tuned model", job.fine_tuned_model or ""),
            ("training file", spec.training_file),
            ("validation file", spec.validation_file or ""),
            ("adapter", f"{adapter_text(spec.adapter)} on {targets_text(spec.adapter)}, {spec.fold}"),
            ("continues from", spec.adapter.init_from or ""),
            ("trains", f"{length}, {batches}{interval}"),
            ("optimizer", f"{h.optimizer}, learning rate {h.learning_rate:g}, {h.lr_scheduler_type}"),
            ("wire", f"{spec.wire.rows} rows in {spec.wire.values}"),
            ("metadata", "  ".join(f"{key}={value}" for key, value in spec.metadata.items())),
            *(
                (name, time_text(value))
                for name, value in (
                    ("created", job.created_at),
                    ("started", job.started_at),
                    ("finished", job.finished_at),
                    ("expected to finish", None if job.status.terminal else job.estimated_finish),
                )
                if value is not None
            ),
        ]
    )


JOBS: Sequence[Column[Job]] = (
    Column("job", lambda job: job.id),
    Column("status", status_text),
    Column("steps", steps_text, "right"),
    Column("model", lambda job: job.model, fold=True),
    Column("adapter", lambda job: adapter_text(job.spec.adapter)),
    Column("created", lambda job: time_text(job.created_at)),
)

EVENTS: Sequence[Column[JobEvent]] = (
    Column("id", lambda event: str(event.id), "right"),
    Column("time", lambda event: time_text(event.created_at)),
    Column("event", lambda event: Text(event.message, LEVEL_STYLES[event.level]), fold=True),
)

METRICS: Sequence[Column[StepMetrics]] = (
    Column("step", lambda m: str(m.step), "right"),
    Column("loss", lambda m: f"{m.train_loss:.4f}", "right"),
    Column("valid", lambda m: "" if m.valid_loss is None else f"{m.valid_loss:.4f}", "right"),
    Column("rate", lambda m: f"{m.learning_rate:.2e}", "right"),
    Column("grad", lambda m: f"{m.grad_norm:.3g}", "right"),
    Column("tokens", lambda m: str(m.tokens), "right"),
    Column("time", lambda m: seconds_text(m.seconds), "right"),
    Column("model", lambda m: seconds_text(m.model_seconds), "right"),
    Column("encode", lambda m: seconds_text(m.encode_seconds), "right"),
    Column("wire", lambda m: seconds_text(m.wire_seconds), "right"),
    Column("worker", lambda m: seconds_text(m.worker_seconds), "right"),
    Column("fold", lambda m: seconds_text(m.fold_seconds), "right"),
    Column("sent", lambda m: bytes_text(m.sent_bytes), "right"),
    Column("back", lambda m: bytes_text(m.received_bytes), "right"),
)

FILES: Sequence[Column[FileObject]] = (
    Column("file", lambda file: file.id),
    Column("name", lambda file: file.filename, fold=True),
    Column("purpose", lambda file: file.purpose),
    Column("size", lambda file: bytes_text(file.bytes), "right"),
    Column("created", lambda file: time_text(file.created_at)),
)

CHECKPOINTS: Sequence[Column[Checkpoint]] = (
    Column("checkpoint", lambda checkpoint: checkpoint.id),
    Column("step", lambda checkpoint: str(checkpoint.step_number), "right"),
    Column("loss", lambda checkpoint: _metric(checkpoint, "train_loss"), "right"),
    Column("valid", lambda checkpoint: _metric(checkpoint, "valid_loss"), "right"),
    Column("created", lambda checkpoint: time_text(checkpoint.created_at)),
)

MODELS: Sequence[Column[ModelCard]] = (
    Column("model", lambda model: model.id),
    Column("task", lambda model: model.task),
    Column("parameters", lambda model: count_text(model.parameters), "right"),
    Column("dtype", lambda model: model.dtype),
    Column("device", lambda model: model.device),
)

WORKERS: Sequence[Column[WorkerCard]] = (
    Column("worker", lambda worker: worker.id),
    Column("status", lambda worker: Text(worker.status, WORKER_STYLES[worker.status])),
    Column("shards", lambda worker: str(worker.shards), "right"),
    Column("cores", lambda worker: str(worker.cores), "right"),
    Column("memory", lambda worker: bytes_text(worker.memory_bytes), "right"),
    Column("speed", lambda worker: f"{worker.gflops:,.0f} GFLOP/s", "right"),
    Column("device", lambda worker: worker.device),
    Column("last seen", lambda worker: time_text(worker.last_seen)),
)


def file_details(file: FileObject) -> Table:
    """All that is known of a file."""
    return details(
        [
            ("id", file.id),
            ("name", file.filename),
            ("purpose", file.purpose),
            ("size", f"{bytes_text(file.bytes)} ({file.bytes:,} bytes)"),
            ("sha256", file.digest),
            ("created", time_text(file.created_at)),
        ]
    )


def _metric(checkpoint: Checkpoint, name: str) -> str:
    value: Any = checkpoint.metrics.get(name)
    return "" if value is None else f"{value:.4f}"
