from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoraAdapter(_message.Message):
    __slots__ = ("r", "lora_alpha")
    R_FIELD_NUMBER: _ClassVar[int]
    LORA_ALPHA_FIELD_NUMBER: _ClassVar[int]
    r: int
    lora_alpha: float
    def __init__(self, r: _Optional[int] = ..., lora_alpha: _Optional[float] = ...) -> None: ...

class LinearAdapter(_message.Message):
    __slots__ = ("scale",)
    SCALE_FIELD_NUMBER: _ClassVar[int]
    scale: float
    def __init__(self, scale: _Optional[float] = ...) -> None: ...

class MlpAdapter(_message.Message):
    __slots__ = ("hidden_sizes", "scale")
    HIDDEN_SIZES_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    hidden_sizes: _containers.RepeatedScalarFieldContainer[int]
    scale: float
    def __init__(self, hidden_sizes: _Optional[_Iterable[int]] = ..., scale: _Optional[float] = ...) -> None: ...

class AdapterSpec(_message.Message):
    __slots__ = ("lora", "linear", "mlp", "target_modules", "target_pattern", "init_from")
    LORA_FIELD_NUMBER: _ClassVar[int]
    LINEAR_FIELD_NUMBER: _ClassVar[int]
    MLP_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    TARGET_PATTERN_FIELD_NUMBER: _ClassVar[int]
    INIT_FROM_FIELD_NUMBER: _ClassVar[int]
    lora: LoraAdapter
    linear: LinearAdapter
    mlp: MlpAdapter
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    target_pattern: str
    init_from: str
    def __init__(self, lora: _Optional[_Union[LoraAdapter, _Mapping]] = ..., linear: _Optional[_Union[LinearAdapter, _Mapping]] = ..., mlp: _Optional[_Union[MlpAdapter, _Mapping]] = ..., target_modules: _Optional[_Iterable[str]] = ..., target_pattern: _Optional[str] = ..., init_from: _Optional[str] = ...) -> None: ...

class Hyperparameters(_message.Message):
    __slots__ = ("n_epochs", "max_steps", "batch_size", "max_length", "learning_rate", "optimizer", "momentum", "nesterov", "weight_decay", "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "adaptation_interval", "shuffle")
    N_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    LR_SCHEDULER_TYPE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    ADAPTATION_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    SHUFFLE_FIELD_NUMBER: _ClassVar[int]
    n_epochs: int
    max_steps: int
    batch_size: int
    max_length: int
    learning_rate: float
    optimizer: str
    momentum: float
    nesterov: bool
    weight_decay: float
    lr_scheduler_type: str
    warmup_ratio: float
    max_grad_norm: float
    adaptation_interval: int
    shuffle: bool
    def __init__(self, n_epochs: _Optional[int] = ..., max_steps: _Optional[int] = ..., batch_size: _Optional[int] = ..., max_length: _Optional[int] = ..., learning_rate: _Optional[float] = ..., optimizer: _Optional[str] = ..., momentum: _Optional[float] = ..., nesterov: _Optional[bool] = ..., weight_decay: _Optional[float] = ..., lr_scheduler_type: _Optional[str] = ..., warmup_ratio: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., adaptation_interval: _Optional[int] = ..., shuffle: _Optional[bool] = ...) -> None: ...

class Wire(_message.Message):
    __slots__ = ("rows", "values", "deltas", "sketch_rows", "max_error")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    SKETCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_FIELD_NUMBER: _ClassVar[int]
    rows: str
    values: str
    deltas: str
    sketch_rows: int
    max_error: float
    def __init__(self, rows: _Optional[str] = ..., values: _Optional[str] = ..., deltas: _Optional[str] = ..., sketch_rows: _Optional[int] = ..., max_error: _Optional[float] = ...) -> None: ...

class WirePlan(_message.Message):
    __slots__ = ("rows", "values", "deltas", "sketch_rows", "max_error", "error", "reason")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    SKETCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    rows: str
    values: str
    deltas: str
    sketch_rows: int
    max_error: float
    error: float
    reason: str
    def __init__(self, rows: _Optional[str] = ..., values: _Optional[str] = ..., deltas: _Optional[str] = ..., sketch_rows: _Optional[int] = ..., max_error: _Optional[float] = ..., error: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class Method(_message.Message):
    __slots__ = ("type",)
    TYPE_FIELD_NUMBER: _ClassVar[int]
    type: str
    def __init__(self, type: _Optional[str] = ...) -> None: ...

class Collaboration(_message.Message):
    __slots__ = ("group", "size")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    group: str
    size: int
    def __init__(self, group: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("model", "training_file", "validation_file", "seed", "suffix", "metadata", "method", "adapter", "hyperparameters", "fold", "wire", "joint_files", "collaboration")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FILE_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_FILE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FOLD_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    JOINT_FILES_FIELD_NUMBER: _ClassVar[int]
    COLLABORATION_FIELD_NUMBER: _ClassVar[int]
    model: str
    training_file: str
    validation_file: str
    seed: int
    suffix: str
    metadata: _containers.ScalarMap[str, str]
    method: Method
    adapter: AdapterSpec
    hyperparameters: Hyperparameters
    fold: str
    wire: Wire
    joint_files: _containers.RepeatedScalarFieldContainer[str]
    collaboration: Collaboration
    def __init__(self, model: _Optional[str] = ..., training_file: _Optional[str] = ..., validation_file: _Optional[str] = ..., seed: _Optional[int] = ..., suffix: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., method: _Optional[_Union[Method, _Mapping]] = ..., adapter: _Optional[_Union[AdapterSpec, _Mapping]] = ..., hyperparameters: _Optional[_Union[Hyperparameters, _Mapping]] = ..., fold: _Optional[str] = ..., wire: _Optional[_Union[Wire, _Mapping]] = ..., joint_files: _Optional[_Iterable[str]] = ..., collaboration: _Optional[_Union[Collaboration, _Mapping]] = ...) -> None: ...

class JobFailure(_message.Message):
    __slots__ = ("code", "message", "param")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "created_at", "started_at", "finished_at", "estimated_finish", "status", "spec", "error", "fine_tuned_model", "trained_tokens", "step", "total_steps", "epoch", "waiting_for_workers", "tenant", "queue_place", "group_id", "wire_plan")
    ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_FINISH_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FINE_TUNED_MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_WORKERS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_PLACE_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    WIRE_PLAN_FIELD_NUMBER: _ClassVar[int]
    id: str
    created_at: float
    started_at: float
    finished_at: float
    estimated_finish: float
    status: str
    spec: JobSpec
    error: JobFailure
    fine_tuned_model: str
    trained_tokens: int
    step: int
    total_steps: int
    epoch: int
    waiting_for_workers: bool
    tenant: str
    queue_place: int
    group_id: str
    wire_plan: WirePlan
    def __init__(self, id: _Optional[str] = ..., created_at: _Optional[float] = ..., started_at: _Optional[float] = ..., finished_at: _Optional[float] = ..., estimated_finish: _Optional[float] = ..., status: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., error: _Optional[_Union[JobFailure, _Mapping]] = ..., fine_tuned_model: _Optional[str] = ..., trained_tokens: _Optional[int] = ..., step: _Optional[int] = ..., total_steps: _Optional[int] = ..., epoch: _Optional[int] = ..., waiting_for_workers: _Optional[bool] = ..., tenant: _Optional[str] = ..., queue_place: _Optional[int] = ..., group_id: _Optional[str] = ..., wire_plan: _Optional[_Union[WirePlan, _Mapping]] = ...) -> None: ...

class EventDatum(_message.Message):
    __slots__ = ("number", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: float
    text: str
    def __init__(self, number: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("id", "job", "created_at", "level", "type", "message", "data")
    class DataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: EventDatum
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[EventDatum, _Mapping]] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    id: int
    job: str
    created_at: float
    level: str
    type: str
    message: str
    data: _containers.MessageMap[str, EventDatum]
    def __init__(self, id: _Optional[int] = ..., job: _Optional[str] = ..., created_at: _Optional[float] = ..., level: _Optional[str] = ..., type: _Optional[str] = ..., message: _Optional[str] = ..., data: _Optional[_Mapping[str, EventDatum]] = ...) -> None: ...

class StepMetrics(_message.Message):
    __slots__ = ("step", "epoch", "train_loss", "valid_loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "created_at", "seconds", "model_seconds", "encode_seconds", "wire_seconds", "worker_seconds", "fold_seconds", "sent_bytes", "received_bytes", "reduce_seconds", "decode_seconds", "rows", "sent_rows", "raw_bytes", "raw_delta_bytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    VALID_LOSS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TARGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WIRE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORKER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FOLD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REDUCE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SENT_ROWS_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    RAW_DELTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    train_loss: float
    valid_loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    target_tokens: int
    created_at: float
    seconds: float
    model_seconds: float
    encode_seconds: float
    wire_seconds: float
    worker_seconds: float
    fold_seconds: float
    sent_bytes: int
    received_bytes: int
    reduce_seconds: float
    decode_seconds: float
    rows: int
    sent_rows: int
    raw_bytes: int
    raw_delta_bytes: int
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., train_loss: _Optional[float] = ..., valid_loss: _Optional[float] = ..., learning_rate: _Optional[float] = ..., grad_norm: _Optional[float] = ..., tokens: _Optional[int] = ..., target_tokens: _Optional[int] = ..., created_at: _Optional[float] = ..., seconds: _Optional[float] = ..., model_seconds: _Optional[float] = ..., encode_seconds: _Optional[float] = ..., wire_seconds: _Optional[float] = ..., worker_seconds: _Optional[float] = ..., fold_seconds: _Optional[float] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., reduce_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ..., rows: _Optional[int] = ..., sent_rows: _Optional[int] = ..., raw_bytes: _Optional[int] = ..., raw_delta_bytes: _Optional[int] = ...) -> None: ...

class FileObject(_message.Message):
    __slots__ = ("id", "filename", "purpose", "bytes", "created_at", "digest")
    ID_FIELD_NUMBER: _ClassVar[int]
    FILENAME_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: float
    digest: str
    def __init__(self, id: _Optional[str] = ..., filename: _Optional[str] = ..., purpose: _Optional[str] = ..., bytes: _Optional[int] = ..., created_at: _Optional[float] = ..., digest: _Optional[str] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("id", "job", "step_number", "created_at", "metrics", "digest")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_NUMBER_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    job: str
    step_number: int
    created_at: float
    metrics: _containers.ScalarMap[str, float]
    digest: str
    def __init__(self, id: _Optional[str] = ..., job: _Optional[str] = ..., step_number: _Optional[int] = ..., created_at: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., digest: _Optional[str] = ...) -> None: ...

class Estimate(_message.Message):
    __slots__ = ("examples", "total_steps", "trainable_parameters", "server_bytes", "server_limit_bytes", "adapter_bytes", "capture_bytes", "pass_bytes", "worker_bytes", "snapshot_bytes", "sent_bytes", "received_bytes", "seconds", "wire_plan")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SERVER_BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVER_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PASS_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKER_BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WIRE_PLAN_FIELD_NUMBER: _ClassVar[int]
    examples: int
    total_steps: int
    trainable_parameters: int
    server_bytes: int
    server_limit_bytes: int
    adapter_bytes: int
    capture_bytes: int
    pass_bytes: int
    worker_bytes: int
    snapshot_bytes: int
    sent_bytes: int
    received_bytes: int
    seconds: float
    wire_plan: WirePlan
    def __init__(self, examples: _Optional[int] = ..., total_steps: _Optional[int] = ..., trainable_parameters: _Optional[int] = ..., server_bytes: _Optional[int] = ..., server_limit_bytes: _Optional[int] = ..., adapter_bytes: _Optional[int] = ..., capture_bytes: _Optional[int] = ..., pass_bytes: _Optional[int] = ..., worker_bytes: _Optional[int] = ..., snapshot_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., wire_plan: _Optional[_Union[WirePlan, _Mapping]] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("id", "task", "dtype", "device", "parameters", "busy_seconds", "waiting_seconds", "jobless_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    JOBLESS_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    task: str
    dtype: str
    device: str
    parameters: int
    busy_seconds: float
    waiting_seconds: float
    jobless_seconds: float
    def __init__(self, id: _Optional[str] = ..., task: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., parameters: _Optional[int] = ..., busy_seconds: _Optional[float] = ..., waiting_seconds: _Optional[float] = ..., jobless_seconds: _Optional[float] = ...) -> None: ...

class WorkerCard(_message.Message):
    __slots__ = ("id", "status", "cores", "memory_bytes", "device", "gflops", "shards", "last_seen")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    GFLOPS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_FIELD_NUMBER: _ClassVar[int]
    id: str
    status: str
    cores: int
    memory_bytes: int
    device: str
    gflops: float
    shards: int
    last_seen: float
    def __init__(self, id: _Optional[str] = ..., status: _Optional[str] = ..., cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., device: _Optional[str] = ..., gflops: _Optional[float] = ..., shards: _Optional[int] = ..., last_seen: _Optional[float] = ...) -> None: ...
