"""A job under one epoch, from its start to its end or to the first failure.

reserve ─► train on the numerics thread (captures leave while it runs) ─► StepEnd ─► deltas ─► fold ─► Ack
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cola_common.adapters import build
from cola_common.errors import ColaError, Reason
from cola_common.jobs import StepMetrics
from cola_common.messages import Calls, Delta, EncodedTensor, ShardPlan
from cola_common.schedules import learning_rate
from cola_common.tensor import encode
from cola_server.fleet import Exchange, WorkerBlamed
from cola_server.model import JobAdapter, JobBatch, Merging, evaluate, train
from cola_server.training import data
from cola_server.training.captures import CapturePacker
from cola_server.training.catalogue import capture_bytes
from cola_server.training.checkpoints import write_checkpoint
from cola_server.training.judgement import Judgement
from cola_server.training.prepared import Prepared
from cola_server.training.records import Records
from cola_server.training.services import Services
from cola_server.training.turn import Turn


@dataclass
class StepTotals:
    """What the batches of one step add up to."""

    started: float
    loss: float = 0.0
    batches: int = 0
    tokens: int = 0
    target_tokens: int = 0
    model_seconds: float = 0.0
    encode_seconds: float = 0.0
    sent_bytes: int = 0


@dataclass(frozen=True)
class Trained:
    """One batch that went through the model."""

    loss: float
    tokens: int
    target_tokens: int
    calls: Sequence[Calls]
    seconds: float
    encode_seconds: float
    sent: Mapping[str, int]


class Attempt:
    """See the module."""

    def __init__(
        self,
        prepared: Prepared,
        epoch: int,
        owners: Mapping[int, str],
        services: Services,
        records: Records,
        judgement: Judgement,
        turn: Turn,
    ) -> None:
        self._prepared = prepared
        self._spec = prepared.spec
        self._base = prepared.base
        self._epoch = epoch
        self._owners = owners
        self._services = services
        self._numerics = services.numerics
        self._records = records
        self._judgement = judgement
        self._turn = turn
        self._shapes = [build(s.family, s.d_in, s.d_out).shapes() for s in prepared.sites]
        self._trained_tokens = 0

    async def run(self) -> None:
        """Raises: `WorkerLost`, `WorkerBlamed`; `ColaError` where the job is at fault."""
        exchange = Exchange(
            job=self._prepared.job,
            epoch=self._epoch,
            owners=self._owners,
            outboxes=self._services.fleet.outboxes(set(self._owners.values())),
            shapes=self._shapes,
            max_grad_norm=self._prepared.plan.max_grad_norm,
        )
        loads = dict.fromkeys(exchange.workers, 0)
        for site in self._prepared.sites:
            loads[self._owners[site.index]] += self._prepared.parameter_bytes(site)
        self._services.fleet.open(exchange, loads)
        reason = "the job is over"
        try:
            adapter, parameters = await self._numerics.run(self._start)
            merging = Merging(self._base, adapter) if self._spec.fold == "merged" else None
            exchange.assign(
                step=0,
                plan=self._prepared.plan,
                values=self._spec.wire.values,
                max_rows=self._max_rows(),
                shards=[ShardPlan(s.index, s.name, s.family, s.d_in, s.d_out, s.group) for s in self._prepared.sites],
                parameters=parameters,
            )
            try:
                await self._merge(merging)
                await self._steps(exchange, adapter, merging)
            finally:
                await self._unmerge(merging)
        except BaseException as error:
            reason = f"the attempt ended: {str(error) or type(error).__name__}"
            raise
        finally:
            self._services.fleet.release(exchange, reason, keep=False)

    def _start(self) -> tuple[JobAdapter, list[Mapping[str, EncodedTensor]]]:
        p = self._prepared
        adapter = JobAdapter.initial(p.sites, self._spec.seed, self._base.device, p.start)
        return adapter, [{k: encode(v, "fp32") for k, v in shard.items()} for shard in adapter.state()]

    def _max_rows(self) -> int:
        h = self._spec.hyperparameters
        return h.batch_size * math.ceil(h.max_length / data.PAD_MULTIPLE) * data.PAD_MULTIPLE

    # --- steps ------------------------------------------------------------------------------------------------------

    async def _steps(self, exchange: Exchange, adapter: JobAdapter, merging: Merging | None) -> None:
        p = self._prepared
        interval = self._spec.hyperparameters.adaptation_interval
        began = time.time()
        for step in range(p.total_steps):
            if self._turn.paused:
                await self._pause(merging)
            first = step * interval
            last = min(first + interval, p.total_batches)
            metrics = await self._step(exchange, adapter, merging, step, range(first, last))
            self._trained_tokens += metrics.tokens
            end_of_epoch = last // p.batches.per_epoch > first // p.batches.per_epoch
            final = step + 1 == p.total_steps
            if (end_of_epoch or final) and p.validation is not None:
                valid_loss = await self._numerics.run(self._evaluate, adapter, merging)
                metrics = metrics.model_copy(update={"valid_loss": valid_loss})
            finish = time.time() + (time.time() - began) / (step + 1) * (p.total_steps - step - 1)
            await self._records.step(
                metrics, trained_tokens=self._trained_tokens, finish=finish, total_steps=p.total_steps
            )
            if end_of_epoch or final:
                await self._numerics.run(self._checkpoint, exchange.job, adapter, metrics)
                await self._records.tell(f"Checkpoint at step {metrics.step}.")
            await self._convict(step, exchange.workers)

    async def _step(
        self, exchange: Exchange, adapter: JobAdapter, merging: Merging | None, step: int, batches: range
    ) -> StepMetrics:
        totals = StepTotals(started=time.perf_counter())
        for number in batches:
            trained = await self._batch(exchange, adapter, merging, step, number)
            totals.loss += trained.loss
            totals.batches += 1
            totals.tokens += trained.tokens
            totals.target_tokens += trained.target_tokens
            totals.model_seconds += trained.seconds - trained.encode_seconds
            totals.encode_seconds += trained.encode_seconds
            totals.sent_bytes += sum(trained.sent.values())
            closes = totals.batches if number == batches[-1] else 0
            exchange.end_batch(batch=number, batches=closes, calls=trained.calls)
        handed_over = time.perf_counter()
        deltas = await exchange.deltas()
        waited = time.perf_counter() - handed_over
        worker_seconds = max(d.worker_seconds for d in deltas)
        digests, fold_seconds = await self._numerics.run(self._fold, adapter, merging, exchange.workers, deltas, step)
        grad_norm = exchange.grad_norm()
        exchange.acknowledge(digests)
        return StepMetrics(
            step=step + 1,
            epoch=self._epoch,
            train_loss=totals.loss / totals.batches,
            learning_rate=learning_rate(self._prepared.plan, step),
            grad_norm=grad_norm,
            tokens=totals.tokens,
            target_tokens=totals.target_tokens,
            created_at=time.time(),
            seconds=time.perf_counter() - totals.started,
            model_seconds=totals.model_seconds,
            encode_seconds=totals.encode_seconds,
            wire_seconds=max(0.0, waited - worker_seconds),
            worker_seconds=worker_seconds,
            fold_seconds=fold_seconds,
            sent_bytes=totals.sent_bytes,
            received_bytes=sum(t.nbytes for d in deltas for t in d.tensors),
        )

    async def _batch(
        self, exchange: Exchange, adapter: JobAdapter, merging: Merging | None, step: int, number: int
    ) -> Trained:
        p = self._prepared
        batch = [p.training.examples[i] for i in p.batches.indices(number)]
        await exchange.reserve(self._sizes(tokens=sum(len(e.ids) for e in batch), examples=len(batch)))
        return await self._numerics.run(self._train, exchange, adapter, merging, step, number, batch)

    def _sizes(self, *, tokens: int, examples: int) -> dict[str, int]:
        """What a batch's captures weigh, by worker."""
        return {
            worker: capture_bytes(
                [s for s in self._prepared.sites if self._owners[s.index] == worker],
                self._spec.wire.values,
                tokens=tokens,
                examples=examples,
            )
            for worker in sorted(set(self._owners.values()))
        }

    # --- on the numerics thread -------------------------------------------------------------------------------------

    def _train(
        self,
        exchange: Exchange,
        adapter: JobAdapter,
        merging: Merging | None,
        step: int,
        number: int,
        examples: Sequence[data.Example],
    ) -> Trained:
        started = time.perf_counter()
        packer = CapturePacker(
            job=exchange.job,
            epoch=self._epoch,
            batch=number,
            step=step,
            values=self._spec.wire.values,
            owners=self._owners,
            emit=exchange.emit,
        )
        batch = self._job_batch(examples, adapter, merging)
        (result,) = train(self._base, [replace(batch, sink=packer, job=exchange.job, step=step)])
        packer.finish()
        return Trained(
            loss=result.loss,
            tokens=result.tokens,
            target_tokens=result.target_tokens,
            calls=result.calls,
            seconds=time.perf_counter() - started,
            encode_seconds=packer.seconds,
            sent=packer.sent,
        )

    def _fold(
        self, adapter: JobAdapter, merging: Merging | None, workers: Sequence[str], deltas: Sequence[Delta], step: int
    ) -> tuple[dict[str, str], float]:
        """Returns: digests by worker, and seconds.

        Raises: `WorkerBlamed`; what was folded before it goes with the attempt.
        """
        started = time.perf_counter()
        digests = {}
        for worker, delta in zip(workers, deltas, strict=True):
            try:
                self._fold_one(adapter, delta)
                digests[worker] = adapter.digest([i for i, owner in self._owners.items() if owner == worker])
                if digests[worker] != delta.digest:
                    raise ColaError(Reason.DIGEST_MISMATCH, job=delta.job, step=step + 1)
            except ColaError as error:
                raise WorkerBlamed(worker, step, error) from None
        if merging is not None:
            merging.merge()
        return digests, time.perf_counter() - started

    @staticmethod
    def _fold_one(adapter: JobAdapter, delta: Delta) -> None:
        shards: dict[int, tuple[list[str], list[EncodedTensor]]] = {}
        for (index, name), tensor in zip(delta.names, delta.tensors, strict=True):
            names, tensors = shards.setdefault(index, ([], []))
            names.append(name)
            tensors.append(tensor)
        for index, (names, tensors) in shards.items():
            adapter.fold(index, names, tensors)

    def _evaluate(self, adapter: JobAdapter, merging: Merging | None) -> float:
        """The mean loss over the validation file's target tokens."""
        validation = self._prepared.validation
        assert validation is not None
        size = self._spec.hyperparameters.batch_size
        loss, targets = 0.0, 0
        for start in range(0, len(validation.examples), size):
            batch = self._job_batch(validation.examples[start : start + size], adapter, merging)
            ((batch_loss, batch_targets),) = evaluate(self._base, [batch])
            loss, targets = loss + batch_loss, targets + batch_targets
        return loss / max(1, targets)

    def _checkpoint(self, job: str, adapter: JobAdapter, metrics: StepMetrics) -> None:
        write_checkpoint(self._services, self._prepared, job, adapter, metrics)

    def _job_batch(self, examples: Sequence[data.Example], adapter: JobAdapter, merging: Merging | None) -> JobBatch:
        ids, mask, labels = data.collate(examples, self._prepared.pad_id, self._prepared.max_positions)
        return JobBatch(input_ids=ids, attention_mask=mask, labels=labels, adapter=adapter, merged=merging is not None)

    # --- merging and pausing ----------------------------------------------------------------------------------------

    async def _pause(self, merging: Merging | None) -> None:
        await self._unmerge(merging)
        await self._records.tell(f"Paused; {self._trained_tokens} tokens so far.")
        await self._turn.again()
        while not await self._records.running():
            await self._turn.again()
        await self._merge(merging)

    async def _merge(self, merging: Merging | None) -> None:
        if merging is not None:
            await self._numerics.run(merging.merge)

    async def _unmerge(self, merging: Merging | None) -> None:
        if merging is not None:
            await self._numerics.run(merging.restore)

    async def _convict(self, step: int, workers: list[str]) -> None:
        verdict = self._judgement.passed(step, workers)
        if verdict is not None:
            self._services.fleet.quarantine(verdict.worker, verdict.problem)
            await self._records.tell(f"Worker {verdict.worker} is quarantined: {verdict.problem}", level="warn")
