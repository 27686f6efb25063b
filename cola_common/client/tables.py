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
    duration_text,
    seconds_text,
    time_text,
)
from cola_common.jobs import (
    DEFAULT_TENANT,
    AdapterSpec,
    Checkpoint,
    Estimate,
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


def table(columns: Sequence[Column[T]], records: Iterable[T]) -> Table:
    """A record a row; columns in which nothing stands are left out."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    rows = [[column.cell(record) for column in columns] for record in records]
    filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    for column in (columns[i] for i in filled):
        result.add_column(column.heading, justify=column.justify, no_wrap=not column.breaks, overflow="fold")
    for row in rows:
        result.add_row(*(row[i] for i in filled))
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


def targets_text(adapter: AdapterSpec) -> str:
    """The modules that an adapter names."""
    targets = adapter.target_modules
    return targets if isinstance(targets, str) else " ".join(targets)


def job_details(job: Job) -> Table:
    """All that a user asks of one job."""
    spec, h, group = job.spec, job.spec.hyperparameters, job.spec.collaboration
    length = _counted(h.max_steps, "step") if h.max_steps is not None else _counted(h.n_epochs, "epoch")
    batches = f"batches of {h.batch_size} × {h.max_length} tokens"
    interval = f", a step every {h.adaptation_interval} batches" if h.adaptation_interval > 1 else ""
    return details(
        [
            ("id", job.id),
            ("tenant", "" if job.tenant == DEFAULT_TENANT else job.tenant),
            ("status", status_text(job)),
            ("group", "" if group is None else f"{group.group}, {_counted(group.size, 'job')}, {job.group_id}"),
            ("error", Text("" if job.error is None else f"{job.error.code}: {job.error.message}", "red")),
            ("steps", steps_text(job)),
            ("trained tokens", f"{job.trained_tokens:,}" if job.trained_tokens else ""),
            ("model", job.model),
            ("fine-tuned model", job.fine_tuned_model or ""),
            ("training file", spec.training_file),
            ("with it", "  ".join(spec.joint_files)),
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


def estimate_details(estimate: Estimate) -> Table:
    """What a job would take."""
    fits = estimate.server_bytes <= estimate.server_limit_bytes
    parts = f"{bytes_text(estimate.adapter_bytes)} adapter, {bytes_text(estimate.capture_bytes)} of captures"
    limit = f"{'of' if fits else 'more than the'} {bytes_text(estimate.server_limit_bytes)} for all jobs"
    moved = f"{bytes_text(estimate.sent_bytes)} to the workers and {bytes_text(estimate.received_bytes)} back"
    time = "unknown yet" if estimate.seconds is None else f"{duration_text(estimate.seconds)} with the server to itself"
    return details(
        [
            ("trains", f"{count_text(estimate.trainable_parameters)} parameters on {estimate.examples} examples"),
            ("steps", str(estimate.total_steps)),
            ("time", time),
            ("memory on the server", Text(f"{bytes_text(estimate.server_bytes)} {limit}", "" if fits else "red")),
            ("", f"{parts}; {bytes_text(estimate.pass_bytes)} in the model, which is shared"),
            ("memory on workers", bytes_text(estimate.worker_bytes)),
            ("each step", moved),
            ("snapshots", f"{bytes_text(estimate.snapshot_bytes)} each, of which two are kept"),
        ]
    )


def _share(model: ModelCard, seconds: float) -> str:
    """Of the model thread's time."""
    total = model.busy_seconds + model.waiting_seconds + model.jobless_seconds
    return f"{seconds / total:.0%}" if total else ""


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _tight(text: str) -> str:
    """Without the space before the unit: a step's many numbers fit a terminal of 80 columns."""
    return text.replace(" ", "")


def _metric(checkpoint: Checkpoint, name: str) -> str:
    value: Any = checkpoint.metrics.get(name)
    return "" if value is None else f"{value:.4f}"
