"""Domain <-> wire: the only home of `x_to_wire` and `x_from_wire`. Knows no torch and no grpc."""

from cola_common.convert.records import (
    checkpoint_from_wire,
    checkpoint_to_wire,
    event_from_wire,
    event_to_wire,
    file_from_wire,
    file_to_wire,
    job_from_wire,
    job_to_wire,
    metrics_from_wire,
    metrics_to_wire,
    model_from_wire,
    model_to_wire,
    spec_from_wire,
    spec_to_wire,
    worker_from_wire,
    worker_to_wire,
)
from cola_common.convert.stream import (
    to_server_from_wire,
    to_server_to_wire,
    to_worker_from_wire,
    to_worker_to_wire,
)

__all__ = [
    "checkpoint_from_wire",
    "checkpoint_to_wire",
    "event_from_wire",
    "event_to_wire",
    "file_from_wire",
    "file_to_wire",
    "job_from_wire",
    "job_to_wire",
    "metrics_from_wire",
    "metrics_to_wire",
    "model_from_wire",
    "model_to_wire",
    "spec_from_wire",
    "spec_to_wire",
    "to_server_from_wire",
    "to_server_to_wire",
    "to_worker_from_wire",
    "to_worker_to_wire",
    "worker_from_wire",
    "worker_to_wire",
]
