"""One record as a terminal shows it, a field a line."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from cola_common.client.quantities import bytes_text, count_text, duration_text, time_text
from cola_common.client.tables import adapter_text, status_text, steps_text
from cola_common.jobs import DEFAULT_TENANT, AdapterSpec, Estimate, FileObject, Job, Wire, WirePlan


def details(fields: Iterable[tuple[str, str | Text]]) -> Table:
    """One record, a field a row; fields without a text are left out."""
    result = Table.grid(padding=(0, 2))
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for name, text in fields:
        if text:
            result.add_row(name, text)
    return result


def targets_text(adapter: AdapterSpec) -> str:
    """The modules that an adapter names."""
    targets = adapter.target_modules
    return targets if isinstance(targets, str) else " ".join(targets)


def plan_text(plan: WirePlan) -> str:
    """`"exact rows in fp32, deltas in fp32"`, `"sketch of 64 rows in bf16, deltas in int8"`."""
    rows = f"sketch of {plan.sketch_rows} rows" if plan.rows == "sketch" else f"{plan.rows} rows"
    return f"{rows} in {plan.values}, deltas in {plan.deltas}"


def asked_text(wire: Wire) -> str:
    """What a job asks for: `"auto, without loss"`, `"all rows in int8, deltas auto, error up to 0.05"`."""
    named = (wire.rows, wire.values, wire.deltas)
    limit = f"error up to {wire.max_error:g}" if wire.max_error else "without loss"
    if all(name == "auto" for name in named):
        return f"auto, {limit}"
    rows = f"sketch of {wire.sketch_rows} rows" if wire.rows == "sketch" else f"{wire.rows} rows"
    values = " auto" if wire.values == "auto" else f" in {wire.values}"
    deltas = "deltas auto" if wire.deltas == "auto" else f"deltas in {wire.deltas}"
    return ", ".join([f"{rows}{values}", deltas, *([limit] if wire.max_error else [])])


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
            ("wire", asked_text(spec.wire) if job.wire_plan is None else plan_text(job.wire_plan)),
            ("", "" if job.wire_plan is None else job.wire_plan.reason),
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
            ("wire", plan_text(estimate.wire_plan)),
            ("", estimate.wire_plan.reason),
            ("snapshots", f"{bytes_text(estimate.snapshot_bytes)} each, of which two are kept"),
        ]
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
