"""A job's course over its attempts: what it keeps from one to the next, and how one ends."""

from dataclasses import dataclass
from enum import Enum

from cola_server.training.cadence import Cadence
from cola_server.training.judgement import Judgement
from cola_server.training.owners import Owners
from cola_server.training.prepared import Prepared
from cola_server.training.records import Records
from cola_server.training.services import Services
from cola_server.training.snapshots import Snapshots
from cola_server.training.turn import Turn


class End(Enum):
    """How an attempt ends that does not fail."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    """The job was asked to give up its turn; a snapshot is where it stopped."""
    MOVING = "moving"
    """Its workers leave or others are better; a snapshot is where it stopped."""


@dataclass(frozen=True)
class Course:
    """What a job keeps from one attempt to the next."""

    prepared: Prepared
    services: Services
    records: Records
    snapshots: Snapshots
    judgement: Judgement
    owners: Owners
    cadence: Cadence
    turn: Turn
