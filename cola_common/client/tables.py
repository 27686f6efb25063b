"""Records as tables for a terminal."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from cola_common.client.quantities import (
    bytes_text,
    count_text,
    day_text,
    seconds_text,
    time_text,
    times_text,
)
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
    breaks: bool = False
    """Gives way where the terminal is narrow; ids, which are copied, and numbers do not."""


def table(columns: Sequence[Column[T]], records: Iterable[T], *, gap: int = 2) -> Table:
    """A record a row, `gap` spaces between columns; columns in which nothing stands are left out."""
    result = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    rows = [[column.cell(record) for column in columns] for record in records]
    filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    for column in (columns[i] for i in filled):
        result.add_column(column.heading, justify=column.justify, no_wrap=not column.breaks, overflow="fold")
    for row in rows:
        result.add_row(*(row[i] for i in filled))
    return result


def status_text(job: Job) -> Text:
    """A job's status in its colour, with what it waits for."""
    text = Text(job.status.value, STATUS_STYLES[job.status])
    if job.queue_place is not None:
        text.append(f", {'next' if job.queue_place == 1 else f'place {job.queue_place}'} in line")
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


JOBS: Sequence[Column[Job]] = (
    Column("job", lambda job: job.id),
    Column("status", status_text, breaks=True),
    Column("steps", steps_text, "right"),
    Column("model", lambda job: job.model, breaks=True),
    Column("adapter", lambda job: adapter_text(job.spec.adapter)),
    Column("created", lambda job: day_text(job.created_at), breaks=True),
)

EVENTS: Sequence[Column[JobEvent]] = (
    Column("id", lambda event: str(event.id), "right"),
    Column("time", lambda event: time_text(event.created_at), breaks=True),
    Column("event", lambda event: Text(event.message, LEVEL_STYLES[event.level]), breaks=True),
)

METRICS: Sequence[Column[StepMetrics]] = (
    Column("step", lambda m: str(m.step), "right"),
    Column("loss", lambda m: f"{m.train_loss:.4f}", "right"),
    Column("valid", lambda m: "" if m.valid_loss is None else f"{m.valid_loss:.4f}", "right"),
    Column("grad", lambda m: f"{m.grad_norm:#.3g}", "right"),
    Column("time", lambda m: _tight(seconds_text(m.seconds)), "right"),
    Column("model", lambda m: _tight(seconds_text(m.model_seconds)), "right"),
    Column("encode", lambda m: _tight(seconds_text(m.encode_seconds)), "right"),
    Column("wire", lambda m: _tight(seconds_text(m.wire_seconds)), "right"),
    Column("worker", lambda m: _tight(seconds_text(m.worker_seconds)), "right"),
    Column("fold", lambda m: _tight(seconds_text(m.fold_seconds)), "right"),
    Column("sent", lambda m: _tight(bytes_text(m.sent_bytes)), "right"),
    Column("back", lambda m: _tight(bytes_text(m.received_bytes)), "right"),
)

TRAFFIC: Sequence[Column[StepMetrics]] = (
    Column("step", lambda m: str(m.step), "right"),
    Column("rows", lambda m: count_text(m.rows) if m.rows else "", "right"),
    Column("sent\nrows", lambda m: count_text(m.sent_rows) if m.rows else "", "right"),
    Column("raw", lambda m: _tight(bytes_text(m.raw_bytes)) if m.raw_bytes else "", "right"),
    Column("sent", lambda m: _tight(bytes_text(m.sent_bytes)), "right"),
    Column("ratio", lambda m: times_text(m.raw_bytes, m.sent_bytes), "right"),
    Column("raw\nback", lambda m: _tight(bytes_text(m.raw_delta_bytes)) if m.raw_delta_bytes else "", "right"),
    Column("back", lambda m: _tight(bytes_text(m.received_bytes)), "right"),
    Column("reduce", lambda m: _tight(seconds_text(m.reduce_seconds)), "right"),
    Column("encode", lambda m: _tight(seconds_text(m.encode_seconds)), "right"),
    Column("wire", lambda m: _tight(seconds_text(m.wire_seconds)), "right"),
    Column("decode", lambda m: _tight(seconds_text(m.decode_seconds)), "right"),
)
"""What is raw is not known of steps that an older server has done."""

FILES: Sequence[Column[FileObject]] = (
    Column("file", lambda file: file.id),
    Column("name", lambda file: file.filename, breaks=True),
    Column("purpose", lambda file: file.purpose),
    Column("size", lambda file: bytes_text(file.bytes), "right"),
    Column("created", lambda file: day_text(file.created_at), breaks=True),
)

CHECKPOINTS: Sequence[Column[Checkpoint]] = (
    Column("checkpoint", lambda checkpoint: checkpoint.id),
    Column("step", lambda checkpoint: str(checkpoint.step_number), "right"),
    Column("loss", lambda checkpoint: _metric(checkpoint, "train_loss"), "right"),
    Column("valid", lambda checkpoint: _metric(checkpoint, "valid_loss"), "right"),
    Column("created", lambda checkpoint: day_text(checkpoint.created_at), breaks=True),
)

MODELS: Sequence[Column[ModelCard]] = (
    Column("model", lambda model: model.id),
    Column("task", lambda model: model.task),
    Column("parameters", lambda model: count_text(model.parameters), "right"),
    Column("dtype", lambda model: model.dtype),
    Column("device", lambda model: model.device),
    Column("busy", lambda model: _share(model, model.busy_seconds), "right"),
    Column("waits", lambda model: _share(model, model.waiting_seconds), "right"),
    Column("no jobs", lambda model: _share(model, model.jobless_seconds), "right"),
)

WORKERS: Sequence[Column[WorkerCard]] = (
    Column("worker", lambda worker: worker.id),
    Column("status", lambda worker: Text(worker.status, WORKER_STYLES[worker.status])),
    Column("shards", lambda worker: str(worker.shards), "right"),
    Column("cores", lambda worker: str(worker.cores), "right"),
    Column("memory", lambda worker: bytes_text(worker.memory_bytes), "right"),
    Column("GFLOP/s", lambda worker: f"{worker.gflops:,.0f}", "right"),
    Column("accelerator", lambda worker: "" if worker.device == "cpu" else worker.device),
    Column("last seen", lambda worker: day_text(worker.last_seen), breaks=True),
)


def _share(model: ModelCard, seconds: float) -> str:
    """Of the model thread's time."""
    total = model.busy_seconds + model.waiting_seconds + model.jobless_seconds
    return f"{seconds / total:.0%}" if total else ""


def _tight(text: str) -> str:
    """Without the space before the unit: a step's many numbers fit a terminal of 80 columns."""
    return text.replace(" ", "")


def _metric(checkpoint: Checkpoint, name: str) -> str:
    value: Any = checkpoint.metrics.get(name)
    return "" if value is None else f"{value:.4f}"
