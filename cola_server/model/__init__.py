"""The base model and what jobs do with it. Synchronous; one thread at a time for each base model."""

from cola_server.model.adapted import JobAdapter, Mean
from cola_server.model.base import BaseModel
from cola_server.model.cohort import Captured, Sink
from cola_server.model.export import export_merged
from cola_server.model.load import load
from cola_server.model.merging import Merging
from cola_server.model.probe import probe
from cola_server.model.site import Site
from cola_server.model.step import BatchResult, JobBatch, evaluate, train

__all__ = [
    "BaseModel",
    "BatchResult",
    "Captured",
    "JobAdapter",
    "JobBatch",
    "Mean",
    "Merging",
    "Sink",
    "Site",
    "evaluate",
    "export_merged",
    "load",
    "probe",
    "train",
]
