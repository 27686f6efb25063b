"""What a job asks of its workers, and when it moves from some to others."""

import dataclasses
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cola_common import ids
from cola_common.families import Family, Linear, Lora, Mlp
from cola_common.jobs import Codec, Rows
from cola_common.messages import Calls, OwnedShard
from cola_server.fleet import Attendance, Fleet, Load, carried
from cola_server.fleet.pace import ENOUGH
from cola_server.training.judgement import Judgement
from cola_server.training.loads import CALL, Loads
from cola_server.training.observed import Observed
from cola_server.training.owners import MOVE_SECONDS, Owners
from cola_server.training.traffic import capture_bytes, delta_bytes
from tests.server.capturing import site
from tests.server.fleet import SMALL, hello
from tests.server.prepared import prepared
from tests.support.wires import wire

LORA = Lora(r=8, scale=1.0)
ROOMY = dataclasses.replace(SMALL, window_bytes=1 << 20, buffer_bytes=1 << 20)

SITES = (
    site(0, 0, LORA, 64, 96),
    site(1, 0, LORA, 64, 32),
    site(2, 1, Mlp(hidden_sizes=(16,), scale=1.0), 64, 96, calls=3),
    site(3, 2, Linear(scale=1.0), 64, 96, layout="examples"),
)


# --- what a job asks for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize(
    ("rows", "values"), [("all", "fp32"), ("exact", "fp32"), ("exact", "bf16"), ("sketch", "int8")]
)
@pytest.mark.parametrize("deltas", ["fp32", "int8"])
def test_a_batch_asks_for_the_bytes_of_its_captures_and_its_part_of_the_delta(
    interval: int, rows: Rows, values: Codec, deltas: Codec
) -> None:
    owners = {0: "a", 1: "a", 2: "b", 3: "b"}
    plan = wire(rows, values, deltas, sketch_rows=10)
    loads = carried(Loads(prepared(SITES, interval=interval), plan).shards, owners)
    for worker in ("a", "b"):
        mine = [s for s in SITES if owners[s.index] == worker]
        captured = capture_bytes(mine, plan, tokens=4 * 16, examples=4)
        assert loads[worker].nbytes == pytest.approx(captured + delta_bytes(mine, deltas) / interval)
    assert loads["a"].parameter_bytes == 4 * 8 * (64 + 96 + 64 + 32)


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("rows", ["all", "exact", "sketch"])
def test_a_step_of_mean_batches_asked_for_what_its_batches_ask_for(interval: int, rows: Rows) -> None:
    owners = {0: "a", 1: "a", 2: "b", 3: "b"}
    job = Loads(prepared(SITES, interval=interval), wire(rows, sketch_rows=10))
    kept = {"all": (64, 64, 64, 4), "exact": (0, 0, 64, 4), "sketch": (10, 10, 64, 4)}[rows]
    batch = [Calls(s.index, s.calls, s.calls * k) for s, k in zip(SITES, kept, strict=True)]
    promised = carried(job.shards, owners)
    done = job.work(owners, batch * interval)
    assert done == {worker: pytest.approx(interval * promised[worker].work) for worker in ("a", "b")}


def test_a_gradient_asks_for_less_work_than_its_rows_and_fewer_rows_than_all() -> None:
    def work(rows: Rows) -> float:
        return Loads(prepared([site(0, 0, LORA, 576, 576)], length=256), wire(rows, sketch_rows=64)).whole.work

    assert work("exact") < work("sketch") < work("all")


def test_a_gradients_work_grows_with_its_size_and_with_its_calls_and_not_with_the_rows_that_it_was_made_of() -> None:
    def captured(r: int, calls: int, length: int = 16) -> float:
        job = Loads(prepared([site(0, 0, Lora(r, 1.0), 576, 576)], length=length), wire("exact"))
        return job.work({0: "a"}, [Calls(0, calls, 0)])["a"] - job.work({0: "a"}, [])["a"]

    assert captured(16, 1) - captured(8, 1) == pytest.approx(captured(8, 1) - CALL)
    assert captured(8, 3) == pytest.approx(3 * captured(8, 1))
    assert captured(8, 1, length=512) == captured(8, 1)


def test_work_grows_with_rows_and_with_what_a_family_does_with_them() -> None:
    def work(family: Family, rows: int) -> float:
        job = Loads(prepared([site(0, 0, family, 576, 576)]), wire())
        return job.work({0: "a"}, [Calls(0, 1, rows)])["a"]

    assert work(LORA, 64) < work(LORA, 256) < work(Lora(r=64, scale=1.0), 256) < work(Linear(scale=1.0), 256)
    # Of thin products each FLOP counts as one: workers measure their speed with them.
    grown = work(LORA, 4096) - work(LORA, 0)
    assert grown == pytest.approx(4 * 4096 * 8 * (576 + 576), rel=0.05)


# --- where it goes --------------------------------------------------------------------------------------------------

STEP_SECONDS = 0.5
SPEED = 1e9


class Stage:
    """A fleet, and jobs of one site whose step takes a worker of `SPEED` so long."""

    def __init__(self) -> None:
        self.fleet = Fleet(ROOMY)
        self.services: Any = SimpleNamespace(fleet=self.fleet, split=1, moves=threading.Lock(), observed=Observed())

    def worker(self, speed: float, worker: str | None = None, owned: Sequence[OwnedShard] = ()) -> Attendance:
        greeting = hello(worker, owned=owned)
        capacity = dataclasses.replace(greeting.capacity, gflops=speed / 1e9)
        return self.fleet.attend(dataclasses.replace(greeting, capacity=capacity))[0]

    def job(self, batches: int = 100, seconds: float = STEP_SECONDS) -> Owners:
        job = prepared([site(0, 0, LORA, 576, 576)], batches=batches)
        job.wire_plan = wire()
        owners = Owners(job, self.services, Judgement())
        (shard,) = owners._loads.shards
        load = Load(shard.load.parameter_bytes, seconds * SPEED, 0.0)
        owners._loads.shards = [dataclasses.replace(shard, load=load, x_bytes=0.0)]
        return owners

    def carry(self, attendance: Attendance, owners: Owners) -> None:
        """Another job's load."""
        attendance.load[ids.new("ftjob")] = owners.load({0: attendance.worker})[attendance.worker]


async def test_a_job_moves_to_a_faster_worker_where_the_rest_of_it_gains_more_than_a_move_costs() -> None:
    stage = Stage()
    here = {0: stage.worker(SPEED).worker}
    job = stage.job(batches=100)
    assert not job.better(here, 0, STEP_SECONDS)
    stage.worker(10 * SPEED)
    enough = int(MOVE_SECONDS / (0.9 * STEP_SECONDS)) + 1
    assert not job.better(here, 100 - enough + 1, STEP_SECONDS)
    assert job.better(here, 100 - enough, STEP_SECONDS)


async def test_a_job_that_does_not_wait_for_its_workers_does_not_move() -> None:
    stage = Stage()
    here = {0: stage.worker(SPEED).worker}
    stage.worker(10 * SPEED)
    job = stage.job(batches=100)
    assert not job.better(here, 0, 0.99 * MOVE_SECONDS / 100)
    assert job.better(here, 0, 1.1 * MOVE_SECONDS / 100)


async def test_a_worker_that_slows_down_loses_its_job() -> None:
    stage = Stage()
    one, other = stage.worker(SPEED), stage.worker(SPEED)
    job = stage.job(batches=1000)
    for owner in (one, other):
        for _ in range(ENOUGH):
            stage.fleet.observe(owner.worker, SPEED, 1.0)
    assert not job.better({0: one.worker}, 0, STEP_SECONDS)
    for _ in range(10):
        stage.fleet.observe(one.worker, SPEED, 4.0)
    assert job.better({0: one.worker}, 0, 4 * STEP_SECONDS)
    assert job.find(None) == {0: other.worker}


async def test_one_job_moves_at_a_time_and_the_next_one_sees_where_it_went() -> None:
    stage = Stage()
    busy = stage.worker(SPEED)
    first, second = stage.job(), stage.job()
    for job in (first, second):
        stage.carry(busy, job)
    here = {0: busy.worker}
    idle = stage.worker(SPEED)
    assert first.better(here, 0, 10.0)
    assert not second.better(here, 0, 10.0)
    busy.load.popitem()
    stage.carry(idle, first)
    first.settled()
    assert not second.better(here, 0, 10.0)  # it would find there what it has here
    idle.load.clear()
    assert second.better(here, 0, 10.0)


async def test_a_job_that_starts_again_goes_to_who_has_its_state_unless_another_pays() -> None:
    stage = Stage()
    for batches, back in ((1, True), (100_000, False)):
        job = stage.job(batches=batches)
        state = [OwnedShard(job._prepared.job, "site0", 1, "digest")]
        owner = stage.worker(SPEED, "wkr-" + "a" * 24, owned=state)
        fast = stage.worker(10 * SPEED, "wkr-" + "b" * 24)
        start: Any = SimpleNamespace(step=1, digests=["digest"])
        assert job.find(start) == {0: owner.worker if back else fast.worker}


async def test_who_was_too_slow_is_asked_only_where_there_is_nobody_else() -> None:
    stage = Stage()
    fast = stage.worker(10 * SPEED)
    job = stage.job()
    job.avoid({0: fast.worker}, [fast.worker], 60.0)
    assert job.find(None) == {0: fast.worker} and not job.elsewhere([fast.worker])
    slow = stage.worker(SPEED)
    assert job.find(None) == {0: slow.worker}
    assert job.elsewhere([fast.worker]) and not job.elsewhere([slow.worker])
    assert not job.better({0: slow.worker}, 0, 10.0)
