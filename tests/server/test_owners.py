"""Whom a job may be placed on, with what it has learnt of its workers; and that jobs do not all run to one place."""

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from cola_common import ids
from cola_common.errors import ColaError, Reason
from cola_common.messages import OwnedShard
from cola_server.fleet import Attendance, Fleet, WorkerBlamed
from cola_server.training.judgement import Judgement
from cola_server.training.owners import WORTH_A_MOVE, Owners
from cola_server.training.snapshots import Snapshot
from tests.server.fleet import JOB, SITES, SMALL, exchange_of, hello

SHARD_BYTES = 1000


@dataclass
class Place:
    """A fleet, and what its jobs share."""

    fleet: Fleet = field(default_factory=lambda: Fleet(SMALL))
    moves: Any = field(default_factory=threading.Lock)
    split: int = 1
    judgement: Judgement = field(default_factory=Judgement)

    def attend(self, name: int, gflops: float = 1.0, owned: tuple[OwnedShard, ...] = ()) -> Attendance:
        greeting = hello(f"wkr-{name:024d}", owned=owned)
        capacity = SimpleNamespace(**{**vars(greeting.capacity), "gflops": gflops})
        object.__setattr__(greeting, "capacity", capacity)
        return self.fleet.attend(greeting)[0]

    def owners(self, job: str = JOB) -> Owners:
        sites = [SimpleNamespace(index=i, group=i, name=site) for i, site in enumerate(SITES)]
        prepared: Any = SimpleNamespace(
            job=job,
            sites=sites,
            spec=SimpleNamespace(wire=SimpleNamespace(values="fp32")),
            parameter_bytes=lambda _site: SHARD_BYTES,
        )
        return Owners(prepared, self, self.judgement)  # type: ignore[arg-type]


START = Snapshot(1, 50, 0, [{}, {}], [{}, {}], ["digest 0", "digest 1"])


async def test_the_fastest_is_taken_until_it_was_too_slow_and_then_only_where_there_is_no_other() -> None:
    place = Place()
    slow, fast = place.attend(1, 1.0), place.attend(2, 9.0)
    owners = place.owners()
    assert owners.find(None) == dict.fromkeys((0, 1), fast.worker)
    owners.avoid([fast.worker])
    assert owners.find(None) == dict.fromkeys((0, 1), slow.worker)
    place.fleet.leave(slow, "gone")
    assert owners.find(None) == dict.fromkeys((0, 1), fast.worker)
    place.fleet.leave(fast, "gone")
    assert owners.find(None) is None


async def test_whoever_has_the_state_on_its_disk_is_preferred_and_known_by_shard() -> None:
    place = Place()
    fast = place.attend(1, 9.0, (OwnedShard(JOB, SITES[0], 49, "digest 0"), OwnedShard(JOB, SITES[1], 50, "other")))
    keeper = place.attend(2, 1.0, (OwnedShard(JOB, SITES[1], 50, "digest 1"),))
    owners = place.owners()
    assert owners.find(None) == dict.fromkeys((0, 1), fast.worker)
    found = owners.find(START)
    assert found == dict.fromkeys((0, 1), keeper.worker)
    assert owners.owned(found, START) == {1}
    assert owners.owned(dict.fromkeys((0, 1), fast.worker), START) == set()
    assert owners.owned({0: keeper.worker, 1: fast.worker}, START) == set()


async def test_who_is_suspected_is_done_without() -> None:
    place = Place()
    bad, good = place.attend(1, 9.0), place.attend(2, 1.0)
    place.judgement.blame(WorkerBlamed(bad.worker, 3, ColaError(Reason.DELTA_MISMATCH, step=3, problem="torn")))
    assert place.owners().find(None) == dict.fromkeys((0, 1), good.worker)
    place.fleet.leave(good, "gone")
    assert place.owners().find(None) is None


@pytest.mark.parametrize("split", [1, 2])
async def test_a_job_could_go_on_elsewhere_where_enough_others_are_there_that_were_not_slow(split: int) -> None:
    place = Place(split=split)
    workers = [place.attend(n).worker for n in range(split + 1)]
    owners = place.owners()
    assert owners.elsewhere(workers[:1])
    assert not owners.elsewhere(workers[:2])
    owners.avoid(workers[:1])
    assert not owners.elsewhere(workers[1:2])


@pytest.mark.parametrize(("gflops", "worth"), [(1.0, False), (WORTH_A_MOVE - 0.1, False), (WORTH_A_MOVE, True)])
async def test_a_move_must_be_worth_it(gflops: float, worth: bool) -> None:
    place = Place()
    at = place.attend(1, 1.0)
    owners = place.owners()
    assert not owners.better(dict.fromkeys((0, 1), at.worker))
    place.attend(2, gflops)
    assert owners.better(dict.fromkeys((0, 1), at.worker)) == worth


async def test_other_jobs_load_counts_and_the_jobs_own_does_not() -> None:
    place = Place()
    crowded, idle = place.attend(1), place.attend(2)
    at = dict.fromkeys((0, 1), crowded.worker)
    exchange = exchange_of(place.fleet, at)
    place.fleet.open(exchange, {crowded.worker: 100 * SHARD_BYTES})
    assert not place.owners(JOB).better(at)
    assert place.owners(ids.new("ftjob")).better(at)
    place.fleet.leave(idle, "gone")
    assert not place.owners(ids.new("ftjob")).better(at)


async def test_no_job_moves_to_a_worker_that_was_too_slow_for_it() -> None:
    place = Place()
    at, fast = place.attend(1, 1.0), place.attend(2, 100.0)
    owners = place.owners()
    owners.avoid([fast.worker])
    assert not owners.better(dict.fromkeys((0, 1), at.worker))
    assert place.owners().better(dict.fromkeys((0, 1), at.worker))


async def test_no_job_moves_for_the_sake_of_speed_where_its_worker_leaves_anyway() -> None:
    place = Place()
    at = place.attend(1, 1.0)
    place.attend(2, 100.0)
    place.fleet.drain(at.worker)
    assert not place.owners().better(dict.fromkeys((0, 1), at.worker))


async def test_one_job_moves_at_a_time() -> None:
    place = Place()
    at = dict.fromkeys((0, 1), place.attend(1, 1.0).worker)
    place.attend(2, 100.0)
    first, second = place.owners(), place.owners(ids.new("ftjob"))
    assert first.better(at)
    assert first.better(at)  # it is still on its way
    assert not second.better(at)
    second.settled()  # it has nothing to settle
    assert not second.better(at)
    first.settled()
    first.settled()
    assert second.better(at)
    second.settled()
    assert not place.moves.locked()
