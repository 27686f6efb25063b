"""Jobs as the server keeps them: store, artefacts, uploads, and the rules of what users ask for. Free of gRPC."""

from cola_server.jobs.artefacts import Artefacts
from cola_server.jobs.files import Limits, Upload
from cola_server.jobs.service import Catalogue, JobService, Scheduler
from cola_server.jobs.store import JobStore

__all__ = ["Artefacts", "Catalogue", "JobService", "JobStore", "Limits", "Scheduler", "Upload"]
