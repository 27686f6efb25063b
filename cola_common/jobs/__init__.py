"""Jobs as server and client speak of them: the spec, the status with its legal transitions, and the records.

These are domain types: the wire has its own (`cola_common.wire`), the database its own (`cola_server.jobs`).
"""

from cola_common.jobs.objects import (
    DEFAULT_TENANT,
    Checkpoint,
    Estimate,
    FileObject,
    Job,
    JobEvent,
    JobFailure,
    ModelCard,
    StepMetrics,
    WorkerCard,
)
from cola_common.jobs.spec import (
    AdapterSpec,
    Codec,
    Collaboration,
    Hyperparameters,
    JobSpec,
    LinearAdapter,
    LoraAdapter,
    Method,
    MlpAdapter,
    Rows,
    Wire,
    WirePlan,
)
from cola_common.jobs.status import (
    TRANSITIONS,
    JobStatus,
    check_transition,
)

__all__ = [
    "DEFAULT_TENANT",
    "TRANSITIONS",
    "AdapterSpec",
    "Checkpoint",
    "Codec",
    "Collaboration",
    "Estimate",
    "FileObject",
    "Hyperparameters",
    "Job",
    "JobEvent",
    "JobFailure",
    "JobSpec",
    "JobStatus",
    "LinearAdapter",
    "LoraAdapter",
    "Method",
    "MlpAdapter",
    "ModelCard",
    "Rows",
    "StepMetrics",
    "Wire",
    "WirePlan",
    "WorkerCard",
    "check_transition",
]
