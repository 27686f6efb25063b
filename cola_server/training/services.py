"""What every job's loop uses."""

import threading
from dataclasses import dataclass, field

from cola_server.fleet import Fleet
from cola_server.jobs import Artefacts, JobStore
from cola_server.tenants import Quotas
from cola_server.training.admission import Admission
from cola_server.training.cadence import SnapshotLimits
from cola_server.training.catalogue import Catalogue
from cola_server.training.cohorts import Cohorts
from cola_server.training.numerics import Numerics
from cola_server.training.observed import Observed


@dataclass(frozen=True)
class Services:
    """Shared by all jobs of a server."""

    store: JobStore
    artefacts: Artefacts
    catalogue: Catalogue
    fleet: Fleet
    numerics: Numerics
    cohorts: Cohorts
    split: int | None
    """Workers that a job's shards are dealt out to; None: as many as are fastest."""
    snapshots: SnapshotLimits
    quotas: Quotas
    """Of tenants: how many of their jobs run at once."""
    admission: Admission
    observed: Observed
    moves: threading.Lock = field(default_factory=threading.Lock)
    """Held by the one job that is on its way to better workers."""
