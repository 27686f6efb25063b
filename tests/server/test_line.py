"""The line: quotas hold, order within a tenant holds, nobody is kept out, and no place is lost."""

import asyncio
import random
from collections import Counter

import pytest

from cola_common.errors import ColaError, Reason
from cola_server.tenants import Quota, Quotas
from cola_server.training.line import MOST_BEFORE, Line, Place
from cola_server.training.shares import Shares
from cola_server.training.turn import Stopped, Turn

PLENTY = 1 << 40


class Room:
    """An admission by bytes that checks what it is told."""

    def __init__(self, limit: int) -> None:
        self.memory_bytes = self.free = limit
        self.taken: dict[str, int] = {}

    def fits(self, bytes: int) -> bool:
        return bytes <= self.free

    def take(self, job: str, bytes: int) -> None:
        assert job not in self.taken
        self.taken[job] = bytes
        self.free -= bytes
        assert self.free >= 0

    def release(self, job: str) -> None:
        self.free += self.taken.pop(job)


class Jobs:
    """Jobs that stand in a line, each a task."""

    def __init__(self, quotas=None, limit=PLENTY):
        self.room = Room(limit)
        self.rested = []
        self.line = Line(quotas or Quotas(), self.room, self.rested.append)
        self.places: dict[str, Place] = {}
        self.tasks: dict[str, asyncio.Task] = {}

    def stand(self, job, tenant="default", bytes=1):
        self.places[job] = Place(job, tenant, bytes)
        self.tasks[job] = asyncio.create_task(self.line.stand(self.places[job]))

    async def running(self):
        await settle()
        return [job for job, task in self.tasks.items() if task.done() and not task.cancelled() and task.result()]

    def waiting(self):
        return [job for job, task in self.tasks.items() if not task.done()]

    def leave(self, job):
        del self.tasks[job]
        self.line.leave(self.places[job])


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def quotas(most=8, **weights):
    return Quotas(Quota(most), {name: Quota(most, weight=weight) for name, weight in weights.items()})


async def test_a_tenants_jobs_run_in_the_order_in_which_they_came_and_as_many_as_it_may():
    jobs = Jobs(quotas(most=2))
    for job in "abcde":
        jobs.stand(job)
    assert await jobs.running() == ["a", "b"]
    jobs.leave("b")
    assert await jobs.running() == ["a", "c"]
    jobs.leave("a")
    assert await jobs.running() == ["c", "d"]


async def test_quotas_differ_and_who_has_none_of_his_own_has_the_servers():
    jobs = Jobs(Quotas(Quota(1), {"large": Quota(3)}))
    for number in range(4):
        for tenant in ("large", "small"):
            jobs.stand(f"{tenant}-{number}", tenant)
    running = Counter(job.partition("-")[0] for job in await jobs.running())
    assert running == {"large": 3, "small": 1}


async def test_a_flood_keeps_no_other_tenant_out():
    jobs = Jobs(quotas(most=4))
    for number in range(200):
        jobs.stand(f"flood-{number}", "flood")
    await jobs.running()
    jobs.stand("other", "other")
    assert "other" in await jobs.running()


async def test_where_memory_is_short_the_next_place_goes_to_who_runs_least_for_its_weight():
    jobs = Jobs(quotas(most=100, one=1, two=2, four=4), limit=7)
    for number in range(7):
        jobs.stand(f"one-{number}", "one")
    await jobs.running()
    for number in range(50):
        for tenant in ("one", "two", "four"):
            jobs.stand(f"{tenant}+{number}", tenant)
    assert len(await jobs.running()) == 7
    for number in range(6):
        jobs.leave(f"one-{number}")
        await settle()
    running = Counter(job.partition("+")[0] for job in await jobs.running() if "+" in job)
    assert running == {"two": 2, "four": 4}


async def test_places_are_numbered_by_tenant_and_move_up():
    jobs = Jobs(quotas(most=1))
    for job in ("a1", "a2", "a3", "b1", "b2"):
        jobs.stand(job, job[0])
    await jobs.running()
    number = jobs.line.number
    assert {job: number(place) for job, place in jobs.places.items()} == {
        "a1": None, "a2": 1, "a3": 2, "b1": None, "b2": 1,
    }  # fmt: skip
    jobs.leave("a1")
    await settle()
    assert (number(jobs.places["a2"]), number(jobs.places["a3"]), number(jobs.places["b2"])) == (None, 1, 1)
    jobs.line.withdraw(jobs.places["a3"])
    assert number(jobs.places["a3"]) is None


async def test_what_fits_goes_before_what_does_not_but_not_for_ever():
    jobs = Jobs(quotas(most=2), limit=10)
    jobs.stand("small-0", "small", 6)
    await jobs.running()
    jobs.stand("large", "large", 8)
    went = 0
    for number in range(1, 100):
        jobs.stand(f"small-{number}", "small", 4)
        await settle()
        if f"small-{number}" in await jobs.running():
            went += 1
            jobs.leave(f"small-{number}")
    assert went == MOST_BEFORE
    assert "large" not in await jobs.running()
    jobs.leave("small-0")
    assert "large" in await jobs.running()


async def test_what_could_never_fit_is_refused_and_keeps_nobody_waiting():
    jobs = Jobs(limit=10)
    jobs.stand("too large", "a", 11)
    jobs.stand("other", "a", 10)
    await settle()
    error = jobs.tasks.pop("too large").exception()
    assert isinstance(error, ColaError) and error.reason == Reason.JOB_TOO_LARGE
    assert await jobs.running() == ["other"]


async def test_what_went_before_counts_only_jobs_that_there_was_no_room_for():
    jobs = Jobs(quotas(most=1), limit=10)
    jobs.stand("running", "a", 1)
    jobs.stand("at its quota", "a", 1)
    await settle()
    for number in range(2 * MOST_BEFORE):
        jobs.stand(f"b-{number}", "b", 1)
        assert f"b-{number}" in await jobs.running()
        jobs.leave(f"b-{number}")
    assert jobs.places["at its quota"].before == 0


async def test_a_tenant_rests_when_its_last_running_job_leaves():
    jobs = Jobs(quotas(most=2))
    for job in ("a1", "a2", "b1"):
        jobs.stand(job, job[0])
    await jobs.running()
    jobs.leave("a1")
    assert jobs.rested == []
    jobs.leave("a2")
    assert jobs.rested == ["a"]


@pytest.mark.parametrize("when", ["while it waits", "as its turn comes", "after it was withdrawn"])
async def test_a_job_that_is_cancelled_leaves_its_place_to_the_next(when):
    jobs = Jobs(quotas(most=1), limit=5)
    jobs.stand("first", "a", 4)
    jobs.stand("cancelled", "a", 4)
    jobs.stand("next", "a", 1)
    jobs.stand("other", "b", 2)
    await settle()
    if when == "as its turn comes":
        jobs.leave("first")  # the place is given, and the task has not run since
    elif when == "after it was withdrawn":
        jobs.line.withdraw(jobs.places["cancelled"])
    jobs.tasks["cancelled"].cancel()
    await settle()
    if when != "as its turn comes":
        jobs.leave("first")
    assert await jobs.running() == ["next", "other"]
    for job in ("next", "other"):
        jobs.leave(job)
    assert jobs.room.free == 5


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_quotas_hold_nobody_waits_for_nothing_and_all_come_in(seed):
    rng = random.Random(seed)
    limits = {"a": 1, "b": 2, "c": 5}
    jobs = Jobs(Quotas(Quota(1), {name: Quota(most, weight=most) for name, most in limits.items()}), limit=10)
    for number in range(300):
        act = rng.choice(["stand", "stand", "leave", "cancel", "withdraw"])
        running, waiting = await jobs.running(), jobs.waiting()
        if act == "stand":
            tenant = rng.choice("abc")
            jobs.stand(f"{tenant}-{number}", tenant, rng.randint(1, 10))
        elif act == "leave" and running:
            jobs.leave(rng.choice(running))
        elif act == "cancel" and waiting:
            jobs.tasks[rng.choice(waiting)].cancel()
        elif act == "withdraw" and waiting:
            jobs.line.withdraw(jobs.places[rng.choice(waiting)])
        if rng.random() < 0.5:  # otherwise the next act comes before any task has run
            running = await jobs.running()
            counts = Counter(job[0] for job in running)
            assert all(counts[tenant] <= most for tenant, most in limits.items())
            first = {tenant: next((j for j in jobs.waiting() if j[0] == tenant), None) for tenant in limits}
            heads = [jobs.places[job] for tenant, job in first.items() if job and counts[tenant] < limits[tenant]]
            if all(place.before < MOST_BEFORE for place in heads):
                assert not any(jobs.room.fits(place.bytes) for place in heads)
    while running := await jobs.running():
        for job in running:
            jobs.leave(job)
    assert jobs.waiting() == []
    assert jobs.room.free == 10


# --- turns ----------------------------------------------------------------------------------------------------------


async def hold(turn, until):
    async with turn:
        await until.wait()


async def test_a_paused_job_leaves_the_line_and_comes_back_at_its_end():
    jobs, until = Jobs(quotas(most=1)), asyncio.Event()
    turns = [Turn(jobs.line, name, "default") for name in ("running", "paused", "waiting")]
    tasks = [asyncio.create_task(hold(turn, until)) for turn in turns]
    await settle()
    assert [turn.number for turn in turns] == [None, 1, 2]
    turns[1].pause()
    await settle()
    assert [turn.number for turn in turns] == [None, None, 1]
    turns[1].resume()
    await settle()
    assert [turn.number for turn in turns] == [None, 2, 1]
    until.set()
    await asyncio.gather(*tasks)
    assert jobs.room.free == PLENTY


async def test_a_job_needs_its_bytes_from_its_turn_to_its_pause():
    jobs = Jobs(limit=10)
    turn = Turn(jobs.line, "job", "default")
    turn.bytes = 7
    async with turn:
        assert jobs.room.free == 3
        turn.pause()
        again = asyncio.create_task(turn.again())
        await settle()
        assert (jobs.room.free, turn.held, jobs.rested) == (10, False, ["default"])
        turn.resume()
        await again
        assert (jobs.room.free, turn.held, turn.interrupted) == (3, True, False)
    assert jobs.room.free == 10


async def test_a_server_that_stops_lets_nobody_in():
    jobs, until = Jobs(quotas(most=1)), asyncio.Event()
    turns = [Turn(jobs.line, name, "default") for name in ("running", "waiting")]
    tasks = [asyncio.create_task(hold(turn, until)) for turn in turns]
    await settle()
    for turn in turns:
        turn.stop()
    await settle()
    with pytest.raises(Stopped):
        tasks[1].result()
    until.set()
    await tasks[0]
    assert jobs.room.free == PLENTY


# --- line and shares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_200_jobs_of_three_tenants_get_the_models_time_by_weight(seed):
    """Jobs of 5 to 20 passes, memory for 14 of them, passes of any length: a flood of each tenant at once."""
    rng = random.Random(seed)
    weights = {"one": 1.0, "two": 2.0, "four": 4.0}
    shares = Shares(weights)
    line = Line(quotas(most=8, **weights), Room(14), shares.rest)
    asking, used, left = [], Counter(), Counter()

    async def run(number, tenant):
        place = Place(f"{tenant}-{number}", tenant, 1)
        assert await line.stand(place)
        for _ in range(rng.randint(5, 20)):
            asking.append((tenant, asyncio.get_running_loop().create_future()))
            await asking[-1][1]
        line.leave(place)
        left[tenant] -= 1

    tenants = [tenant for number in range(200) for tenant in [list(weights)[number % 3]]]
    left.update(tenants)
    tasks = [asyncio.create_task(run(number, tenant)) for number, tenant in enumerate(tenants)]
    while min(left.values()) > 0:  # all have work
        await settle()
        tenant = shares.order({tenant for tenant, _ in asking})[0]
        turn = next(ask for ask in asking if ask[0] == tenant)
        asking.remove(turn)
        seconds = rng.uniform(0.1, 1.0)
        shares.used(tenant, seconds)
        used[tenant] += seconds
        turn[1].set_result(None)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    per_weight = [used[tenant] / weight for tenant, weight in weights.items()]
    assert max(per_weight) <= 1.1 * min(per_weight)
