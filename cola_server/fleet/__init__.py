"""Workers: who attends, who owns what, and what goes to and fro between them and a job."""

from cola_server.fleet.exchange import DeltaForm, Exchange, WorkerBlamed, WorkerLost, WorkerSlow
from cola_server.fleet.outbox import Outbox, OutboxClosed
from cola_server.fleet.pace import FASTEST
from cola_server.fleet.placement import Candidate, Load, ShardLoad, carried, place
from cola_server.fleet.registry import Attendance, Fleet, FleetLimits

__all__ = [
    "FASTEST",
    "Attendance",
    "Candidate",
    "DeltaForm",
    "Exchange",
    "Fleet",
    "FleetLimits",
    "Load",
    "Outbox",
    "OutboxClosed",
    "ShardLoad",
    "WorkerBlamed",
    "WorkerLost",
    "WorkerSlow",
    "carried",
    "place",
]
