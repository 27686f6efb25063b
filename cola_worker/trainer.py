"""From captures to deltas: what a worker does for its jobs, as a synchronous function of the messages it is sent.

A job's messages under one epoch come in this order, for each of its batches:

    Capture* StepEnd                              and, where StepEnd closes the step (batches > 0):
    -> Norm <- NormTotal                          where the job clips
    -> Delta <- Ack

and, where the server wants one, behind an Ack:
    SnapshotRequest -> Snapshot

Whatever contradicts that order is refused, and the server starts the job's next epoch.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from cola_common import failpoints, schedules
from cola_common.adapters.base import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.messages import (
    Ack,
    Assign,
    Capture,
    Credit,
    Delta,
    EncodedTensor,
    Norm,
    NormTotal,
    Refusal,
    Revoke,
    Snapshot,
    SnapshotRequest,
    StepEnd,
    ToServer,
)
from cola_common.tensor import decode, digest, encode
from cola_worker.expected import Expected, violation
from cola_worker.gradients import Gradients, clip, square
from cola_worker.shard import Shard
from cola_worker.shards import Shards

log = structlog.get_logger(__name__)

ToTrainer = Assign | Capture | StepEnd | NormTotal | Ack | SnapshotRequest | Revoke
"""The messages of a server that are about a job."""

Squares = tuple[tuple[int, float], ...]


class Trainer:
    """The jobs of one connected life. Not thread-safe: one thread calls it.

    `shards` is where optimizer state is kept for a later life. Job ids have the form that `ids.new("ftjob")` gives.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._jobs: dict[str, _Job] = {}

    def handle(self, message: ToTrainer) -> list[ToServer]:
        """Does what a message asks for. Returns: what to send, in order.

        A message that cannot be followed is answered with a `Refusal` and leaves all parameters as they are. The
        bytes of a capture are credited in any case.
        """
        try:
            return [*self._follow(message), *_credit(message)]
        except ColaError as error:
            return refuse(message, error)

    def _follow(self, message: ToTrainer) -> list[ToServer]:
        match message:
            case Assign():
                return self._assign(message)
            case Revoke():
                return self._revoke(message)
            case Capture():
                return self._job(message).capture(message)
            case StepEnd():
                return self._job(message).end_batch(message)
            case NormTotal():
                return self._job(message).clip(message)
            case Ack():
                return self._job(message).acknowledge(message)
            case SnapshotRequest():
                return self._snapshot(message)

    def _assign(self, message: Assign) -> list[ToServer]:
        present = self._jobs.get(message.job)
        if present is not None and message.epoch <= present.epoch:
            raise _stale(message.job, message.epoch, present.epoch)
        self._jobs.pop(message.job, None)  # a new epoch of the same shards needs no Revoke between
        job = _Job(message)
        restored = sum(self._go_on(job, index, state) for index, state in message.digests)
        self._jobs[message.job] = job
        log.info("assigned", job=message.job, epoch=job.epoch, step=job.step, shards=len(job.shards), restored=restored)
        failpoints.hit("worker.assigned")
        return []

    def _go_on(self, job: "_Job", index: int, state: str) -> bool:
        """Sees to it that a shard is as its snapshot has it. Returns: whether its optimizer state was here.

        Raises: `ColaError(STATE_MISSING)` where it was neither sent nor is here.
        """
        shard = job.shards.get(index)
        if shard is None:
            raise violation(f"a digest of shard {index}, which is not assigned here")
        if shard.state_digest() == state:
            return False
        if not (self._shards.restore(job.name, job.step, shard, state) and shard.state_digest() == state):
            raise ColaError(Reason.STATE_MISSING, site=shard.plan.site, job=job.name, step=job.step)
        return True

    def _revoke(self, message: Revoke) -> list[ToServer]:
        job = self._jobs.get(message.job)
        if job is not None and message.epoch < job.epoch:
            raise _stale(message.job, message.epoch, job.epoch)
        self._jobs.pop(message.job, None)
        if not message.keep:
            self._shards.drop(message.job)
        log.info("revoked", job=message.job, epoch=message.epoch, reason=message.reason, kept=message.keep)
        return []

    def _snapshot(self, message: SnapshotRequest) -> list[ToServer]:
        job = self._job(message)
        state, digests = job.snapshot(message)
        kept = self._keep(job)
        return [
            Snapshot(
                job=job.name,
                epoch=job.epoch,
                step=job.step,
                names=tuple(state),
                digests=digests,
                kept=kept,
                tensors=tuple(state.values()),
            )
        ]

    def _job(self, message: Capture | StepEnd | NormTotal | Ack | SnapshotRequest) -> "_Job":
        job = self._jobs.get(message.job)
        if job is None or job.epoch != message.epoch:
            raise _stale(message.job, message.epoch, "none" if job is None else job.epoch)
        return job

    def _keep(self, job: "_Job") -> bool:
        try:
            failpoints.hit("worker.before_keep")
            for shard in job.shards.values():
                self._shards.keep(job.name, job.step, shard)
            failpoints.hit("worker.after_keep")
        except OSError as error:  # a full disk costs a way from the server some day, and nothing else
            log.warning("a job's optimizer state is not kept here", job=job.name, step=job.step, error=str(error))
            self._shards.drop(job.name)
            return False
        return True


def refuse(message: ToTrainer, error: ColaError) -> list[ToServer]:
    """What to answer to a message that is not followed, or not even read."""
    step = 0 if isinstance(message, Capture | Revoke) else message.step
    return [Refusal(message.job, message.epoch, step, error.reason, error.message), *_credit(message)]


def _credit(message: ToTrainer) -> list[ToServer]:
    """A capture's bytes are done with, however it went. Since when it was here is not known here."""
    if not isinstance(message, Capture):
        return []
    return [Credit(message.job, message.epoch, message.batch, sum(t.nbytes for t in message.tensors), seconds=0.0)]


class _Job:
    """A job's shards here, under one epoch."""

    def __init__(self, assign: Assign) -> None:
        self.name = assign.job
        self.epoch = assign.epoch
        self.step = assign.step
        self._plan = assign.plan
        self._expected = Expected(assign)
        parameters: dict[int, Parameters] = {s.index: {} for s in assign.shards}
        optimizer: dict[int, Parameters] = {s.index: {} for s in assign.shards}
        for (index, name), tensor in zip(assign.names, assign.tensors, strict=True):
            of_shard = (optimizer if "." in name else parameters)[index]
            of_shard[name] = decode(tensor, what=f"{name} of shard {index}")
        ordered = sorted(assign.shards, key=lambda s: s.index)
        self.shards = {s.index: Shard(s, parameters[s.index], assign.plan, assign.deltas) for s in ordered}
        for index, state in optimizer.items():
            self.shards[index].take_up(state)
        self._digest = self._chained()
        self._batch: int | None = None
        """The batch that is open."""
        self._last_batch = -1
        self._gradients = Gradients(self.shards)
        self._unclipped: dict[int, Parameters] | None = None
        """The step's gradients, while they wait for the norm of those that other workers have."""
        self._squares: Squares = ()
        self._seconds = 0.0
        self._decode_seconds = 0.0

    def capture(self, message: Capture) -> list[ToServer]:
        with self._timed():
            self._open(message.batch)
            self._expected.check(message)
            self._gradients.add(message)
        failpoints.hit("worker.captured")
        return []

    def end_batch(self, message: StepEnd) -> list[ToServer]:
        if message.batch <= self._last_batch:
            return []  # said twice
        if message.step != self.step:
            raise violation(f"batch {message.batch} of step {message.step} in step {self.step}")
        with self._timed():
            self._open(message.batch)
            self._batch, self._last_batch = None, message.batch
            self._gradients.end_batch(message.calls)
            if not message.batches:
                return []
            means = self._gradients.mean(message.batches)
            self._decode_seconds = self._gradients.decode_seconds
            self._gradients = Gradients(self.shards)
            self._squares = tuple((index, square(gradient)) for index, gradient in means.items())
            for index, value in self._squares:
                if not math.isfinite(value):
                    raise ColaError(Reason.NON_FINITE_GRADIENT, site=self.shards[index].plan.site, step=self.step)
        if self._plan.max_grad_norm > 0:
            self._unclipped = means
            return [Norm(self.name, self.epoch, self.step, self._squares)]
        return [self._finish(means)]

    def clip(self, message: NormTotal) -> list[ToServer]:
        if message.step < self.step:
            return []  # said twice
        if message.step > self.step or self._unclipped is None or not message.total >= 0:
            raise violation(f"a norm of {message.total} for step {message.step} in step {self.step}")
        with self._timed():
            clip(self._unclipped.values(), self._plan.max_grad_norm, message.total)
        gradients, self._unclipped = self._unclipped, None
        return [self._finish(gradients)]

    def acknowledge(self, message: Ack) -> list[ToServer]:
        if message.step >= self.step:
            raise violation(f"an acknowledgement of step {message.step} in step {self.step}")
        if message.step == self.step - 1 and message.digest != self._digest:
            raise ColaError(Reason.DIGEST_MISMATCH, job=self.name, step=message.step)
        return []

    def snapshot(
        self, message: SnapshotRequest
    ) -> tuple[dict[tuple[int, str], EncodedTensor], tuple[tuple[int, str], ...]]:
        """Returns: the optimizer state, copied, by (shard, entry); and each shard's digest."""
        if message.step != self.step or self._batch is not None or self._unclipped is not None:
            raise violation(f"a snapshot of step {message.step} is asked for in step {self.step}")
        state = {
            (index, entry): encode(values.clone(), "fp32")  # the optimizer writes in place while they are being sent
            for index, shard in self.shards.items()
            for entry, values in shard.optimizer_state().items()
        }
        return state, tuple((index, shard.state_digest()) for index, shard in self.shards.items())

    def _open(self, batch: int) -> None:
        if self._unclipped is not None or batch <= self._last_batch or self._batch not in (None, batch):
            raise violation(f"batch {batch} after batch {max(self._last_batch, self._batch or 0)}")
        self._batch = batch

    def _finish(self, gradients: dict[int, Parameters]) -> Delta:
        """The optimizer step. A shard that was not called has no gradient and is not stepped."""
        failpoints.hit("worker.before_step")
        with self._timed():
            rate = schedules.learning_rate(self._plan, self.step)
            deltas = {index: self.shards[index].step(gradient, rate) for index, gradient in gradients.items()}
            self._digest = self._chained()
        delta = Delta(
            job=self.name,
            epoch=self.epoch,
            step=self.step,
            names=tuple((index, name) for index in deltas for name in self.shards[index].parameters),
            squares=self._squares,
            digest=self._digest,
            worker_seconds=self._seconds,
            tensors=tuple(tensor for tensors in deltas.values() for tensor in tensors),
            decode_seconds=self._decode_seconds,
        )
        self.step += 1
        self._seconds = 0.0
        failpoints.hit("worker.after_step")
        return delta

    def _chained(self) -> str:
        return digest.combine([shard.digest for shard in self.shards.values()])

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Adds to the seconds of the step: decoding, products and optimizer, and nothing that is waited for."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start


def _stale(job: str, epoch: int, current: int | str) -> ColaError:
    return ColaError(Reason.STALE_EPOCH, epoch=epoch, job=job, current=current)
