"""What travels of a job: kept over its epochs, planned anew where that pays, and to each worker as it knows it."""

import dataclasses
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cola_common.families import Linear, Lora
from cola_common.jobs import Rows, Wire, WirePlan
from cola_common.tensor import CODECS
from cola_server.fleet import Candidate, Fleet, FleetLimits
from cola_server.model import Site
from cola_server.training.judgement import Judgement
from cola_server.training.observed import Observed
from cola_server.training.owners import Owners
from cola_server.training.wiring import REPLAN_SECONDS, Wiring
from tests.server.capturing import site
from tests.server.fleet import hello
from tests.server.prepared import prepared
from tests.support.wires import wire

LORA, LINEAR = site(0, 0, Lora(8, 1.0), 64, 96), site(0, 0, Linear(1.0), 64, 96)
ALL_ROWS = 4 * 256 * (64 + 96)  # bytes of a batch's x and g
LIMITS = FleetLimits(window_bytes=1 << 20, buffer_bytes=1 << 20)
TIGHT = dataclasses.replace(LIMITS, buffer_bytes=ALL_ROWS - 1)
REDUCTIONS: tuple[Rows, ...] = ("all", "exact", "sketch")
LOSSY = Wire(max_error=1.0)


def services(limits: FleetLimits = LIMITS, pass_seconds: float | None = None) -> Any:
    """`pass_seconds` is what the job's mean batch takes in the model."""
    observed = Observed()
    if pass_seconds is not None:
        observed.passed("m", 256, pass_seconds)
    return SimpleNamespace(fleet=SimpleNamespace(limits=limits), observed=observed)


def job(of: Site = LORA, asks: Wire = LOSSY, **fields: Any) -> Any:
    return prepared([of], batch=4, length=64, wire=asks, **fields)


def worker(
    name: str = "w", rate: float = 1e9, codecs: Sequence[str] = CODECS, reductions: Sequence[str] = REDUCTIONS
) -> Candidate:
    known = {"codecs": frozenset(codecs), "reductions": frozenset(reductions)}
    return Candidate(name, memory_bytes=1 << 30, speed=1e12, rate=rate, **known)


# --- planned once, kept ---------------------------------------------------------------------------------------------


def test_a_plan_is_made_for_the_workers_that_there_are_and_kept_whoever_comes() -> None:
    wiring = Wiring(job(), services(pass_seconds=0.1))
    assert wiring.plan is None
    slow = wiring.settle([worker(rate=1e4)])
    assert slow.error > 0 and wiring.plan == slow
    assert wiring.settle([worker(rate=1e12)]) is slow
    fast = Wiring(job(), services(pass_seconds=0.1)).settle([worker(rate=1e12)])
    assert fast.error == 0


def test_the_plan_of_an_earlier_epoch_goes_on() -> None:
    again, earlier = job(), wire("sketch", "int4", "bf16", sketch_rows=9)
    again.wire_plan = earlier
    wiring = Wiring(again, services(pass_seconds=0.1))
    assert wiring.plan is earlier and wiring.settle([worker()]) is earlier


def test_it_is_planned_for_the_fastest_link_and_the_next_estimate_knows_of_it() -> None:
    given = services(pass_seconds=0.1)
    plan = Wiring(job(), given).settle([worker("slow", rate=1e4), worker("fast", rate=1e10)])
    assert plan.error == 0
    assert given.observed.rate == 1e10


# --- planned anew ---------------------------------------------------------------------------------------------------


def running(of: Site = LINEAR, asks: Wire = LOSSY, **fields: Any) -> Wiring:
    """Begun over a fast link, with a worker that then turns out to be slow; a pass takes it 0.1 s."""
    wiring = Wiring(job(of, asks, **fields), services(pass_seconds=0.1))
    assert wiring.settle([worker(rate=1e12)]).error == 0
    return wiring


def test_a_job_changes_its_plan_where_its_link_is_slow_and_there_is_enough_left_of_it() -> None:
    wiring = running()
    before = wiring.plan
    assert before is not None
    assert not wiring.better({"w"}, [worker(rate=1e12)], 10**6)
    assert not wiring.better({"w"}, [worker(rate=1e5)], 1)
    assert wiring.plan is before
    assert wiring.better({"w"}, [worker(rate=1e5)], 1000)
    assert wiring.plan.error > 0 and wiring.loads(wiring.plan).whole.nbytes < wiring.loads(before).whole.nbytes / 2
    assert wiring.settle([worker(rate=1e12)]) is wiring.plan
    assert not wiring.better({"w"}, [worker(rate=1e5)], 10**6), "it has it"


@pytest.mark.parametrize("interval", [1, 10])
def test_a_change_pays_from_as_many_steps_on_as_make_up_for_it(interval: int) -> None:
    rate, wiring = 1e5, running(interval=interval)
    assert wiring.plan is not None
    asked = [
        batches
        for batches in range(0, 20 * interval, interval)
        if running(interval=interval).better({"w"}, [worker(rate=rate)], batches)
    ]
    first = asked[0]
    assert asked == list(range(first, 20 * interval, interval)), "the more is left, the more it pays"
    old = wiring.loads(wiring.plan).whole.nbytes / rate
    assert wiring.better({"w"}, [worker(rate=rate)], first)
    new = wiring.loads(wiring.plan).whole.nbytes / rate
    assert (first - interval) * (old - new) <= REPLAN_SECONDS < first * (old - new) * 1.01


def test_it_is_the_links_of_the_jobs_own_workers_that_count() -> None:
    wiring = running()
    slow, idle = worker("w", rate=1e5), worker("idle", rate=1e12)
    assert not wiring.better({"idle"}, [slow, idle], 1000)
    assert not wiring.better({"gone"}, [slow, idle], 1000)
    assert wiring.better({"w"}, [slow, idle], 1000)


def test_a_job_that_may_lose_nothing_or_has_named_everything_goes_on_as_it_does() -> None:
    for of, asks in ((LORA, Wire()), (LINEAR, Wire(rows="all", values="fp32", deltas="fp32", max_error=1.0))):
        wiring = running(of, asks)
        before = wiring.plan
        assert not wiring.better({"w"}, [worker(rate=1e2)], 10**6)
        assert wiring.plan is before


def test_a_job_whose_pass_was_never_timed_goes_on_as_it_does() -> None:
    wiring = Wiring(job(LINEAR), services())
    assert not wiring.better({"w"}, [worker(rate=1e2)], 10**6), "there is no plan yet"
    wiring.settle([worker()])
    assert not wiring.better({"w"}, [worker(rate=1e2)], 10**6)


def test_loads_are_made_once_for_each_plan() -> None:
    wiring = Wiring(job(), services())
    plans = [
        wire(rows, v, d, sketch_rows=k)
        for rows in REDUCTIONS
        for v in ("fp32", "int8")
        for d in ("fp32", "bf16")
        for k in (8, 9)
    ]
    made = [wiring.loads(plan) for plan in plans]
    assert len({id(each) for each in made}) == len(plans)
    assert all(
        wiring.loads(plan.model_copy(update={"reason": "again"})) is each
        for plan, each in zip(plans, made, strict=True)
    )


# --- to each worker -------------------------------------------------------------------------------------------------


def settled(plan: WirePlan, limits: FleetLimits = LIMITS) -> Wiring:
    begun = job()
    begun.wire_plan = plan
    return Wiring(begun, services(limits))


def test_a_worker_without_a_reduction_or_a_codec_gets_what_it_has() -> None:
    plan = wire("exact", "int8", "bf16")
    candidates = [
        worker("all of it"),
        worker("no exact", reductions=("all", "sketch")),
        worker("no int8", codecs=("fp32", "bf16")),
        worker("nothing", codecs=("fp32",), reductions=("all",)),
    ]
    theirs = settled(plan).of_workers([c.worker for c in candidates] + ["unheard of"], candidates)
    assert {name: (p.rows, p.values, p.deltas) for name, p in theirs.items()} == {
        "all of it": ("exact", "int8", "bf16"),
        "no exact": ("all", "int8", "bf16"),
        "no int8": ("exact", "bf16", "bf16"),
        "nothing": ("all", "fp32", "fp32"),
        "unheard of": ("exact", "int8", "bf16"),
    }


def test_a_worker_through_whose_buffer_its_part_would_not_fit_carries_nothing() -> None:
    plan = wire("exact")
    for limits, fits in ((TIGHT, False), (LIMITS, True)):
        wiring = settled(plan, limits)
        assert wiring.carries(worker())
        assert wiring.carries(worker(reductions=("all",))) is fits
    assert settled(wire("exact", "bf16"), TIGHT).carries(worker(reductions=("all",))), "half of the bytes fit"
    assert not settled(wire("exact", "bf16"), TIGHT).carries(worker(reductions=("all",), codecs=("fp32",)))
    assert Wiring(job(), services(TIGHT)).carries(worker(reductions=("all",))), "nothing is planned yet"


def owners_of(fleet: Fleet, begun: Any) -> Owners:
    given: Any = SimpleNamespace(fleet=fleet, split=None, moves=threading.Lock(), observed=Observed())
    return Owners(begun, given, Judgement())


@pytest.mark.parametrize("planned", [False, True])
async def test_a_job_goes_to_none_that_could_not_take_its_batches(planned: bool) -> None:
    fleet = Fleet(TIGHT)
    begun = job(asks=Wire())
    if planned:
        begun.wire_plan = wire("exact")
    able = fleet.attend(hello(codecs=CODECS, reductions=REDUCTIONS))[0]
    for _ in range(3):
        older = fleet.attend(hello(codecs=CODECS))[0]
        fleet.observe(older.worker, 1e12, 1.0)
    owners = owners_of(fleet, begun)
    found = owners.find(None)
    assert found == {0: able.worker}
    assert owners.plan.rows == "exact"
    assert {w: p.rows for w, p in owners.wires(found).items()} == {able.worker: "exact"}
    fleet.leave(able, "it was unplugged")
    assert owners.find(None) is None


async def test_a_job_split_over_workers_of_two_kinds_sends_each_what_it_knows() -> None:
    fleet = Fleet(LIMITS)
    begun = prepared([LORA, site(1, 1, Lora(8, 1.0), 64, 96)], batch=4, length=64, wire=Wire())
    new = fleet.attend(hello(codecs=CODECS, reductions=REDUCTIONS))[0]
    old = fleet.attend(hello(codecs=("fp32",)))[0]
    owners = owners_of(fleet, begun)
    owners._parts = 2
    found = owners.find(None)
    assert found is not None and set(found.values()) == {new.worker, old.worker}
    assert {w: p.rows for w, p in owners.wires(found).items()} == {new.worker: "exact", old.worker: "all"}
