"""Blame, placed once.

A worker whose answer to a step was refused is only suspected. If another worker fails at the same step, the job is at
fault and both workers are cleared; if another worker gets past it, the suspect sent a bad delta.
"""

from dataclasses import dataclass

from cola_common.errors import Reason
from cola_server.fleet import WorkerBlamed


@dataclass(frozen=True)
class Verdict:
    """A worker that sent a bad delta, and what was wrong with it."""

    worker: str
    problem: str


class Judgement:
    """What one job knows of its workers' faults."""

    def __init__(self) -> None:
        self._suspect: WorkerBlamed | None = None

    def avoid(self, others: bool) -> frozenset[str]:
        """Workers that the next attempt should do without.

        A gradient that is not finite may well be the job's own: where there are no `others` the same worker tries
        again. A damaged delta is not, and the job waits for another worker.
        """
        if self._suspect is None:
            return frozenset()
        if not others and self._suspect.error.reason == Reason.NON_FINITE_GRADIENT:
            return frozenset()
        return frozenset({self._suspect.worker})

    def blame(self, fault: WorkerBlamed) -> None:
        """Takes note of a fault. Raises: the fault's `ColaError` where it is the job's."""
        earlier = self._suspect
        self._suspect = fault
        if earlier is None or earlier.step != fault.step:
            return
        if earlier.worker != fault.worker or fault.error.reason == Reason.NON_FINITE_GRADIENT:
            self._suspect = None
            raise fault.error

    def passed(self, step: int, workers: list[str]) -> Verdict | None:
        """These workers got past `step`. Returns: who is convicted by that, if anyone."""
        suspect = self._suspect
        if suspect is None or step < suspect.step:
            return None
        self._suspect = None
        return None if suspect.worker in workers else Verdict(suspect.worker, str(suspect.error))
