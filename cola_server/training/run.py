"""One job's loop: attempts, each under an epoch of its own, until one reaches the job's end.

Whatever fails, and whatever is planned, the job goes on from its last snapshot: there is no second way.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import structlog

from cola_common import failpoints
from cola_common.errors import ColaError, Reason
from cola_common.jobs import JobStatus
from cola_server.fleet import WorkerBlamed, WorkerLost, WorkerSlow
from cola_server.training.attempt import Attempt
from cola_server.training.cadence import Cadence
from cola_server.training.checkpoints import last_adapter
from cola_server.training.course import Course, End
from cola_server.training.group import Group, Parted, Session
from cola_server.training.judgement import Judgement
from cola_server.training.owners import Owners
from cola_server.training.prepared import Prepared
from cola_server.training.records import Records
from cola_server.training.services import Services
from cola_server.training.snapshots import Snapshot, Snapshots
from cola_server.training.turn import Stopped, Turn

log = structlog.get_logger(__name__)

LONGEST_PAUSE_SECONDS = 10.0  # between attempts of which none comes to a step
PUT_RIGHT_BY_THE_OPERATOR = (Reason.STORAGE_FULL, Reason.JOB_TOO_LARGE)
"""What keeps a job from being prepared and is not its own fault: it fitted when it was made. It waits for its user."""
HOLD_SECONDS = 2.0  # between attempts to note on a full disk that it is full


class JobRun:
    """A job from its first batch to its last checkpoint; see the module."""

    def __init__(
        self,
        job: str,
        services: Services,
        turn: Turn,
        preparing: Callable[[], AbstractAsyncContextManager[None]],
        group: Group | None,
    ) -> None:
        """`preparing` is held while the job's files are read; `group` is the job's collaboration, if it is in one."""
        self._group = group
        self._job = job
        self._services = services
        self._turn = turn
        self._preparing = preparing
        self._records = Records(job, services.store)
        self._fruitless = 0  # attempts in a row that failed before their first step

    async def run(self) -> None:
        """Runs the job to its end, which is in the store when this returns. Cancelled or stopped, it leaves the status
        as it is.
        """
        try:
            course = await self._prepare()
            async with self._turn:
                await self._running()
                await self._attempts(course)
        except Stopped:
            pass
        except ColaError as error:
            await self._fail(error)
        except Exception as error:
            await self._fail(ColaError(Reason.INTERNAL, problem=f"{type(error).__name__}: {error}"))
            raise
        finally:
            await asyncio.to_thread(self._tidy)

    async def _fail(self, error: ColaError) -> None:
        await self._records.finish(error)
        if self._group is not None:
            self._group.dissolve(self._job)

    async def _prepare(self) -> Course:
        while True:
            try:
                async with self._preparing():
                    return await self._read()
            except ColaError as error:
                if error.reason not in PUT_RIGHT_BY_THE_OPERATOR:
                    raise
                await self._hold(error)
                await self._turn.wanted()

    async def _read(self) -> Course:
        services, records = self._services, self._records
        job = await records.job()
        files = await records.files()
        prepared = await asyncio.to_thread(Prepared, job, files, services.catalogue, services.artefacts)
        self._turn.bytes = prepared.need
        await records.validated(len(prepared.training.examples), prepared.total_steps)
        if prepared.without_target:
            length = prepared.spec.hyperparameters.max_length
            text = f"{prepared.without_target} examples have no target left within max_length={length}."
            await records.tell(text, level="warn")
        await self._meet_the_ended()
        judgement = Judgement()
        return Course(
            prepared=prepared,
            services=services,
            records=records,
            snapshots=Snapshots(prepared, services.artefacts),
            judgement=judgement,
            owners=Owners(prepared, services, judgement),
            cadence=Cadence(services.snapshots, prepared.state_bytes),
            turn=self._turn,
        )

    async def _meet_the_ended(self) -> None:
        """Members of the group that have succeeded, under an earlier server, stay in its mean as they ended."""
        if self._group is None:
            return
        for member in await self._records.members():
            if member.status == JobStatus.SUCCEEDED and member.id not in self._group.ended:
                adapter = await asyncio.to_thread(last_adapter, self._services, member)
                self._group.end({member.id: adapter})

    async def _running(self) -> None:
        """Waits until the job is the store's to run, giving up the turn as long as its user holds it."""
        while not await self._records.running():
            await self._turn.again()

    async def _attempts(self, course: Course) -> None:
        try:
            while await self._go_on(course):
                pass
        finally:
            course.owners.settled()

    async def _go_on(self, course: Course) -> bool:
        """One attempt and what follows from its end. Returns: whether the job needs another."""
        try:
            end = await self._attempt(course)
            if end == End.FINISHED:
                failpoints.hit("finish.before_commit")
                await self._records.finish(None)
                failpoints.hit("finish.after_commit")
                return False
            if end == End.INTERRUPTED:
                await self._turn.again()
                await self._running()
        except WorkerLost as lost:
            await self._records.tell(f"Worker {lost.worker} is lost: {lost.problem}.", level="warn")
        except Parted as parted:
            await self._records.tell(f"The group goes back together: {parted}.", level="warn")
        except WorkerSlow as slow:
            await self._records.tell(f"The job moves: {slow}.", level="warn")
        except WorkerBlamed as fault:
            text = f"Worker {fault.worker}, step {fault.step + 1}: {fault.error}."
            await self._records.tell(text, level="warn")
            course.judgement.blame(fault)
        except ColaError as error:
            if error.reason != Reason.STORAGE_FULL:
                raise
            await self._hold(error)
            await self._turn.again()
            await self._running()
        return True

    async def _attempt(self, course: Course) -> End:
        if self._fruitless:
            await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, 0.05 * 2**self._fruitless))
        group = None if self._group is None or self._job in self._group.ended else self._group
        session = Session([self._job]) if group is None else await self._meet(group)
        if session is None:
            return End.INTERRUPTED
        end = None
        try:
            end = await self._try(course, session, group)
        finally:
            if end != End.FINISHED:
                session.part(self._job)
        return end

    async def _meet(self, group: Group) -> Session | None:
        """Waits for the other members. Returns: None where the job is asked to give up its turn first."""
        interruption = asyncio.ensure_future(self._turn.interruption())
        entering = group.enter(self._job)
        try:
            either: list[asyncio.Future[Any]] = [entering, interruption]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return entering.result() if entering.done() else None
        finally:
            interruption.cancel()
            group.turn_away(self._job)

    async def _start(self, course: Course, session: Session, group: Group | None) -> Snapshot | None:
        """The newest snapshot; in a group, that of the latest step of which all members have one."""
        snapshots = course.snapshots
        if group is None:
            start, damaged = await asyncio.to_thread(snapshots.newest)
            await self._set_aside(damaged)
            return start
        while True:
            steps = await session.meet(self._job, await asyncio.to_thread(snapshots.steps))
            step = max(set.intersection(*steps.values()))
            start, damaged = await asyncio.to_thread(snapshots.at, step)
            await self._set_aside(damaged)
            if all((await session.meet(self._job, step == 0 or start is not None)).values()):
                await asyncio.to_thread(snapshots.rewind, step)
                return start

    async def _set_aside(self, damaged: Sequence[str]) -> None:
        for name in damaged:
            text = f"Snapshot {name} is damaged and set aside; the one before it is used."
            await self._records.tell(text, level="warn")

    async def _try(self, course: Course, session: Session, group: Group | None) -> End:
        start = await self._start(course, session, group)
        owners = await self._place(course, start)
        if owners is None:
            return End.INTERRUPTED
        failpoints.hit("epoch.before_commit")
        epoch = await self._records.begin_epoch(start, course.owners.plan)
        failpoints.hit("epoch.after_commit")
        log.info("attempt", job=self._job, epoch=epoch, step=start.step if start else 0, workers=set(owners.values()))
        attempt = Attempt(course, epoch, owners, start, session, group)
        try:
            return await attempt.run()
        finally:
            self._fruitless = 0 if attempt.folded else self._fruitless + 1

    async def _place(self, course: Course, start: Snapshot | None) -> Mapping[int, str] | None:
        """Waits for workers that can carry the job. Returns: None where the job is asked to give up its turn first."""
        waiting = False
        interruption = asyncio.ensure_future(self._turn.interruption())
        try:
            while not self._turn.interrupted:
                change = course.owners.change()
                owners = course.owners.find(start)
                if owners is not None:
                    if waiting:
                        waiting = False
                        await self._records.waiting(False)
                        continue  # that took a while: look again at who is there
                    return owners
                if not waiting:
                    waiting = True
                    await self._records.waiting(True)
                await asyncio.wait([change, interruption], return_when=asyncio.FIRST_COMPLETED)
            return None
        finally:
            interruption.cancel()

    async def _hold(self, error: ColaError) -> None:
        """Pauses the job: its user resumes it once there is room."""
        self._turn.pause()
        while True:
            try:
                await self._records.hold(error)
                break
            except ColaError as still:
                if still.reason != Reason.STORAGE_FULL:
                    raise
                await asyncio.sleep(HOLD_SECONDS)

    def _tidy(self) -> None:
        """A job that is over needs no snapshots."""
        if self._services.store.job(self._job).status.terminal:
            self._services.artefacts.remove_snapshots(self._job)
