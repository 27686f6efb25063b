"""What every job's loop uses."""

import threading
from dataclasses import dataclass, field

from cola_server.fleet import Fleet
from cola_server.jobs import Artefacts, JobStore
from cola_server.training.cadence import SnapshotLimits
from cola_server.training.catalogue import Catalogue
from cola_server.training.numerics import Numerics


@dataclass(frozen=True)
class Services:
    """Shared by all jobs of a server."""

    store: JobStore
    artefacts: Artefacts
    catalogue: Catalogue
    fleet: Fleet
    numerics: Numerics
    split: int
    """Workers that a job's shards are dealt out to; 1 keeps a job together."""
    snapshots: SnapshotLimits
    max_running_jobs: int
    moves: threading.Lock = field(default_factory=threading.Lock)
    """Held by the one job that is on its way to better workers."""
