"""Which workers may own a job's shards: placement with what the job has learnt of its workers."""

import asyncio
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from cola_common.jobs import WirePlan
from cola_common.messages import Calls
from cola_server.fleet import Candidate, Load, carried, place
from cola_server.training.judgement import Judgement
from cola_server.training.loads import Loads
from cola_server.training.prepared import Prepared
from cola_server.training.services import Services
from cola_server.training.snapshots import Snapshot
from cola_server.training.wiring import Wiring

MOVE_SECONDS = 5.0
"""What a move must gain a job that runs, and waits for a snapshot, a new epoch and its assignment: twice what these
take, since on a busy machine a worker may just have had bad luck.
"""


class Owners:
    """For one job. Belongs to the event loop."""

    def __init__(self, prepared: Prepared, services: Services, judgement: Judgement) -> None:
        self._prepared = prepared
        self._fleet = services.fleet
        self._parts = services.split
        self._interval = prepared.spec.hyperparameters.adaptation_interval
        self._judgement = judgement
        self._moves = services.moves
        self._destination: Mapping[int, str] | None = None
        """Where the job is on its way to, if it is."""
        self._slow: set[str] = set()
        self._wiring = Wiring(prepared, services)

    def avoid(self, owners: Mapping[int, str], workers: Collection[str], seconds: float) -> None:
        """These were too slow with a step, which is not done after so long: others go first from now on."""
        self._slow.update(workers)
        loads = self.load(owners)
        for worker in workers:
            self._fleet.late(worker, loads[worker].work * self._interval, seconds)

    def find(self, start: Snapshot | None) -> Mapping[int, str] | None:
        """Shard number -> worker for a job that goes on from `start`; None where the workers cannot carry it now."""
        candidates = self._candidates(start)
        if not candidates:
            return None
        self._wiring.settle(candidates)
        candidates = [c for c in candidates if self._wiring.carries(c)]  # known once there is a plan
        if self._destination is not None and set(self._destination.values()) <= {c.worker for c in candidates}:
            return self._destination  # whose disks know nothing of the job, or it would have been there before
        fast = [c for c in candidates if c.worker not in self._slow]
        left = self._left(start.step if start else 0)
        return self._place(fast, batches=left) or self._place(candidates, batches=left)

    def elsewhere(self, workers: Collection[str]) -> bool:
        """Whether the job could go on without these."""
        out = {*workers, *self._slow}
        return self._place([c for c in self._candidates(None) if c.worker not in out]) is not None

    def load(self, owners: Mapping[int, str]) -> Mapping[str, Load]:
        """What a batch asks of each owner."""
        return carried(self._loads.shards, owners)

    @property
    def plan(self) -> WirePlan:
        """What travels; there is one once owners were found."""
        assert self._wiring.plan is not None
        return self._wiring.plan

    def wires(self, owners: Mapping[int, str]) -> Mapping[str, WirePlan]:
        """What travels between the server and each owner, as that one knows it."""
        return self._wiring.of_workers(set(owners.values()), self._candidates(None))

    def replanned(self, owners: Mapping[int, str], step: int) -> bool:
        """Whether the job, at `step`, should go on with another plan, which is `plan` now."""
        return self._wiring.better(set(owners.values()), self._candidates(None), self._left(step))

    def stepped(self, owners: Mapping[int, str], calls: Iterable[Calls], seconds: Mapping[str, float]) -> None:
        """A step with these calls took each worker so long."""
        for worker, work in self._loads.work(owners, calls).items():
            self._fleet.observe(worker, work, seconds[worker])

    def better(self, owners: Mapping[int, str], step: int, waited: float) -> bool:
        """Whether a move from `owners` pays before the job ends, which is at `step` and waits for its workers so many
        seconds a step: it cannot gain more. If so no other job may move until this one has `settled`: all would go to
        the same place.
        """
        if not self._moves.locked():
            self._destination = self._far_better(owners, step, waited)
            if self._destination is not None:
                self._moves.acquire(blocking=False)
        return self._destination is not None

    def settled(self) -> None:
        """The job has its new owners, or needs none."""
        if self._destination is not None:
            self._destination = None
            self._moves.release()

    def _far_better(self, owners: Mapping[int, str], step: int, waited: float) -> Mapping[int, str] | None:
        left, most = self._left(step), waited / self._interval
        if left * most <= MOVE_SECONDS:
            return None  # whatever there may be elsewhere
        candidates = [
            replace(c, owned=frozenset(index for index, worker in owners.items() if worker == c.worker))
            for c in self._candidates(None)
            if c.worker not in self._slow or c.worker in owners.values()
        ]
        if not set(owners.values()) <= {c.worker for c in candidates}:
            return None
        found = self._place(candidates, batches=left, restart=MOVE_SECONDS, most=most)
        return None if found == owners else found

    def owned(self, owners: Mapping[int, str], start: Snapshot) -> set[int]:
        """The shards whose state their owners have on their disks."""
        have = {c.worker: c.owned for c in self._candidates(start)}
        return {index for index, worker in owners.items() if index in have.get(worker, ())}

    def change(self) -> asyncio.Future[None]:
        """As `Fleet.change`."""
        return self._fleet.change()

    def _place(
        self, candidates: Sequence[Candidate], *, batches: int = 0, restart: float = 0.0, most: float = math.inf
    ) -> Mapping[int, str] | None:
        return place(self._loads.shards, candidates, self._parts, batches=batches, restart=restart, most=most)

    def _left(self, step: int) -> int:
        """Batches from `step` on."""
        return self._prepared.total_batches - step * self._interval

    def _candidates(self, start: Snapshot | None) -> list[Candidate]:
        state = {s.name: (s.index, start.digests[s.index]) for s in self._prepared.sites} if start else {}
        candidates = self._fleet.candidates(
            job=self._prepared.job,
            step=start.step if start else 0,
            state=state,
        )
        avoid = self._judgement.avoid(others=len(candidates) > 1)
        return [c for c in candidates if c.worker not in avoid and self._wiring.carries(c)]

    @property
    def _loads(self) -> Loads:
        return self._wiring.loads(self.plan)
