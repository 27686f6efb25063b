"""Who attends: workers with their capacity, their streams' ends, and the exchanges that they take part in.

Belongs to the event loop. Nothing here knows gRPC: a stream's servicer reads from `Attendance.outbox`, hands what it
receives to `Fleet.accept`, and watches `Attendance.ended`.
"""

import asyncio
import statistics
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import structlog

from cola_common import ids
from cola_common.errors import ColaError, Reason
from cola_common.jobs import WorkerCard
from cola_common.messages import (
    PROTOCOL,
    Credit,
    Delta,
    Drain,
    Draining,
    Heartbeat,
    Hello,
    Message,
    Norm,
    Refusal,
    Snapshot,
    Welcome,
    payload,
)
from cola_common.rpc.limits import CHUNK_BYTES
from cola_server.fleet.exchange import Exchange, WorkerLost
from cola_server.fleet.outbox import Outbox
from cola_server.fleet.pace import ENOUGH, FASTEST, Pace
from cola_server.fleet.placement import Candidate, Load
from cola_server.fleet.progress import Progress

OPTIMIZER_COPIES = 3  # Adam's two moments, and what a codec of deltas has not let through
log = structlog.get_logger(__name__)

LEAST_SPEED = 1e9  # FLOP/s; no core is slower, and a worker that says so was disturbed when it measured
CLAIM = 3.0  # times that steps may be slower than claimed before that is a worker's own fault
SLOWED = 1.5  # times faster or slower than before: jobs look again at where they are
DELTA_SLACK_BYTES = 1 << 20  # a delta of a job that is over may still arrive; up to this much of it is read and refused


@dataclass(frozen=True)
class FleetLimits:
    """How streams to workers are bounded."""

    lease_seconds: float = 10.0
    """Silence after which a worker is lost: five heartbeats."""
    heartbeat_seconds: float = 2.0
    window_bytes: int = 256 << 20
    """Capture bytes of a worker that are on their way or not yet accumulated."""
    buffer_bytes: int = 4 << 30
    """Capture bytes that batches may reserve for a worker; the largest batch of a job."""
    chunk_bytes: int = CHUNK_BYTES


class Attendance:
    """One worker's connected life."""

    def __init__(self, hello: Hello, limits: FleetLimits, progress: Progress, pace: Pace) -> None:
        self.worker = hello.worker
        self.boot = hello.boot
        self.hello = hello
        self.session = ids.new("sess")
        self.outbox = Outbox(window_bytes=limits.window_bytes, buffer_bytes=limits.buffer_bytes)
        self.exchanges: dict[str, Exchange] = {}
        self.load: dict[str, Load] = {}  # what each job asks of it
        self.owned = {(o.job, o.site): (o.step, o.digest) for o in hello.owned}  # what lies on its disk
        self.progress = progress
        self.pace = pace
        self.last_seen = time.time()
        self.draining = False  # it gets no more jobs
        self.leaving = False  # it has said so, and waits for a Goodbye
        self.ended: asyncio.Future[ColaError | None] = asyncio.get_running_loop().create_future()

    def end(self, error: ColaError | None) -> None:
        """Asks the servicer to end the stream: with an error, or with a plain Goodbye."""
        if not self.ended.done():
            self.ended.set_result(error)


class Fleet:
    """All workers of a server."""

    def __init__(self, limits: FleetLimits) -> None:
        self.limits = limits
        self._present: dict[str, Attendance] = {}
        self._gone: dict[str, WorkerCard] = {}
        self._quarantined: dict[str, str] = {}
        self._progress: dict[str, Progress] = {}
        self._paces: dict[str, Pace] = {}
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing = False

    # --- coming and going -------------------------------------------------------------------------------------------

    def attend(self, hello: Hello) -> tuple[Attendance, Welcome]:
        """Lets a worker in. Raises: `ColaError` (PROTOCOL_VERSION, WORKER_QUARANTINED, DUPLICATE_WORKER,
        SERVER_DRAINING, PROTOCOL_VIOLATION).
        """
        if self._closing:
            raise ColaError(Reason.SERVER_DRAINING)
        if not hello.protocol_min <= PROTOCOL <= hello.protocol_max:
            theirs = f"{hello.protocol_min}–{hello.protocol_max}"
            raise ColaError(Reason.PROTOCOL_VERSION, theirs=theirs, ours=PROTOCOL)
        if not ids.valid("wkr", hello.worker):
            raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"{hello.worker!r} is no worker id")
        if hello.worker in self._quarantined:
            problem = self._quarantined[hello.worker]
            raise ColaError(Reason.WORKER_QUARANTINED, worker=hello.worker, problem=problem)
        earlier = self._present.get(hello.worker)
        if earlier is not None:
            if earlier.boot > hello.boot:
                raise ColaError(Reason.DUPLICATE_WORKER, worker=hello.worker)
            told = ColaError(Reason.DUPLICATE_WORKER, worker=hello.worker) if earlier.boot < hello.boot else None
            earlier.end(told)
            self.leave(earlier, "it attended again")
        progress = self._progress.get(hello.worker)
        if progress is None or progress.boot != hello.boot:
            progress = self._progress[hello.worker] = Progress(hello.boot)
        progress.begin()
        pace = self._paces.get(hello.worker)
        if pace is None or pace.boot != hello.boot:
            pace = self._paces[hello.worker] = Pace(hello.boot)
        attendance = Attendance(hello, self.limits, progress, pace)
        self._present[hello.worker] = attendance
        self._gone.pop(hello.worker, None)
        log.info("worker attends", worker=hello.worker, session=attendance.session, owned=len(hello.owned))
        self._tell()
        welcome = Welcome(
            session=attendance.session,
            lease_seconds=self.limits.lease_seconds,
            heartbeat_seconds=self.limits.heartbeat_seconds,
            window_bytes=self.limits.window_bytes,
            chunk_bytes=self.limits.chunk_bytes,
        )
        return attendance, welcome

    def leave(self, attendance: Attendance, problem: str) -> None:
        """The worker's stream is over; its exchanges are told. Does nothing the second time."""
        attendance.outbox.close()
        if self._present.get(attendance.worker) is attendance:
            log.info("worker left", worker=attendance.worker, session=attendance.session, problem=problem)
            self._gone[attendance.worker] = self._card(attendance, "lost")
            del self._present[attendance.worker]
        for exchange in list(attendance.exchanges.values()):
            exchange.lost(attendance.worker, problem)
        attendance.exchanges.clear()
        attendance.load.clear()
        self._tell()

    def quarantine(self, worker: str, problem: str) -> None:
        """Sends a worker away for good: another worker did not reproduce its bad delta."""
        self._quarantined[worker] = problem
        attendance = self._present.get(worker)
        if attendance is not None:
            attendance.end(ColaError(Reason.WORKER_QUARANTINED, worker=worker, problem=problem))
            self.leave(attendance, "quarantined")

    def close(self) -> None:
        """Says Goodbye to every worker."""
        self._closing = True
        for attendance in list(self._present.values()):
            attendance.end(None)

    def drain(self, worker: str) -> WorkerCard:
        """Asks a worker to leave, and takes its jobs away, each at its next step.

        Raises: `ColaError(UNKNOWN_WORKER)`.
        """
        attendance = self._present.get(worker)
        if attendance is None:
            raise ColaError(Reason.UNKNOWN_WORKER, worker=worker)
        attendance.outbox.put(Drain())  # it answers that it drains, and may go once that is here and its jobs are not
        self._empty(attendance)
        return self._card(attendance, "draining")

    # --- what workers say -------------------------------------------------------------------------------------------

    def accept(self, attendance: Attendance, message: Message) -> None:
        """A message of an attending worker.

        Raises: `ColaError` (PROTOCOL_VIOLATION; WORKER_LOST where its trainer hangs), which ends its stream.
        """
        attendance.last_seen = time.time()
        if isinstance(message, Heartbeat):
            problem = attendance.progress.beat(message)
            if problem is not None:
                raise ColaError(Reason.WORKER_LOST, worker=attendance.worker, problem=problem)
        elif isinstance(message, Credit):
            attendance.outbox.credit(message.bytes, message.seconds)
        elif isinstance(message, Draining):
            attendance.leaving = True
            self._empty(attendance)
            self._let_go(attendance)
        elif isinstance(message, Norm | Delta | Snapshot | Refusal):
            self._accept_for_job(attendance, message)
        else:
            raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"{type(message).__name__} from a worker")

    def admit(self, attendance: Attendance, message: Message) -> None:
        """Bounds what a worker may send before memory is taken: never more than the parameters it was given, or of a
        snapshot than what an optimizer makes of them.

        Raises: `ColaError(PROTOCOL_VIOLATION)`.
        """
        copies = OPTIMIZER_COPIES if isinstance(message, Snapshot) else 1
        limit = copies * max((o.parameter_bytes for o in attendance.load.values()), default=0) + DELTA_SLACK_BYTES
        declared = sum(t.nbytes for t in payload(message))
        if declared > limit:
            problem = f"{type(message).__name__} of {declared} bytes, at most {limit} can be right"
            raise ColaError(Reason.PROTOCOL_VIOLATION, problem=problem)

    def refuse(self, attendance: Attendance, message: Message, error: ColaError) -> None:
        """A message that `admit` refused: its job, if it is under way, goes on without this worker."""
        if isinstance(message, Delta | Snapshot):
            exchange = attendance.exchanges.get(message.job)
            if exchange is not None and exchange.epoch == message.epoch:
                exchange.refuse(attendance.worker, error)

    def _accept_for_job(self, attendance: Attendance, message: Norm | Delta | Snapshot | Refusal) -> None:
        exchange = attendance.exchanges.get(message.job)
        if exchange is None or exchange.epoch != message.epoch:
            if isinstance(message, Snapshot):  # late, and in the place of what lay on its disk before
                attendance.owned = {key: of for key, of in attendance.owned.items() if key[0] != message.job}
            if not isinstance(message, Refusal):
                current = exchange.epoch if exchange is not None else "none"
                stale = ColaError(Reason.STALE_EPOCH, epoch=message.epoch, job=message.job, current=current)
                attendance.outbox.put(Refusal(message.job, message.epoch, message.step, stale.reason, stale.message))
            return
        if isinstance(message, Snapshot) or (isinstance(message, Refusal) and message.reason == Reason.STATE_MISSING):
            self._note_owned(attendance, exchange, message)
        answer = exchange.accept(attendance.worker, message)
        if answer is not None:
            attendance.outbox.put(answer)

    # --- for the jobs -----------------------------------------------------------------------------------------------

    def candidates(
        self, *, job: str, step: int = 0, state: Mapping[str, tuple[int, str]] | None = None
    ) -> list[Candidate]:
        """Workers that could take the job's shards now. Whose disk has a shard of it as it is in `state` (site -> shard
        number, digest) after `step` steps owns that. What they carry of the job itself does not count as their load.
        """
        wanted = {(job, site): (step, digest) for site, (_, digest) in (state or {}).items()}
        now = asyncio.get_running_loop().time()
        trust = self._trust()
        return [
            Candidate(
                worker=a.worker,
                memory_bytes=a.hello.capacity.memory_bytes,
                speed=a.pace.speed.value(now) or trust * _claimed(a),
                rate=a.pace.rate.value(now) or FASTEST,  # what nothing has gone yet is hoped to be fast, and so tried
                window_bytes=self.limits.window_bytes,
                load=sum((load for other, load in a.load.items() if other != job), Load()),
                codecs=frozenset(a.hello.codecs),
                reductions=frozenset(a.hello.reductions),
                owned=frozenset(
                    (state or {})[site][0] for (_, site), of in wanted.items() if a.owned.get((job, site)) == of
                ),
            )
            for a in self._present.values()
            if not a.draining
        ]

    def outboxes(self, workers: Collection[str]) -> dict[str, Outbox]:
        """Where messages to these workers wait. Raises: `WorkerLost` for one that does not attend."""
        for worker in workers:
            if worker not in self._present:
                raise WorkerLost(worker, "it left")
        return {worker: self._present[worker].outbox for worker in workers}

    def open(self, exchange: Exchange, loads: Mapping[str, Load]) -> None:
        """Routes the job's messages to `exchange`. `loads` is what it asks of each worker."""
        for worker in exchange.workers:
            self._present[worker].exchanges[exchange.job] = exchange
            self._present[worker].load[exchange.job] = loads[worker]
        self._tell()

    def observe(self, worker: str, work: float, seconds: float) -> None:
        """A step with so much work took a worker so long. Jobs are told where it is not as fast as they think."""
        attendance = self._present.get(worker)
        if attendance is None:
            return
        now, pace = asyncio.get_running_loop().time(), attendance.pace
        pace.speed.add(work / seconds if seconds > 0 else 0.0, now)
        rate = attendance.outbox.way.rate()
        if rate is not None:
            pace.rate.add(rate, now)
        pace.first = pace.first or pace.speed.value(now)
        self._tell_of(pace, now)

    def late(self, worker: str, work: float, seconds: float) -> None:
        """A worker is not done with so much work after so long. It counts at once: others need not learn it anew."""
        attendance = self._present.get(worker)
        if attendance is None:
            return
        now = asyncio.get_running_loop().time()
        for _ in range(ENOUGH):
            attendance.pace.speed.add(work / seconds, now)
        self._tell_of(attendance.pace, now)

    def _tell_of(self, pace: Pace, now: float) -> None:
        known = pace.speed.value(now), pace.rate.value(now)
        if any(map(_changed, pace.told, known)):
            pace.told = known
            self._tell()

    def release(self, exchange: Exchange, reason: str, *, keep: bool) -> None:
        """Ends an exchange and frees its workers of the job."""
        exchange.close(reason, keep=keep)
        for worker in exchange.workers:
            attendance = self._present.get(worker)
            if attendance is not None and not keep:
                for site in exchange.sites:
                    attendance.owned.pop((exchange.job, site), None)
            if attendance is not None and attendance.exchanges.get(exchange.job) is exchange:
                del attendance.exchanges[exchange.job]
                del attendance.load[exchange.job]
                self._let_go(attendance)
        self._tell()

    def change(self) -> asyncio.Future[None]:
        """Done at the next coming, going or release. Take it before looking, then wait for it with `asyncio.wait`:
        it is everybody's, and must not be cancelled.
        """
        return self._changed

    def cards(self) -> list[WorkerCard]:
        """Every worker that attended since the server started."""
        here = [self._card(a, "draining" if a.draining else "attending") for a in self._present.values()]
        gone = [
            card.model_copy(update={"status": "quarantined"}) if card.id in self._quarantined else card
            for card in self._gone.values()
        ]
        return sorted(here + gone, key=lambda card: card.id)

    def _trust(self) -> float:
        """What a FLOP/s that a worker claims is worth where nothing is observed: as much as the others' have been."""
        claims = [a.pace.first / _claimed(a) for a in self._present.values() if a.pace.first is not None]
        return max(statistics.median(claims), 1 / CLAIM) if claims else 1.0

    def _empty(self, attendance: Attendance) -> None:
        attendance.draining = True
        for exchange in attendance.exchanges.values():
            exchange.leaving = True
        self._tell()

    @staticmethod
    def _note_owned(attendance: Attendance, exchange: Exchange, message: Snapshot | Refusal) -> None:
        """What lies on a worker's disk is the job's last snapshot, or nothing of the job."""
        for site in exchange.sites:
            attendance.owned.pop((exchange.job, site), None)
        if isinstance(message, Snapshot) and message.kept:
            known = [(index, digest) for index, digest in message.digests if index < len(exchange.sites)]
            attendance.owned |= {(exchange.job, exchange.sites[i]): (message.step, digest) for i, digest in known}

    def _let_go(self, attendance: Attendance) -> None:
        if attendance.leaving and not attendance.exchanges:
            attendance.end(None)

    def _card(self, attendance: Attendance, status: Literal["attending", "draining", "lost"]) -> WorkerCard:
        capacity = attendance.hello.capacity
        speed = attendance.pace.speed.value(asyncio.get_running_loop().time())
        return WorkerCard(
            id=attendance.worker,
            status=status,
            cores=capacity.cores,
            memory_bytes=capacity.memory_bytes,
            device=capacity.device,
            gflops=capacity.gflops if speed is None else speed / 1e9,
            shards=sum(list(e.owners.values()).count(attendance.worker) for e in attendance.exchanges.values()),
            last_seen=attendance.last_seen,
        )

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
        if not changed.done():
            changed.set_result(None)


def _claimed(attendance: Attendance) -> float:
    return max(LEAST_SPEED, attendance.hello.capacity.gflops * 1e9)


def _changed(told: float | None, known: float | None) -> bool:
    return known is not None and (told is None or not 1 / SLOWED <= known / told <= SLOWED)
