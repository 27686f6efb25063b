"""Which workers may own a job's shards: placement with what the job has learnt of its workers."""

import asyncio
from collections.abc import Collection, Mapping

from cola_server.fleet import Candidate, ShardLoad, effort, place
from cola_server.training.judgement import Judgement
from cola_server.training.prepared import Prepared
from cola_server.training.services import Services
from cola_server.training.snapshots import Snapshot

WORTH_A_MOVE = 3.0  # times less effort: a move costs a snapshot, and what workers measure of themselves is noisy


class Owners:
    """For one job. Belongs to the event loop."""

    def __init__(self, prepared: Prepared, services: Services, judgement: Judgement) -> None:
        self._prepared = prepared
        self._fleet = services.fleet
        self._parts = services.split
        self._judgement = judgement
        self._moves = services.moves
        self._destination: Mapping[int, str] | None = None
        """Where the job is on its way to, if it is."""
        self._slow: set[str] = set()
        self._shards = [ShardLoad(s.index, s.group, prepared.parameter_bytes(s)) for s in prepared.sites]

    def avoid(self, workers: Collection[str]) -> None:
        """These were too slow: others go first from now on."""
        self._slow.update(workers)

    def find(self, start: Snapshot | None) -> Mapping[int, str] | None:
        """Shard number -> worker for a job that goes on from `start`; None where the workers cannot carry it now."""
        candidates = self._candidates(start)
        if self._destination is not None and set(self._destination.values()) <= {c.worker for c in candidates}:
            return self._destination  # whose disks know nothing of the job, or it would have been there before
        fast = [c for c in candidates if c.worker not in self._slow]
        return place(self._shards, fast, self._parts) or place(self._shards, candidates, self._parts)

    def elsewhere(self, workers: Collection[str]) -> bool:
        """Whether the job could go on without these."""
        out = {*workers, *self._slow}
        return place(self._shards, [c for c in self._candidates(None) if c.worker not in out], self._parts) is not None

    def better(self, owners: Mapping[int, str]) -> bool:
        """Whether the workers that attend now could carry the job with far less effort than `owners`. If so no other
        job may move until this one has `settled`: all would go to the same place.
        """
        if not self._moves.locked():
            self._destination = self._far_better(owners)
            if self._destination is not None:
                self._moves.acquire(blocking=False)
        return self._destination is not None

    def settled(self) -> None:
        """The job has its new owners, or needs none."""
        if self._destination is not None:
            self._destination = None
            self._moves.release()

    def _far_better(self, owners: Mapping[int, str]) -> Mapping[int, str] | None:
        candidates = [c for c in self._candidates(None) if c.worker not in self._slow or c.worker in owners.values()]
        found = place(self._shards, candidates, self._parts)
        if found is None or not set(owners.values()) <= {c.worker for c in candidates}:
            return None
        gain = effort(self._shards, candidates, owners) / effort(self._shards, candidates, found)
        return found if gain >= WORTH_A_MOVE else None

    def owned(self, owners: Mapping[int, str], start: Snapshot) -> set[int]:
        """The shards whose state their owners have on their disks."""
        have = {c.worker: c.owned for c in self._candidates(start)}
        return {index for index, worker in owners.items() if index in have.get(worker, ())}

    def change(self) -> asyncio.Future[None]:
        """As `Fleet.change`."""
        return self._fleet.change()

    def _candidates(self, start: Snapshot | None) -> list[Candidate]:
        state = {s.name: (s.index, start.digests[s.index]) for s in self._prepared.sites} if start else {}
        candidates = self._fleet.candidates(
            job=self._prepared.job,
            values=self._prepared.spec.wire.values,
            step=start.step if start else 0,
            state=state,
        )
        avoid = self._judgement.avoid(others=len(candidates) > 1)
        return [c for c in candidates if c.worker not in avoid]
