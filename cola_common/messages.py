"""What server and worker say to each other on `Fleet.Attend`, as plain frozen types. Free of torch and protobuf.

Legend: N rows of one job in one batch; d_in, d_out a site's widths. Shards of a job are numbered in site order,
and `index` is that number everywhere. `group` numbers the sites' shared inputs: x is sent once for a group and call.
"""

from dataclasses import dataclass

from cola_common.families import Family

PROTOCOL = 1

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor's values in a codec's bytes.

    `checksum` is xxh3-64 over `data`; `decode` in `cola_common.tensor` checks it. `exponent` is the power of two
    that the codec divided by before it narrowed the values (0 where it has none).
    """

    codec: str
    shape: tuple[int, ...]
    exponent: int
    nbytes: int
    checksum: int
    data: Buffer


# --- both ways ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heartbeat:
    """`progress` counts what the sender's training thread has finished; `busy_seconds` is its present work's age."""

    progress: int
    busy_seconds: float


@dataclass(frozen=True)
class Goodbye:
    """The last message of a stream that ends on purpose."""

    reason: str


@dataclass(frozen=True)
class Refusal:
    """A message about a job was not accepted and changed nothing. `reason` is a `cola_common.errors.Reason`."""

    job: str
    epoch: int
    step: int
    reason: str
    message: str


# --- worker to server -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capacity:
    """What a worker can carry, measured by itself when it starts. The server corrects it by what it sees."""

    cores: int
    memory_bytes: int
    device: str
    gflops: float
    """Of the thin products that make a LoRA's gradient."""


@dataclass(frozen=True)
class OwnedShard:
    """A shard on the worker's disk, after `step` steps, with the digest of its parameters and optimizer state."""

    job: str
    site: str
    step: int
    digest: str


@dataclass(frozen=True)
class Hello:
    """A worker's first message. `boot` is new at each start of its process."""

    protocol_min: int
    protocol_max: int
    worker: str
    boot: int
    """Unix nanoseconds of the process's start: of two processes with one identity the greater is the newer."""
    capacity: Capacity
    codecs: tuple[str, ...]
    owned: tuple[OwnedShard, ...]
    reductions: tuple[str, ...] = ("all",)
    """What it takes of a capture's rows, as in `ShardPlan.rows`."""


@dataclass(frozen=True)
class Credit:
    """The worker has accumulated a capture of this batch whose tensors were `bytes` long; that much may follow."""

    job: str
    epoch: int
    batch: int
    bytes: int
    seconds: float
    """How long the capture was here: the rest of the time since it was sent is the way's, both ways."""


@dataclass(frozen=True)
class Norm:
    """Squared gradient norms of a step, fp64, one for each of the worker's shards that were called."""

    job: str
    epoch: int
    step: int
    squares: tuple[tuple[int, float], ...]
    """(shard index, squared norm)"""


@dataclass(frozen=True)
class Delta:
    """New minus old parameters of one step, for all of the worker's shards of a job that were called."""

    job: str
    epoch: int
    step: int
    """0 for the first."""
    names: tuple[tuple[int, str], ...]
    """(shard index, parameter name) of each tensor in `tensors`."""
    squares: tuple[tuple[int, float], ...]
    """As in `Norm`: the gradient norm is a metric also where nothing is clipped."""
    digest: str
    """Of the worker's shards after this step, chained; see `cola_common.tensor.digest`."""
    worker_seconds: float
    tensors: tuple[EncodedTensor, ...]
    decode_seconds: float = 0.0
    """Of these, for reading captures."""


@dataclass(frozen=True)
class Snapshot:
    """The worker's half of a snapshot: the optimizer state of its shards of a job, after `step` steps, and what the
    codec of deltas has not yet let through.

    `names` are (shard index, `<parameter>.<entry>`) of each tensor in `tensors`, fp32; a shard that was never stepped
    has none.
    """

    job: str
    epoch: int
    step: int
    names: tuple[tuple[int, str], ...]
    digests: tuple[tuple[int, str], ...]
    """(shard index, digest of parameters and optimizer state) of each of the worker's shards."""
    kept: bool
    """Whether the same state lies on the worker's disk now."""
    tensors: tuple[EncodedTensor, ...]


@dataclass(frozen=True)
class Draining:
    """The worker wants to leave: no new Assign, please, and a Goodbye once its jobs have gone."""


# --- server to worker -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Welcome:
    """The server's answer to Hello."""

    session: str
    lease_seconds: float
    heartbeat_seconds: float
    window_bytes: int
    """Capture bytes that may be on their way or not yet accumulated."""
    chunk_bytes: int


@dataclass(frozen=True)
class OptimizerPlan:
    """All that makes a step from a gradient. The learning rate of step k is `cola_common.schedules.learning_rate`."""

    optimizer: str
    learning_rate: float
    momentum: float
    nesterov: bool
    weight_decay: float
    max_grad_norm: float
    lr_scheduler_type: str
    warmup_steps: int
    total_steps: int


@dataclass(frozen=True)
class ShardPlan:
    """One shard that the worker is to own."""

    index: int
    site: str
    family: Family
    d_in: int
    d_out: int
    group: int
    rows: str = "all"
    """What comes of its captures: `all` or `sketch`, x and g, in `sketch` fewer rows than there were; `exact`, the
    gradient that the worker would make of them.
    """


@dataclass(frozen=True)
class Assign:
    """From now on the worker owns these shards of `job`, at version `step`, under `epoch`.

    `names` and `tensors` are their fp32 parameters, (shard index, parameter name) each, and behind all of them the
    optimizer state, (shard index, `<parameter>.<entry>`), of those shards whose state the worker does not own.
    """

    job: str
    epoch: int
    step: int
    plan: OptimizerPlan
    values: str
    """The codec of captures."""
    max_rows: int
    """No capture has more rows: the bound of every buffer that the worker takes for this job."""
    shards: tuple[ShardPlan, ...]
    digests: tuple[tuple[int, str], ...]
    """(shard index, digest of parameters and optimizer state) as the snapshot has it; none where a job begins."""
    names: tuple[tuple[int, str], ...]
    tensors: tuple[EncodedTensor, ...]
    deltas: str = "fp32"
    """The codec of deltas."""


@dataclass(frozen=True)
class Part:
    """What one tensor of a capture is: `x` of a group and call, `g` of a shard and call, or `w`, the gradient in the
    parameter `name` of a shard and call.
    """

    kind: str  # "x", "g" or "w"
    index: int  # the group's number for x, the shard's for g and w
    call: int
    name: str = ""


@dataclass(frozen=True)
class Capture:
    """Hidden inputs and output gradients of one batch, or what was made of them; parts[i] says what tensors[i] is.

    x is N×d_in, g is N×d_out, padding dropped. An x comes before, or in the same frame as, the first g of its group
    and call. Gradients are as `cola_common.tensor.encode_parameter` writes them. Small parts are packed into one frame.
    """

    job: str
    epoch: int
    batch: int
    parts: tuple[Part, ...]
    tensors: tuple[EncodedTensor, ...]


@dataclass(frozen=True)
class Calls:
    """How often a shard's site was called in a batch, and the rows of all its calls together that were sent."""

    index: int
    calls: int
    rows: int


@dataclass(frozen=True)
class StepEnd:
    """All captures of a batch have been sent. With `batches` > 0 the batch closes the step, whose gradient is the mean
    over that many batches.
    """

    job: str
    epoch: int
    batch: int
    step: int
    batches: int
    calls: tuple[Calls, ...]
    """Of the worker's shards that were called."""


@dataclass(frozen=True)
class NormTotal:
    """The job's global gradient norm of a step, over all its workers."""

    job: str
    epoch: int
    step: int
    total: float


@dataclass(frozen=True)
class Ack:
    """The delta of a step is folded; `digest` is the server's, after it."""

    job: str
    epoch: int
    step: int
    digest: str


@dataclass(frozen=True)
class SnapshotRequest:
    """Asks for a `Snapshot` of the job as it is after `step` steps: now, before the next capture."""

    job: str
    epoch: int
    step: int


@dataclass(frozen=True)
class Revoke:
    """The worker owns no shard of `job` any more. `keep`: it may still be asked to go on from its last snapshot."""

    job: str
    epoch: int
    reason: str
    keep: bool


@dataclass(frozen=True)
class Drain:
    """The server asks the worker to leave."""


ToServer = Hello | Heartbeat | Credit | Norm | Delta | Snapshot | Refusal | Draining | Goodbye
ToWorker = (
    Welcome
    | Assign
    | Capture
    | StepEnd
    | NormTotal
    | Ack
    | SnapshotRequest
    | Revoke
    | Refusal
    | Heartbeat
    | Drain
    | Goodbye
)
Message = ToServer | ToWorker


def payload(message: Message) -> tuple[EncodedTensor, ...]:
    """The tensors that a message carries, none for most."""
    return message.tensors if isinstance(message, Assign | Capture | Delta | Snapshot) else ()
