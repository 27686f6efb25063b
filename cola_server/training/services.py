"""What every job's loop uses."""

from dataclasses import dataclass

from cola_server.fleet import Fleet
from cola_server.jobs import Artefacts, JobStore
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
