"""One job's loop: batches go through the model, captures to the workers, deltas into the fold.

    data ─► reserve ─► train on the numerics thread (captures leave while it runs) ─► StepEnd ─► deltas ─► fold ─► Ack

Whatever fails, the job goes back to its start under a new epoch: the start is its only snapshot.
"""

import asyncio
from collections.abc import Mapping

from cola_common.errors import ColaError, Reason
from cola_server.fleet import ShardLoad, WorkerBlamed, WorkerLost, place
from cola_server.training.attempt import Attempt
from cola_server.training.judgement import Judgement
from cola_server.training.prepared import Prepared
from cola_server.training.records import Records
from cola_server.training.services import Services
from cola_server.training.turn import Turn


class JobRun:
    """A job from its first batch to its last checkpoint; see the module."""

    def __init__(self, job: str, services: Services, turn: Turn, preparing: asyncio.Lock) -> None:
        self._services = services
        self._turn = turn
        self._preparing = preparing
        self._records = Records(job, services.store)
        self._judgement = Judgement()

    async def run(self) -> None:
        """Runs the job to its end, which is in the store when this returns. Cancelled, it leaves the status to the
        canceller.
        """
        try:
            async with self._preparing:
                prepared = await self._prepare()
            async with self._turn:
                while not await self._records.running():
                    await self._turn.again()
                await self._attempts(prepared)
                await self._records.finish(None)
        except ColaError as error:
            await self._records.finish(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            await self._records.finish(ColaError(Reason.INTERNAL, problem=problem))
            raise

    async def _prepare(self) -> Prepared:
        job = await self._records.job()
        prepared = await asyncio.to_thread(Prepared, job, self._services.catalogue, self._services.artefacts)
        await self._records.validated(len(prepared.training.examples), prepared.total_steps)
        if prepared.without_target:
            length = prepared.spec.hyperparameters.max_length
            text = f"{prepared.without_target} examples have no target left within max_length={length}."
            await self._records.tell(text, level="warn")
        return prepared

    async def _attempts(self, prepared: Prepared) -> None:
        while True:
            epoch = await self._records.begin_epoch()
            owners = await self._place(prepared)
            attempt = Attempt(prepared, epoch, owners, self._services, self._records, self._judgement, self._turn)
            try:
                await attempt.run()
                return
            except WorkerLost as lost:
                text = f"Worker {lost.worker} is lost ({lost.problem}); the job starts again."
                await self._records.tell(text, level="warn")
            except WorkerBlamed as fault:
                text = f"Worker {fault.worker}, step {fault.step + 1}: {fault.error}; the job starts again."
                await self._records.tell(text, level="warn")
                self._judgement.blame(fault)

    async def _place(self, prepared: Prepared) -> Mapping[int, str]:
        fleet = self._services.fleet
        shards = [ShardLoad(s.index, s.group, prepared.parameter_bytes(s)) for s in prepared.sites]
        waiting = False
        while True:
            change = fleet.change()
            candidates = fleet.candidates(values=prepared.spec.wire.values)
            avoid = self._judgement.avoid(others=len(candidates) > 1)
            owners = place(shards, [c for c in candidates if c.worker not in avoid], self._services.split)
            if owners is not None:
                if waiting:
                    waiting = False
                    await self._records.waiting(False)
                    continue  # that took a while: look again at who is there
                return owners
            if not waiting:
                waiting = True
                await self._records.waiting(True)
            await asyncio.wait([change])
