"""One job under one epoch, as its workers see it: captures go out, deltas come back and are matched to their step.

All methods but `emit` belong to the event loop. A worker that is lost, refuses, or sends what was not assigned ends
the exchange: every waiter gets the exception, and the job goes on under a new epoch with an exchange of its own.
"""

import asyncio
import math
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cola_common.errors import ColaError, Reason
from cola_common.jobs import WirePlan
from cola_common.messages import (
    Ack,
    Assign,
    Calls,
    Capture,
    Delta,
    EncodedTensor,
    Norm,
    NormTotal,
    OptimizerPlan,
    Refusal,
    Revoke,
    ShardPlan,
    Snapshot,
    SnapshotRequest,
    StepEnd,
    ToWorker,
)
from cola_server.fleet.outbox import Outbox, OutboxClosed, capture_bytes

T = TypeVar("T")

Shapes = Mapping[str, tuple[int, ...]]  # parameter name -> shape, in the order in which deltas name them


@dataclass(frozen=True)
class DeltaForm:
    """How the delta of a parameter comes."""

    codec: str
    shape: tuple[int, ...]
    nbytes: int


class WorkerLost(Exception):
    """A worker of this exchange is gone."""

    def __init__(self, worker: str, problem: str) -> None:
        super().__init__(f"worker {worker}: {problem}")
        self.worker = worker
        self.problem = problem


class WorkerSlow(Exception):
    """A worker took far longer for a step than this job's steps have taken."""

    def __init__(self, workers: Sequence[str], seconds: float) -> None:
        super().__init__(f"no delta of {', '.join(workers)} after {seconds:.0f} s")
        self.workers = workers
        self.seconds = seconds


class WorkerBlamed(Exception):
    """A worker's answer to a step was refused, or it refused the step. The next worker tells whose fault it is."""

    def __init__(self, worker: str, step: int, error: ColaError) -> None:
        super().__init__(f"worker {worker}, step {step}: {error}")
        self.worker = worker
        self.step = step
        self.error = error


class Exchange:
    """See the module. `owners` maps shard numbers to workers, `outboxes` workers to where their messages wait, `wires`
    them to what travels; `sites`, `shapes` and `deltas` are the shards' names, parameters and forms of deltas.
    """

    def __init__(
        self,
        *,
        job: str,
        epoch: int,
        owners: Mapping[int, str],
        outboxes: Mapping[str, Outbox],
        wires: Mapping[str, WirePlan],
        sites: Sequence[str],
        shapes: Sequence[Shapes],
        deltas: Sequence[Mapping[str, DeltaForm]],
        max_grad_norm: float,
    ) -> None:
        self.job = job
        self.epoch = epoch
        self.owners = owners
        self.sites = sites
        self.workers = sorted(set(owners.values()))
        self.leaving = False
        """Whether the job should go elsewhere at its next step: a worker of it drains."""
        self._outboxes = outboxes
        self._wires = wires
        self._shapes = shapes
        self._forms = deltas
        self._clipped = max_grad_norm > 0
        self._loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        self._owed: dict[str, int] = dict.fromkeys(self.workers, 0)  # reserved and not yet emitted
        self._step = 0
        self._called: set[int] = set()
        self._norms: dict[str, dict[int, float]] = {}
        self._total_sent = False
        self._deltas: dict[str, Delta] = {}
        self._complete = asyncio.Event()
        self._last_acks: dict[str, Ack] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._snapshot_step: int | None = None  # of the snapshot that is asked for and not yet complete
        self._last_snapshot_step = -1
        self._snapshot_complete = asyncio.Event()

    # --- going out --------------------------------------------------------------------------------------------------

    def assign(
        self,
        *,
        step: int,
        plan: OptimizerPlan,
        max_rows: int,
        shards: Sequence[ShardPlan],
        parameters: Sequence[Mapping[str, EncodedTensor]],
        optimizer: Sequence[Mapping[str, EncodedTensor]] = (),
        digests: Sequence[str] = (),
        owned: Collection[int] = (),
    ) -> None:
        """Hands every worker its shards, with their parameters at version `step`.

        Where that is a snapshot's, `optimizer` and `digests` are its own; the state of shards that their workers have
        (`owned`) is not sent.
        """
        self._step = step
        for worker in self.workers:
            mine = [s for s in shards if self.owners[s.index] == worker]
            tensors = {(s.index, name): tensor for s in mine for name, tensor in parameters[s.index].items()}
            if optimizer:
                sent = [s.index for s in mine if s.index not in owned]
                tensors |= {(i, entry): tensor for i in sent for entry, tensor in optimizer[i].items()}
            self._put(
                worker,
                Assign(
                    job=self.job,
                    epoch=self.epoch,
                    step=step,
                    plan=plan,
                    values=self._wires[worker].values,
                    deltas=self._wires[worker].deltas,
                    max_rows=max_rows,
                    shards=tuple(mine),
                    digests=tuple((s.index, digests[s.index]) for s in mine) if digests else (),
                    names=tuple(tensors),
                    tensors=tuple(tensors.values()),
                ),
            )

    async def reserve(self, sizes: Mapping[str, int]) -> None:
        """Waits until every worker's buffer has room for its part of the next batch.

        Raises: `WorkerLost`, `WorkerBlamed`.
        """
        for worker, nbytes in sizes.items():
            try:
                await self._or_failure(self._outboxes[worker].reserve(nbytes))
            except OutboxClosed:
                raise WorkerLost(worker, "its stream ended") from None
            self._owed[worker] += nbytes

    def emit(self, worker: str, capture: Capture) -> None:
        """Queues a capture; called from the numerics thread while the backward pass runs."""
        self._loop.call_soon_threadsafe(self._emit, worker, capture)

    def end_batch(self, *, batch: int, batches: int, calls: Sequence[Calls]) -> None:
        """All captures of `batch` are queued; with `batches` > 0 it closes the step."""
        self._settle()
        self._called.update(c.index for c in calls)
        for worker in self.workers:
            mine = tuple(c for c in calls if self.owners[c.index] == worker)
            self._put(
                worker,
                StepEnd(job=self.job, epoch=self.epoch, batch=batch, step=self._step, batches=batches, calls=mine),
            )

    async def deltas(self, within: float | None = None) -> Sequence[Delta]:
        """The deltas of the step that the last `end_batch` closed, one a worker.

        Raises: `WorkerLost`, `WorkerBlamed`; `WorkerSlow` after `within` seconds, after which it may be called again.
        """
        try:
            async with asyncio.timeout(within):
                await self._or_failure(self._complete.wait())
        except TimeoutError:
            assert within is not None
            raise WorkerSlow([w for w in self.workers if w not in self._deltas], within) from None
        return [self._deltas[worker] for worker in self.workers]

    def acknowledge(self, digests: Mapping[str, str]) -> None:
        """The step is folded; `digests` are the server's, by worker. Opens the next step."""
        for worker in self.workers:
            self._last_acks[worker] = Ack(job=self.job, epoch=self.epoch, step=self._step, digest=digests[worker])
            self._put(worker, self._last_acks[worker])
        self._step += 1
        self._called = set()
        self._norms = {}
        self._total_sent = False
        self._deltas = {}
        self._complete.clear()

    def request_snapshot(self) -> int:
        """Asks every worker for its half of a snapshot, between two steps. Returns: the step that it is of."""
        assert self._snapshot_step is None, "one snapshot at a time"
        self._snapshot_step = self._step
        self._snapshots = {}
        self._snapshot_complete.clear()
        for worker in self.workers:
            self._put(worker, SnapshotRequest(job=self.job, epoch=self.epoch, step=self._step))
        return self._step

    async def snapshots(self) -> Sequence[Snapshot]:
        """What was asked for, one a worker. Raises: `WorkerLost`, `WorkerBlamed`."""
        await self._or_failure(self._snapshot_complete.wait())
        snapshots, self._snapshots = self._snapshots, {}
        return [snapshots[worker] for worker in self.workers]

    def close(self, reason: str, *, keep: bool) -> None:
        """Takes the job from its workers; who is gone already is not told."""
        self._closed = True
        self._settle()
        for worker in self.workers:
            self._outboxes[worker].drop_captures(self.job, self.epoch)
            self._put(worker, Revoke(job=self.job, epoch=self.epoch, reason=reason, keep=keep))
        if not self._failure.done():
            self._failure.cancel()

    # --- coming in --------------------------------------------------------------------------------------------------

    def accept(self, worker: str, message: Norm | Delta | Snapshot | Refusal) -> ToWorker | None:
        """A worker's message about this job and epoch. Returns: what to answer, if anything is to be."""
        try:
            if isinstance(message, Refusal):
                if message.reason == Reason.STATE_MISSING:  # it lost what it had offered: nobody's fault
                    self._fail(WorkerLost(worker, message.message))
                elif message.reason != Reason.STALE_EPOCH:
                    raise _refused(message)
                return None
            if isinstance(message, Snapshot):
                self._accept_snapshot(worker, message)
                return None
            if message.step < self._step:
                return self._repeat(worker, message)
            if message.step > self._step:
                raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"step {message.step} before step {self._step}")
            if isinstance(message, Norm):
                self._accept_norm(worker, message)
            else:
                self._accept_delta(worker, message)
        except ColaError as error:
            self._fail(WorkerBlamed(worker, self._step, error))
            return Refusal(self.job, self.epoch, message.step, error.reason, error.message)
        return None

    def refuse(self, worker: str, error: ColaError) -> None:
        """A worker's answer could not even be read."""
        self._fail(WorkerBlamed(worker, self._step, error))

    def lost(self, worker: str, problem: str) -> None:
        """A worker of this exchange is gone."""
        self._fail(WorkerLost(worker, problem))

    def grad_norm(self) -> float:
        """The global gradient norm of the complete step: fp64 squares summed in site order, whoever owns the sites."""
        squares = {index: square for delta in self._deltas.values() for index, square in delta.squares}
        return _norm(squares)

    def _repeat(self, worker: str, message: Norm | Delta) -> ToWorker | None:
        last = self._last_acks.get(worker)
        return last if isinstance(message, Delta) and last is not None and last.step == message.step else None

    def _accept_norm(self, worker: str, message: Norm) -> None:
        self._check_squares(worker, message.squares)
        self._norms[worker] = dict(message.squares)
        if self._clipped and not self._total_sent and len(self._norms) == len(self.workers):
            total = _norm({i: square for squares in self._norms.values() for i, square in squares.items()})
            self._total_sent = True
            for owner in self.workers:
                self._put(owner, NormTotal(job=self.job, epoch=self.epoch, step=self._step, total=total))

    def _accept_delta(self, worker: str, message: Delta) -> None:
        self._check_squares(worker, message.squares)
        expected = [(i, name) for i in self._called_of(worker) for name in self._shapes[i]]
        if list(message.names) != expected:
            foreign = next((i for i, _ in message.names if self.owners.get(i) != worker), None)
            if foreign is not None:
                raise ColaError(Reason.NOT_OWNER, worker=worker, site=foreign, job=self.job)
            raise ColaError(
                Reason.DELTA_MISMATCH, step=message.step, problem="other parameters than those of its sites"
            )
        for (index, name), tensor in zip(message.names, message.tensors, strict=True):
            form = self._forms[index][name]
            if DeltaForm(tensor.codec, tensor.shape, tensor.nbytes) != form:
                problem = f"shard {index}, {name}: {tensor.codec} {tensor.shape} instead of {form.codec} {form.shape}"
                raise ColaError(Reason.DELTA_MISMATCH, step=message.step, problem=problem)
        self._deltas.setdefault(worker, message)
        if len(self._deltas) == len(self.workers):
            self._complete.set()

    def _accept_snapshot(self, worker: str, message: Snapshot) -> None:
        if message.step == self._last_snapshot_step:
            return  # said twice
        if message.step != self._snapshot_step:
            raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"a snapshot of step {message.step}, unasked")
        mine = sorted(i for i, owner in self.owners.items() if owner == worker)
        if [index for index, _ in message.digests] != mine or len(set(message.names)) != len(message.names):
            raise ColaError(Reason.PROTOCOL_VIOLATION, problem="a snapshot of other shards than its own")
        for (index, entry), tensor in zip(message.names, message.tensors, strict=True):
            parameter, _, of_optimizer = entry.rpartition(".")
            whole = self._shapes[index].get(parameter) if index in mine and of_optimizer else None
            allowed = () if whole is None else ((), whole)
            if tensor.codec != "fp32" or tensor.shape not in allowed or tensor.nbytes != 4 * math.prod(tensor.shape):
                problem = f"{entry} of shard {index} is no optimizer state"
                raise ColaError(Reason.PROTOCOL_VIOLATION, problem=problem)
        self._snapshots[worker] = message
        if len(self._snapshots) == len(self.workers):
            self._snapshot_step, self._last_snapshot_step = None, message.step
            self._snapshot_complete.set()

    def _check_squares(self, worker: str, squares: Sequence[tuple[int, float]]) -> None:
        if [index for index, _ in squares] != self._called_of(worker):
            raise ColaError(Reason.PROTOCOL_VIOLATION, problem="norms of other shards than those called")
        bad = next((index for index, square in squares if not (math.isfinite(square) and square >= 0)), None)
        if bad is not None:
            raise ColaError(Reason.NON_FINITE_GRADIENT, site=bad, step=self._step)

    def _called_of(self, worker: str) -> list[int]:
        return sorted(i for i in self._called if self.owners[i] == worker)

    # --- ends -------------------------------------------------------------------------------------------------------

    def _fail(self, error: WorkerLost | WorkerBlamed) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # seen: nobody may be waiting now, the next waiter will be told

    async def _or_failure(self, work: Coroutine[object, object, T]) -> T:
        task = asyncio.ensure_future(work)
        try:
            ends: set[asyncio.Future[Any]] = {task, self._failure}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            return await task
        finally:
            task.cancel()

    def _emit(self, worker: str, capture: Capture) -> None:
        if not self._closed:  # a job that ended while its batch was still in the model
            self._owed[worker] -= capture_bytes(capture)
            self._put(worker, capture)

    def _settle(self) -> None:
        """Gives back what was reserved and turned out not to be needed."""
        for worker in self.workers:
            self._outboxes[worker].release(self._owed[worker])
            self._owed[worker] = 0

    def _put(self, worker: str, message: ToWorker) -> None:
        self._outboxes[worker].put(message)


def _norm(squares: Mapping[int, float]) -> float:
    return math.sqrt(sum(squares[index] for index in sorted(squares)))


def _refused(message: Refusal) -> ColaError:
    known = message.reason in Reason.__members__
    return ColaError.told(Reason(message.reason) if known else Reason.PROTOCOL_VIOLATION, message.message)
