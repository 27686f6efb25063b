from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromWorker(_message.Message):
    __slots__ = ("hello", "heartbeat", "credit", "norm", "delta", "refusal", "draining", "goodbye", "snapshot", "tensors", "data")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    credit: Credit
    norm: Norm
    delta: Delta
    refusal: Refusal
    draining: Draining
    goodbye: Goodbye
    snapshot: Snapshot
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHeader]
    data: bytes
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., norm: _Optional[_Union[Norm, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorHeader, _Mapping]]] = ..., data: _Optional[bytes] = ...) -> None: ...

class FromServer(_message.Message):
    __slots__ = ("welcome", "assign", "capture", "step_end", "norm_total", "ack", "revoke", "refusal", "heartbeat", "drain", "goodbye", "snapshot_request", "tensors", "data")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    STEP_END_FIELD_NUMBER: _ClassVar[int]
    NORM_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    REVOKE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    assign: Assign
    capture: Capture
    step_end: StepEnd
    norm_total: NormTotal
    ack: Ack
    revoke: Revoke
    refusal: Refusal
    heartbeat: Heartbeat
    drain: Drain
    goodbye: Goodbye
    snapshot_request: SnapshotRequest
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHeader]
    data: bytes
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., assign: _Optional[_Union[Assign, _Mapping]] = ..., capture: _Optional[_Union[Capture, _Mapping]] = ..., step_end: _Optional[_Union[StepEnd, _Mapping]] = ..., norm_total: _Optional[_Union[NormTotal, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., revoke: _Optional[_Union[Revoke, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., snapshot_request: _Optional[_Union[SnapshotRequest, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorHeader, _Mapping]]] = ..., data: _Optional[bytes] = ...) -> None: ...

class TensorHeader(_message.Message):
    __slots__ = ("codec", "shape", "exponent", "nbytes", "checksum")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    codec: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    exponent: int
    nbytes: int
    checksum: int
    def __init__(self, codec: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., exponent: _Optional[int] = ..., nbytes: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("progress", "busy_seconds")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    progress: int
    busy_seconds: float
    def __init__(self, progress: _Optional[int] = ..., busy_seconds: _Optional[float] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("job", "epoch", "step", "reason", "message")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    reason: str
    message: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Capacity(_message.Message):
    __slots__ = ("cores", "memory_bytes", "device", "gflops")
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    GFLOPS_FIELD_NUMBER: _ClassVar[int]
    cores: int
    memory_bytes: int
    device: str
    gflops: float
    def __init__(self, cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., device: _Optional[str] = ..., gflops: _Optional[float] = ...) -> None: ...

class OwnedShard(_message.Message):
    __slots__ = ("job", "site", "step", "digest")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    job: str
    site: str
    step: int
    digest: str
    def __init__(self, job: _Optional[str] = ..., site: _Optional[str] = ..., step: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_min", "protocol_max", "worker", "boot", "capacity", "codecs", "owned", "reductions")
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    OWNED_FIELD_NUMBER: _ClassVar[int]
    REDUCTIONS_FIELD_NUMBER: _ClassVar[int]
    protocol_min: int
    protocol_max: int
    worker: str
    boot: int
    capacity: Capacity
    codecs: _containers.RepeatedScalarFieldContainer[str]
    owned: _containers.RepeatedCompositeFieldContainer[OwnedShard]
    reductions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., worker: _Optional[str] = ..., boot: _Optional[int] = ..., capacity: _Optional[_Union[Capacity, _Mapping]] = ..., codecs: _Optional[_Iterable[str]] = ..., owned: _Optional[_Iterable[_Union[OwnedShard, _Mapping]]] = ..., reductions: _Optional[_Iterable[str]] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("job", "epoch", "batch", "bytes", "seconds")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    batch: int
    bytes: int
    seconds: float
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., batch: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Square(_message.Message):
    __slots__ = ("index", "square")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SQUARE_FIELD_NUMBER: _ClassVar[int]
    index: int
    square: float
    def __init__(self, index: _Optional[int] = ..., square: _Optional[float] = ...) -> None: ...

class Norm(_message.Message):
    __slots__ = ("job", "epoch", "step", "squares")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    squares: _containers.RepeatedCompositeFieldContainer[Square]
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., squares: _Optional[_Iterable[_Union[Square, _Mapping]]] = ...) -> None: ...

class TensorName(_message.Message):
    __slots__ = ("index", "name")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("job", "epoch", "step", "names", "squares", "digest", "worker_seconds", "decode_seconds")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WORKER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    names: _containers.RepeatedCompositeFieldContainer[TensorName]
    squares: _containers.RepeatedCompositeFieldContainer[Square]
    digest: str
    worker_seconds: float
    decode_seconds: float
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., names: _Optional[_Iterable[_Union[TensorName, _Mapping]]] = ..., squares: _Optional[_Iterable[_Union[Square, _Mapping]]] = ..., digest: _Optional[str] = ..., worker_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ...) -> None: ...

class ShardDigest(_message.Message):
    __slots__ = ("index", "digest")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    index: int
    digest: str
    def __init__(self, index: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("job", "epoch", "step", "names", "digests", "kept")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    names: _containers.RepeatedCompositeFieldContainer[TensorName]
    digests: _containers.RepeatedCompositeFieldContainer[ShardDigest]
    kept: bool
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., names: _Optional[_Iterable[_Union[TensorName, _Mapping]]] = ..., digests: _Optional[_Iterable[_Union[ShardDigest, _Mapping]]] = ..., kept: _Optional[bool] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("session", "lease_seconds", "heartbeat_seconds", "window_bytes", "chunk_bytes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    session: str
    lease_seconds: float
    heartbeat_seconds: float
    window_bytes: int
    chunk_bytes: int
    def __init__(self, session: _Optional[str] = ..., lease_seconds: _Optional[float] = ..., heartbeat_seconds: _Optional[float] = ..., window_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class OptimizerPlan(_message.Message):
    __slots__ = ("optimizer", "learning_rate", "momentum", "nesterov", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps", "total_steps")
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LR_SCHEDULER_TYPE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    optimizer: str
    learning_rate: float
    momentum: float
    nesterov: bool
    weight_decay: float
    max_grad_norm: float
    lr_scheduler_type: str
    warmup_steps: int
    total_steps: int
    def __init__(self, optimizer: _Optional[str] = ..., learning_rate: _Optional[float] = ..., momentum: _Optional[float] = ..., nesterov: _Optional[bool] = ..., weight_decay: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., lr_scheduler_type: _Optional[str] = ..., warmup_steps: _Optional[int] = ..., total_steps: _Optional[int] = ...) -> None: ...

class LoraFamily(_message.Message):
    __slots__ = ("r", "scale")
    R_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    r: int
    scale: float
    def __init__(self, r: _Optional[int] = ..., scale: _Optional[float] = ...) -> None: ...

class LinearFamily(_message.Message):
    __slots__ = ("scale",)
    SCALE_FIELD_NUMBER: _ClassVar[int]
    scale: float
    def __init__(self, scale: _Optional[float] = ...) -> None: ...

class MlpFamily(_message.Message):
    __slots__ = ("hidden_sizes", "scale")
    HIDDEN_SIZES_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    hidden_sizes: _containers.RepeatedScalarFieldContainer[int]
    scale: float
    def __init__(self, hidden_sizes: _Optional[_Iterable[int]] = ..., scale: _Optional[float] = ...) -> None: ...

class HeadFamily(_message.Message):
    __slots__ = ("bias",)
    BIAS_FIELD_NUMBER: _ClassVar[int]
    bias: bool
    def __init__(self, bias: _Optional[bool] = ...) -> None: ...

class ShardPlan(_message.Message):
    __slots__ = ("index", "site", "lora", "linear", "mlp", "head", "d_in", "d_out", "group", "rows")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    LINEAR_FIELD_NUMBER: _ClassVar[int]
    MLP_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    D_IN_FIELD_NUMBER: _ClassVar[int]
    D_OUT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    index: int
    site: str
    lora: LoraFamily
    linear: LinearFamily
    mlp: MlpFamily
    head: HeadFamily
    d_in: int
    d_out: int
    group: int
    rows: str
    def __init__(self, index: _Optional[int] = ..., site: _Optional[str] = ..., lora: _Optional[_Union[LoraFamily, _Mapping]] = ..., linear: _Optional[_Union[LinearFamily, _Mapping]] = ..., mlp: _Optional[_Union[MlpFamily, _Mapping]] = ..., head: _Optional[_Union[HeadFamily, _Mapping]] = ..., d_in: _Optional[int] = ..., d_out: _Optional[int] = ..., group: _Optional[int] = ..., rows: _Optional[str] = ...) -> None: ...

class Assign(_message.Message):
    __slots__ = ("job", "epoch", "step", "plan", "values", "max_rows", "shards", "names", "digests", "deltas")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    plan: OptimizerPlan
    values: str
    max_rows: int
    shards: _containers.RepeatedCompositeFieldContainer[ShardPlan]
    names: _containers.RepeatedCompositeFieldContainer[TensorName]
    digests: _containers.RepeatedCompositeFieldContainer[ShardDigest]
    deltas: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., plan: _Optional[_Union[OptimizerPlan, _Mapping]] = ..., values: _Optional[str] = ..., max_rows: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[ShardPlan, _Mapping]]] = ..., names: _Optional[_Iterable[_Union[TensorName, _Mapping]]] = ..., digests: _Optional[_Iterable[_Union[ShardDigest, _Mapping]]] = ..., deltas: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("kind", "index", "call", "name")
    KIND_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    kind: str
    index: int
    call: int
    name: str
    def __init__(self, kind: _Optional[str] = ..., index: _Optional[int] = ..., call: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class Capture(_message.Message):
    __slots__ = ("job", "epoch", "batch", "parts")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    batch: int
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., batch: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

class Calls(_message.Message):
    __slots__ = ("index", "calls", "rows")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    index: int
    calls: int
    rows: int
    def __init__(self, index: _Optional[int] = ..., calls: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class StepEnd(_message.Message):
    __slots__ = ("job", "epoch", "batch", "step", "batches", "calls")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    batch: int
    step: int
    batches: int
    calls: _containers.RepeatedCompositeFieldContainer[Calls]
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., batch: _Optional[int] = ..., step: _Optional[int] = ..., batches: _Optional[int] = ..., calls: _Optional[_Iterable[_Union[Calls, _Mapping]]] = ...) -> None: ...

class NormTotal(_message.Message):
    __slots__ = ("job", "epoch", "step", "total")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    total: float
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., total: _Optional[float] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("job", "epoch", "step", "digest")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    digest: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("job", "epoch", "step")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Revoke(_message.Message):
    __slots__ = ("job", "epoch", "reason", "keep")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    reason: str
    keep: bool
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ..., keep: _Optional[bool] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
