"""What the server tells its users of: jobs, their logs and costs, files, checkpoints, models, workers."""

from typing import Literal

from pydantic import Field

from cola_common.jobs.record import Record
from cola_common.jobs.spec import JobSpec, WirePlan
from cola_common.jobs.status import JobStatus

DEFAULT_TENANT = "default"
"""Whose everything is on a server that knows no other tenants."""


class JobFailure(Record):
    """Why a job failed: `code` is a `Reason`, `param` the field at fault, if one is."""

    code: str
    message: str
    param: str | None = None


class Job(Record):
    """A job as its user sees it. Times are Unix seconds."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    tenant: str = DEFAULT_TENANT
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    estimated_finish: float | None = None
    status: JobStatus
    spec: JobSpec
    error: JobFailure | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int = 0
    step: int = 0
    total_steps: int | None = None
    """Known once the training file is validated."""
    epoch: int = 0
    waiting_for_workers: bool = False
    group_id: str | None = None
    """In a collaboration: the id of its first job, which tells groups of one name apart."""
    queue_place: int | None = None
    """While it waits for its turn: 1 for the tenant's next."""
    wire_plan: WirePlan | None = None
    """What travels; known once the job has begun."""

    @property
    def model(self) -> str:
        return self.spec.model


class JobEvent(Record):
    """One line of a job's log; `id` grows with time within a job, so that a stream resumes after it."""

    id: int
    job: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: float
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics", "status"] = "message"
    message: str
    data: dict[str, float | str] = Field(default_factory=dict)


class StepMetrics(Record):
    """What one optimizer step cost and gave. Seconds are wall time of the part; bytes are on the wire, "raw" ones would
    be without codecs and reductions: fp32, every row, x and g of each site.

    The parts overlap: encoding and sending run while the backward pass still does.
    """

    step: int
    """1 for the first step."""
    epoch: int
    train_loss: float
    valid_loss: float | None = None
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens that are no padding."""
    target_tokens: int
    created_at: float
    seconds: float
    model_seconds: float
    encode_seconds: float
    wire_seconds: float
    """From the last capture's hand-over to the stream until the deltas are here, less the worker's own time."""
    worker_seconds: float
    """The slowest worker's time in decode, VJP and optimizer."""
    fold_seconds: float
    sent_bytes: int
    received_bytes: int
    reduce_seconds: float = 0.0
    """Rows to fewer rows, or to a gradient; not part of `encode_seconds`."""
    decode_seconds: float = 0.0
    """Of `worker_seconds`: reading captures."""
    rows: int = 0
    """That passed the sites, all calls together."""
    sent_rows: int = 0
    """That were sent: those of a gradient's parameters where that was sent in their place."""
    raw_bytes: int = 0
    raw_delta_bytes: int = 0


class FileObject(Record):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    filename: str
    purpose: Literal["fine-tune", "adapter"]
    bytes: int
    created_at: float
    digest: str
    """SHA-256, hex."""


class Checkpoint(Record):
    """An adapter at a step, in PEFT's format where the family has one."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    job: str
    step_number: int
    created_at: float
    metrics: dict[str, float] = Field(default_factory=dict)
    """`train_loss`, and `valid_loss` where there is a validation file."""
    digest: str
    """SHA-256 over the adapter's weights file, hex."""


class Estimate(Record):
    """What a job would take, told before it is made.

    Memory is what it may come to, with batches of `batch_size` rows of `max_length` each; what it moves in a step and
    how long it takes are told from the lengths of its first examples.
    """

    object: Literal["fine_tuning.job.estimate"] = "fine_tuning.job.estimate"
    examples: int
    total_steps: int
    trainable_parameters: int
    server_bytes: int
    """Memory that it needs of the server for itself: one that needs more than is free waits in line."""
    server_limit_bytes: int
    """What the server has for all jobs: one that needs more is refused."""
    adapter_bytes: int
    """Of these: the server's copy of the adapter, with the weights that it is merged into if it is."""
    capture_bytes: int
    """What is on its way to the workers."""
    pass_bytes: int
    """What its largest batch takes in the model, in room that all jobs share."""
    worker_bytes: int
    """Memory on the worker, or on all of its workers together."""
    snapshot_bytes: int
    """On the server's disk, twice: two generations are kept."""
    sent_bytes: int
    """To the workers, each step."""
    received_bytes: int
    """Back from them."""
    seconds: float | None
    """With the server to itself; None where nothing like it has run since the server started."""
    wire_plan: WirePlan
    """What would travel, as the fleet is now."""


class ModelCard(Record):
    """A base model that this server holds. Its seconds are those of the thread that computes for all models, since the
    server started.
    """

    id: str
    object: Literal["model"] = "model"
    task: Literal["causal-lm", "sequence-classification"]
    dtype: str
    device: str
    parameters: int
    busy_seconds: float
    """It computed."""
    waiting_seconds: float
    """Jobs were running, and all of them waited for their workers."""
    jobless_seconds: float


class WorkerCard(Record):
    """A worker as the server knows it."""

    id: str
    object: Literal["worker"] = "worker"
    status: Literal["attending", "draining", "lost", "quarantined"]
    cores: int
    memory_bytes: int
    device: str
    gflops: float
    shards: int
    last_seen: float
