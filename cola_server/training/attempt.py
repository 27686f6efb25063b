"""A job under one epoch: from a snapshot, or its start, to its end, to a planned move, or to the first failure.

reserve ─► train on the numerics thread (captures leave while it runs) ─► StepEnd ─► deltas ─► fold ─► Ack ─► snapshot?

The members of a collaboration meet three times a step: between two steps, where all do the same; before the first of
them folds, for until then all see the adapters as they were; and when all have folded.
"""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cola_common import failpoints
from cola_common.adapters import build
from cola_common.jobs import StepMetrics, WirePlan
from cola_common.messages import Delta, EncodedTensor, ShardPlan
from cola_common.schedules import learning_rate
from cola_common.tensor import encode
from cola_server.fleet import Exchange, WorkerSlow
from cola_server.model import JobAdapter, JobBatch, Mean, Merging, evaluate
from cola_server.training import data
from cola_server.training.captures import CapturePacker
from cola_server.training.checkpoints import write_checkpoint
from cola_server.training.cohorts import Pass, Request
from cola_server.training.course import Course, End
from cola_server.training.examples import Example
from cola_server.training.folding import delta_form, fold
from cola_server.training.group import Group, Session
from cola_server.training.keeper import Keeper
from cola_server.training.patience import Patience
from cola_server.training.snapshots import Snapshot
from cola_server.training.tally import Tally
from cola_server.training.traffic import capture_bytes, rows_of


@dataclass(frozen=True)
class Vote:
    """What a job wants between two steps."""

    end: End | None
    """To stop here."""
    due: bool
    """A snapshot."""
    busy: bool
    """The last snapshot is not yet written."""


class Attempt:
    """See the module. `owners` says which worker has which shard, `start` where the job goes on from; `session` is who
    takes the attempt with it, of the job's `group`, if it has one.
    """

    def __init__(
        self,
        course: Course,
        epoch: int,
        owners: Mapping[int, str],
        start: Snapshot | None,
        session: Session,
        group: Group | None,
    ) -> None:
        self._course = course
        self._session = session
        self._group = group
        self._mean: Mean | None = None
        self._prepared = course.prepared
        self._spec = course.prepared.spec
        self._base = course.prepared.base
        self._services = course.services
        self._numerics = course.services.numerics
        self._records = course.records
        self._epoch = epoch
        self._owners = owners
        self._wires = course.owners.wires(owners)
        self._start = start
        self._shapes = [build(s.family, s.d_in, s.d_out).shapes() for s in self._prepared.sites]
        self.folded = 0
        """Steps so far."""
        self._patience = Patience()
        self._trained_tokens = start.trained_tokens if start else 0
        self._fleet_change = self._services.fleet.change()

    async def run(self) -> End:
        """Raises: `WorkerLost`, `WorkerBlamed`, `WorkerSlow`; `Parted`; `ColaError` where the job is at fault, the disk
        full.
        """
        fleet, sites = self._services.fleet, self._prepared.sites
        exchange = Exchange(
            job=self._prepared.job,
            epoch=self._epoch,
            owners=self._owners,
            outboxes=fleet.outboxes(set(self._owners.values())),
            wires=self._wires,
            sites=[s.name for s in sites],
            shapes=self._shapes,
            deltas=[
                {name: delta_form(shape, self._wire(index).deltas) for name, shape in shapes.items()}
                for index, shapes in enumerate(self._shapes)
            ],
            max_grad_norm=self._prepared.plan.max_grad_norm,
        )
        fleet.open(exchange, self._course.owners.load(self._owners))
        self._course.owners.settled()
        reason, keep, merging = "the job is over", False, None
        keeper = Keeper(exchange, self._course.snapshots)
        try:
            adapter = await self._numerics.run(self._adapter)
            merging = Merging(self._base, adapter) if self._spec.fold == "merged" else None
            await self._assign(exchange, adapter)
            failpoints.hit("assign.sent")
            self._mean = await self._mean_with(adapter)
            with self._numerics.idle.job():
                end = await self._steps(exchange, keeper, adapter, merging)
            if end != End.FINISHED:
                reason, keep = f"the job is {end.value}", True
            return end
        except asyncio.CancelledError:
            reason = "the job is cancelled"
            raise
        except BaseException as error:
            reason, keep = f"the attempt ended: {str(error) or type(error).__name__}", True
            raise
        finally:
            fleet.release(exchange, reason, keep=keep)
            await keeper.close()
            await self._numerics.run(self._base.seat.leave, merging)

    def _adapter(self) -> JobAdapter:
        p, start = self._prepared, self._start
        if start is None:
            return JobAdapter.initial(p.sites, self._spec.seed, self._base.device, p.start())
        return JobAdapter(p.sites, start.parameters, self._base.device, version=start.step)

    async def _mean_with(self, adapter: JobAdapter) -> Mean | None:
        """What the job's group adds to the base in this attempt; None for a job without one."""
        adapters = await self._session.meet(self._prepared.job, adapter)
        if self._group is None:
            return None
        adapters = {**self._group.ended, **adapters}
        members = await self._records.members()
        return Mean(self._group.id, tuple(adapters[member.id] for member in members))

    async def _assign(self, exchange: Exchange, adapter: JobAdapter) -> None:
        start = self._start
        exchange.assign(
            step=start.step if start else 0,
            plan=self._prepared.plan,
            max_rows=self._max_rows(),
            shards=[
                ShardPlan(s.index, s.name, s.family, s.d_in, s.d_out, s.group, rows_of(s, self._wire(s.index).rows))
                for s in self._prepared.sites
            ],
            parameters=[_encoded(shard) for shard in await self._numerics.run(adapter.state)],
            optimizer=[_encoded(shard) for shard in start.optimizer] if start else (),
            digests=start.digests if start else (),
            owned=self._course.owners.owned(self._owners, start) if start else (),
        )
        if start is not None:
            start.let_go()

    def _wire(self, shard: int) -> WirePlan:
        return self._wires[self._owners[shard]]

    def _max_rows(self) -> int:
        h = self._spec.hyperparameters
        return h.batch_size * math.ceil(h.max_length / data.PAD_MULTIPLE) * data.PAD_MULTIPLE

    # --- steps ------------------------------------------------------------------------------------------------------

    async def _steps(self, exchange: Exchange, keeper: Keeper, adapter: JobAdapter, merging: Merging | None) -> End:
        p, cadence = self._prepared, self._course.cadence
        interval = self._spec.hyperparameters.adaptation_interval
        start = self._start.step if self._start else 0
        began = time.time()
        cadence.taken()
        for step in range(start, p.total_steps):
            if (end := await self._between(exchange, keeper, adapter, step)) is not None:
                return end
            first = step * interval
            last = min(first + interval, p.total_batches)
            metrics = await self._step(exchange, adapter, merging, step, range(first, last))
            cadence.stepped(_own_seconds(metrics), metrics.sent_bytes + metrics.received_bytes)
            self._trained_tokens += metrics.tokens
            end_of_epoch = last // p.batches.per_epoch > first // p.batches.per_epoch
            final = step + 1 == p.total_steps
            if (end_of_epoch or final) and p.validation is not None:
                valid_loss = await self._evaluate(adapter, merging)
                metrics = metrics.model_copy(update={"valid_loss": valid_loss})
            finish = time.time() + (time.time() - began) / (step + 1 - start) * (p.total_steps - step - 1)
            await self._records.step(
                metrics, trained_tokens=self._trained_tokens, finish=finish, total_steps=p.total_steps
            )
            failpoints.hit("step.after_commit")
            if end_of_epoch or final:
                await self._numerics.run(self._checkpoint, exchange.job, adapter, metrics)
                await self._records.tell(f"Checkpoint at step {metrics.step}.")
            await self._convict(step, exchange.workers)
        return await self._last(exchange, keeper, adapter)

    async def _between(self, exchange: Exchange, keeper: Keeper, adapter: JobAdapter, step: int) -> End | None:
        """What all members do between two steps. Returns: how the attempt ends here, if it does."""
        session, cadence, job = self._session, self._course.cadence, self._prepared.job
        keeper.look()
        last = step == self._prepared.total_steps
        wanted = End.FINISHED if last else self._departure(exchange, step)
        votes = await session.meet(job, Vote(wanted, cadence.due, keeper.busy))
        ends = {member: vote.end for member, vote in votes.items() if vote.end is not None}
        if ends:
            if step > (self._start.step if self._start else 0):
                await keeper.wait()
                await self._snapshot(keeper, adapter)
                await keeper.wait()
            for end in (End.INTERRUPTED, End.MOVING):
                if end in ends.values():
                    return end
            adapters = await session.meet(job, adapter)  # all have their snapshot: nobody goes back behind this step
            if self._group is not None:
                self._group.end({member: adapters[member] for member in ends})
            session.ended(ends)
            return End.FINISHED if last else None
        if any(vote.due for vote in votes.values()) and not any(vote.busy for vote in votes.values()):
            if cadence.due and (excess := cadence.excess()) is not None:
                await self._records.tell(excess, level="warn")
            await self._snapshot(keeper, adapter)
        return None

    async def _last(self, exchange: Exchange, keeper: Keeper, adapter: JobAdapter) -> End:
        """The last step is behind; the others of its group go on with the adapter as it is."""
        if self._group is None:
            return End.FINISHED
        end = await self._between(exchange, keeper, adapter, self._prepared.total_steps)
        assert end is not None, "its own vote was to end here"
        return end

    def _departure(self, exchange: Exchange, step: int) -> End | None:
        """Whether the job should stop here, before `step`."""
        if self._course.turn.interrupted:
            return End.INTERRUPTED
        if exchange.leaving:
            return End.MOVING
        waited = self._patience.typical()
        if self._fleet_change.done() and waited is not None:
            self._fleet_change = self._services.fleet.change()
            stopped = len(self._mean.adapters) if self._mean else 1  # a move costs all of a group
            if self._course.owners.better(self._owners, step, waited / stopped):
                return End.MOVING
            if self._course.owners.replanned(self._owners, step):
                return End.MOVING
        return None

    async def _snapshot(self, keeper: Keeper, adapter: JobAdapter) -> None:
        """Begins a snapshot of the job as it is between two steps."""
        parameters = await self._numerics.run(adapter.state)
        self._course.cadence.taken()
        keeper.begin(parameters, self._trained_tokens)

    async def _step(
        self, exchange: Exchange, adapter: JobAdapter, merging: Merging | None, step: int, batches: range
    ) -> StepMetrics:
        tally = Tally(self._prepared.sites)
        for number in batches:
            passed, packer = await self._batch(exchange, adapter, merging, step, number)
            calls = tally.add(passed, packer)
            exchange.end_batch(batch=number, batches=tally.batches if number == batches[-1] else 0, calls=calls)
            failpoints.hit("batch.sent")
        handed_over = time.perf_counter()
        deltas = dict(zip(exchange.workers, await self._deltas(exchange), strict=True))
        waited = time.perf_counter() - handed_over
        self._patience.waited(waited)
        await self._session.meet(self._prepared.job, None)  # all batches of the step are through the model
        failpoints.hit("step.before_fold")
        seconds = {worker: delta.worker_seconds for worker, delta in deltas.items()}
        digests, fold_seconds = await self._numerics.run(self._fold, adapter, merging, deltas, step)
        failpoints.hit("step.after_fold")
        grad_norm = exchange.grad_norm()
        exchange.acknowledge(digests)
        self._course.owners.stepped(self._owners, tally.sent_calls, seconds)
        self.folded += 1
        failpoints.hit("step.acknowledged")
        await self._session.meet(self._prepared.job, None)  # all adapters are at the next step
        self._services.observed.waited(waited)
        return tally.metrics(
            list(deltas.values()),
            step=step,
            epoch=self._epoch,
            learning_rate=learning_rate(self._prepared.plan, step),
            grad_norm=grad_norm,
            waited=waited,
            fold_seconds=fold_seconds,
        )

    async def _deltas(self, exchange: Exchange) -> Sequence[Delta]:
        """The step's deltas. Raises: as `Exchange.deltas`; `WorkerSlow` only where the job could go on elsewhere."""
        try:
            return await exchange.deltas(within=self._patience.limit())
        except WorkerSlow as slow:
            if self._course.owners.elsewhere(slow.workers):
                self._course.owners.avoid(self._owners, slow.workers, slow.seconds)
                raise
            await self._records.tell(f"Waiting: {slow}, and there is no other worker.", level="warn")
            return await exchange.deltas()

    async def _batch(
        self, exchange: Exchange, adapter: JobAdapter, merging: Merging | None, step: int, number: int
    ) -> tuple[Pass, CapturePacker]:
        """Puts a batch through the model; its captures leave meanwhile."""
        p = self._prepared
        examples = await asyncio.to_thread(p.batch, number)
        await exchange.reserve(self._sizes(tokens=sum(len(e.ids) for e in examples), examples=len(examples)))
        packer = CapturePacker(
            job=exchange.job,
            epoch=self._epoch,
            batch=number,
            step=step,
            seed=self._spec.seed,
            sites=p.sites,
            wires=self._wires,
            owners=self._owners,
            emit=exchange.emit,
        )
        length = data.padded_length(examples, p.max_positions)
        passed = await self._services.cohorts.train(
            Request(
                job=exchange.job,
                tenant=p.tenant,
                base=self._base,
                length=length,
                tokens=len(examples) * length,
                kind=f"{self._group.id if self._group else self._spec.adapter.type} {len(examples)}",
                merging=merging,
                batch=lambda: replace(
                    self._job_batch(examples, adapter, merging), sink=packer, job=exchange.job, step=step
                ),
            )
        )
        self._services.observed.passed(self._base.name, len(examples) * length, passed.seconds)
        return passed, packer

    def _sizes(self, *, tokens: int, examples: int) -> dict[str, int]:
        """What a batch's captures weigh at most, by worker."""
        return {
            worker: capture_bytes(
                [s for s in self._prepared.sites if self._owners[s.index] == worker],
                self._wires[worker],
                tokens=tokens,
                examples=examples,
                bound=True,
            )
            for worker in sorted(set(self._owners.values()))
        }

    # --- on the numerics thread -------------------------------------------------------------------------------------

    def _fold(
        self, adapter: JobAdapter, merging: Merging | None, deltas: Mapping[str, Delta], step: int
    ) -> tuple[dict[str, str], float]:
        """Returns: digests by worker, and seconds. Raises: `WorkerBlamed`."""
        started = time.perf_counter()
        digests = fold(adapter, self._owners, deltas, step)
        if merging is not None:
            self._base.seat.refresh(merging)
        return digests, time.perf_counter() - started

    async def _evaluate(self, adapter: JobAdapter, merging: Merging | None) -> float:
        """The mean loss over the validation file's target tokens; other jobs' passes go on between its batches."""
        p, size = self._prepared, self._spec.hyperparameters.batch_size
        assert p.validation is not None
        loss, targets = 0.0, 0
        for start in range(0, len(p.validation.examples), size):
            place = slice(start, start + size)
            examples = await asyncio.to_thread(p.validation.examples.__getitem__, place)
            batch_loss, batch_targets = await self._numerics.run(self._evaluate_batch, examples, adapter, merging)
            loss, targets = loss + batch_loss, targets + batch_targets
        return loss / max(1, targets)

    def _evaluate_batch(
        self, examples: Sequence[Example], adapter: JobAdapter, merging: Merging | None
    ) -> tuple[float, int]:
        self._base.seat.take(merging)
        (result,) = evaluate(self._base, [self._job_batch(examples, adapter, merging)])
        return result

    def _checkpoint(self, job: str, adapter: JobAdapter, metrics: StepMetrics) -> None:
        write_checkpoint(self._services, self._prepared, job, adapter, metrics)

    def _job_batch(self, examples: Sequence[Example], adapter: JobAdapter, merging: Merging | None) -> JobBatch:
        ids, mask, labels = data.collate(examples, self._prepared.pad_id, self._prepared.max_positions)
        return JobBatch(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            adapter=adapter,
            merged=merging is not None,
            mean=self._mean,
        )

    async def _convict(self, step: int, workers: list[str]) -> None:
        verdict = self._course.judgement.passed(step, workers)
        if verdict is not None:
            self._services.fleet.quarantine(verdict.worker, verdict.problem)
            await self._records.tell(f"Worker {verdict.worker} is quarantined: {verdict.problem}", level="warn")


def _own_seconds(step: StepMetrics) -> float:
    """What a step took but for waiting for other jobs: to repeat it is so much work."""
    on_server = step.model_seconds + step.reduce_seconds + step.encode_seconds + step.fold_seconds
    return on_server + step.wire_seconds + step.worker_seconds


def _encoded(shard: Mapping[str, torch.Tensor]) -> dict[str, EncodedTensor]:
    return {name: encode(values, "fp32") for name, values in shard.items()}
