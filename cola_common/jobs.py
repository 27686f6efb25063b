"""Jobs as server and client speak of them: the spec, the status with its legal transitions, and the records.

These are domain types: the wire has its own (`cola_common.wire`), the database its own (`cola_server.jobs`).
"""

import difflib
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cola_common.errors import ColaError, Reason

DEFAULT_TENANT = "default"
"""Whose everything is on a server that knows no other tenants."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --- the spec -------------------------------------------------------------------------------------------------------


class _Adapter(_Record):
    target_modules: tuple[str, ...] | str = "all-linear"
    """Suffixes of module paths; or one regular expression that the whole path must match; or `"all-linear"`."""
    init_from: str | None = None
    """A checkpoint's id or the id of an uploaded adapter to continue from."""

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not value or (not isinstance(value, str) and not all(value)):
            raise ValueError("name at least one module")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value


class LoraAdapter(_Adapter):
    """The paper's Low Rank; scale s = lora_alpha / r."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)


class LinearAdapter(_Adapter):
    """A full matrix a site."""

    type: Literal["linear"] = "linear"
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class MlpAdapter(_Adapter):
    """A perceptron with ReLU a site."""

    type: Literal["mlp"] = "mlp"
    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(128,), min_length=1)
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)


AdapterSpec = Annotated[LoraAdapter | LinearAdapter | MlpAdapter, Field(discriminator="type")]


class Hyperparameters(_Record):
    """How a job trains. `"auto"` is accepted for any field and means its default."""

    n_epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; given, it takes the place of n_epochs and the data repeats as often as it needs to."""
    batch_size: int = Field(default=4, ge=1)
    max_length: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Global norm to clip at; 0: no clipping."""
    adaptation_interval: int = Field(default=1, ge=1)
    shuffle: bool = True

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v != "auto"} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            raise ValueError("momentum and nesterov belong to optimizer='sgd'")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


Rows = Literal["all", "exact", "sketch"]
Codec = Literal["fp32", "bf16", "fp16", "int8", "int4"]


class Wire(_Record):
    """What travels. `"auto"` leaves a choice to the server's planner, which keeps within `max_error`; what is named
    holds whatever it loses. `wire="auto"` is short for all of it left open.
    """

    rows: Literal[Rows, "auto"] = "auto"
    """`all` rows of x and g; `exact`, the gradient that a worker would make of them; `sketch`, fewer rows that make
    nearly the same gradient.
    """
    values: Literal[Codec, "auto"] = "auto"
    """The codec of what rows leaves."""
    deltas: Literal[Codec, "auto"] = "auto"
    """The codec of deltas; what it loses is carried to the next one."""
    sketch_rows: int = Field(default=64, ge=1)
    """Of a call, at most; for `sketch`."""
    max_error: float = Field(default=0.0, ge=0, le=1)
    """Of a step's gradient, relative to its norm, that what the planner chooses may make. 0: nothing may be lost."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {} if value == "auto" else value


class WirePlan(_Record):
    """What the planner has chosen for a job, or what the job had named."""

    rows: Rows
    values: Codec
    deltas: Codec
    sketch_rows: int
    max_error: float
    """As in `Wire`: where a sketch would be further off than that, all rows are sent. 0: it is sent however far off."""
    error: float
    """Relative, of a step's gradient, that is expected of this; see `docs/wire.md`."""
    reason: str


class Method(_Record):
    """How the loss is made."""

    type: Literal["supervised"] = "supervised"


class Collaboration(_Record):
    """A group of jobs: the forward pass of each sees the base and the mean of all adapters; each fits its own rows."""

    group: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """The first job of that name makes the group, the others join it; it is free again once all of them have ended."""
    size: int = Field(ge=2, le=1024)
    """Members; none starts before all are there."""


class JobSpec(_Record):
    """Everything a job is, from its user's side."""

    model: str
    training_file: str
    joint_files: tuple[str, ...] = ()
    """Further files: their rows follow those of the training file, as if all were in one."""
    validation_file: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    suffix: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    method: Method = Method()
    adapter: AdapterSpec = LoraAdapter()
    hyperparameters: Hyperparameters = Hyperparameters()
    fold: Literal["unmerged", "merged"] = "unmerged"
    wire: Wire = Wire()
    collaboration: Collaboration | None = None

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """The spec from plain fields.

        Raises: `ColaError(INVALID_JOB)` that names the first wrong field and the nearest right ones.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _invalid(error, cls) from None

    @model_validator(mode="after")
    def _mergeable(self) -> Self:
        if self.fold == "merged" and self.adapter.type == "mlp":
            raise ColaError(Reason.NOT_MERGEABLE, family=self.adapter.type)
        return self

    @model_validator(mode="after")
    def _unmerged_with_others(self) -> Self:
        if self.fold == "merged" and self.collaboration is not None:
            problem = "the weights that a group's jobs share hold no one's adapter; use 'unmerged'"
            raise ColaError(Reason.INVALID_JOB, param="fold", problem=problem)
        return self


def _invalid(error: ValidationError, model: type[BaseModel]) -> ColaError:
    first = error.errors(include_url=False, include_context=True)[0]
    path = [str(part) for part in first["loc"]]
    problem = first["msg"]
    if first["type"] == "extra_forbidden":
        known = _fields(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=3) or known
        problem = f"no such field; there is {', '.join(near)}"
    elif first["type"] in ("literal_error", "union_tag_invalid"):
        given = first["input"].get("type") if isinstance(first["input"], dict) else first["input"]
        problem = f"{problem}, not {given!r}"
    elif first["type"] not in ("missing",):
        problem = f"{problem} (got {first['input']!r})"
    return ColaError(Reason.INVALID_JOB, param=".".join(path) or "job", problem=problem)


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    nested: dict[str, type[BaseModel]] = {
        "hyperparameters": Hyperparameters,
        "wire": Wire,
        "method": Method,
        "collaboration": Collaboration,
        "lora": LoraAdapter,
        "linear": LinearAdapter,
        "mlp": MlpAdapter,
    }
    return sorted((nested[path[-1]] if path and path[-1] in nested else model).model_fields)


# --- the status -----------------------------------------------------------------------------------------------------


class JobStatus(StrEnum):
    """Where a job is; `terminal` ones are final."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return not TRANSITIONS[self]


# A job succeeds in queued or paused where its user paused it while its last step was under way.
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATING_FILES: frozenset({JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset(
        {JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


def check_transition(job: str, status: JobStatus, wanted: JobStatus) -> None:
    """Raises `ColaError(ILLEGAL_TRANSITION)` unless a job may go from `status` to `wanted`."""
    if wanted not in TRANSITIONS[status]:
        raise ColaError(Reason.ILLEGAL_TRANSITION, job=job, status=status, wanted=wanted)


# --- the records that users see -------------------------------------------------------------------------------------


class JobFailure(_Record):
    """Why a job failed: `code` is a `Reason`, `param` the field at fault, if one is."""

    code: str
    message: str
    param: str | None = None


class Job(_Record):
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


class JobEvent(_Record):
    """One line of a job's log; `id` grows with time within a job, so that a stream resumes after it."""

    id: int
    job: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: float
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics", "status"] = "message"
    message: str
    data: dict[str, float | str] = Field(default_factory=dict)


class StepMetrics(_Record):
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


class FileObject(_Record):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    filename: str
    purpose: Literal["fine-tune", "adapter"]
    bytes: int
    created_at: float
    digest: str
    """SHA-256, hex."""


class Checkpoint(_Record):
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


class Estimate(_Record):
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


class ModelCard(_Record):
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


class WorkerCard(_Record):
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
