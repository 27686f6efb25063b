"""The fleet without a network: outbox, exchange and registry against messages made by hand."""

import asyncio
import dataclasses
import math
import time

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.messages import (
    PROTOCOL,
    Ack,
    Credit,
    Delta,
    Drain,
    Draining,
    EncodedTensor,
    Hello,
    Norm,
    NormTotal,
    OwnedShard,
    Refusal,
    Revoke,
    Snapshot,
    SnapshotRequest,
    StepEnd,
)
from cola_common.tensor import encode
from cola_server.fleet import (
    Attendance,
    Exchange,
    Fleet,
    Load,
    Outbox,
    OutboxClosed,
    WorkerBlamed,
    WorkerLost,
    WorkerSlow,
)
from cola_server.fleet.pace import ENOUGH, FASTEST
from cola_server.fleet.registry import CLAIM, DELTA_SLACK_BYTES, LEAST_SPEED, SLOWED
from tests.server.fleet import (
    JOB,
    LOAD,
    SITES,
    SMALL,
    attended,
    capture,
    delta,
    end_step,
    exchange_of,
    half,
    hello,
    sent,
)

# --- outbox ---------------------------------------------------------------------------------------------------------


async def test_captures_wait_for_the_window_and_go_on_with_credit() -> None:
    outbox = Outbox(window_bytes=100, buffer_bytes=1000)
    await outbox.reserve(160)
    outbox.put(capture(80, 0))
    outbox.put(capture(80, 1))
    await outbox.next()
    second = asyncio.ensure_future(outbox.next())
    await asyncio.sleep(0)
    assert not second.done() and outbox.in_flight == 80
    outbox.credit(80, 0.0)
    assert (await second) == capture(80, 1)
    assert outbox.reserved == 80


async def test_a_capture_larger_than_what_is_left_never_waits_for_itself() -> None:
    outbox = Outbox(window_bytes=100, buffer_bytes=1000)
    outbox.put(capture(400))
    assert await asyncio.wait_for(outbox.next(), 1) == capture(400)


async def test_a_reservation_waits_for_room_and_learns_of_the_end() -> None:
    outbox = Outbox(window_bytes=100, buffer_bytes=100)
    await outbox.reserve(80)
    second = asyncio.ensure_future(outbox.reserve(40))
    await asyncio.sleep(0)
    assert not second.done()
    outbox.release(30)
    await asyncio.wait_for(second, 1)
    third = asyncio.ensure_future(outbox.reserve(40))
    await asyncio.sleep(0)
    outbox.close()
    with pytest.raises(OutboxClosed):
        await third


async def test_a_peer_cannot_credit_more_than_it_was_sent() -> None:
    outbox = Outbox(window_bytes=100, buffer_bytes=100)
    await outbox.reserve(50)
    outbox.credit(1 << 40, 0.0)
    assert (outbox.in_flight, outbox.reserved) == (0, 50)


# --- exchange -------------------------------------------------------------------------------------------------------


async def test_a_step_is_complete_when_every_worker_sent_its_delta() -> None:
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    exchange = exchange_of(fleet, {0: a.worker, 1: b.worker})
    end_step(exchange)
    fleet.accept(a, delta([0], square=9.0))
    waiting = asyncio.ensure_future(exchange.deltas())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    fleet.accept(b, delta([1], square=16.0))
    assert [d.names[0][0] for d in await waiting] == [0, 1]
    assert exchange.grad_norm() == 5.0


async def test_the_total_norm_goes_to_all_once_all_norms_are_in() -> None:
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    exchange = exchange_of(fleet, {0: a.worker, 1: b.worker}, clip=1.0)
    end_step(exchange)
    fleet.accept(a, Norm(JOB, 1, 0, ((0, 9.0),)))
    fleet.accept(b, Norm(JOB, 1, 0, ((1, 16.0),)))
    for attendance in (a, b):
        total = await sent(attendance, NormTotal)
        assert isinstance(total, NormTotal) and total.total == 5.0


async def test_a_delta_seen_twice_is_acknowledged_twice_and_counted_once() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker})
    end_step(exchange)
    fleet.accept(a, delta([0, 1]))
    fleet.accept(a, delta([0, 1]))
    assert len(await exchange.deltas()) == 1
    exchange.acknowledge({a.worker: "d"})
    fleet.accept(a, delta([0, 1]))
    acks = [await sent(a, Ack), await sent(a, Ack)]
    assert acks == [Ack(JOB, 1, 0, "d")] * 2


async def test_messages_of_another_epoch_change_nothing_and_are_told() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker}, epoch=2)
    end_step(exchange)
    fleet.accept(a, delta([0, 1], epoch=1))
    refusal = await sent(a, Refusal)
    assert isinstance(refusal, Refusal) and refusal.reason == Reason.STALE_EPOCH
    fleet.accept(a, delta([0, 1], epoch=2))
    assert len(await asyncio.wait_for(exchange.deltas(), 1)) == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (delta([0, 1], codec="bf16"), Reason.DELTA_MISMATCH),
        (delta([0]), Reason.PROTOCOL_VIOLATION),
        (delta([0, 1], step=7), Reason.PROTOCOL_VIOLATION),
        (delta([0, 1], square=math.nan), Reason.NON_FINITE_GRADIENT),
        (Refusal(JOB, 1, 0, Reason.NON_FINITE_GRADIENT, "inf at q_proj"), Reason.NON_FINITE_GRADIENT),
        (Refusal(JOB, 1, 0, "MADE_UP", "?"), Reason.PROTOCOL_VIOLATION),
    ],
)
async def test_an_answer_that_is_not_what_was_assigned_is_blamed_by_name(bad: Delta | Refusal, reason: Reason) -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker})
    end_step(exchange)
    fleet.accept(a, bad)
    with pytest.raises(WorkerBlamed) as blamed:
        await exchange.deltas()
    assert (blamed.value.worker, blamed.value.error.reason) == (a.worker, reason)


async def test_a_wrong_shape_is_blamed() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker})
    end_step(exchange)
    good = delta([0, 1])
    wrong = (encode(torch.ones(4, 2), "fp32"), *good.tensors[1:])
    fleet.accept(a, Delta(JOB, 1, 0, good.names, good.squares, "", 0.0, wrong))
    with pytest.raises(WorkerBlamed, match=r"\(4, 2\)"):
        await exchange.deltas()


async def test_a_delta_of_a_shard_of_another_worker_is_blamed_on_its_sender() -> None:
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    exchange = exchange_of(fleet, {0: a.worker, 1: b.worker})
    end_step(exchange)
    theirs = delta([1])
    fleet.accept(a, Delta(JOB, 1, 0, theirs.names, ((0, 1.0),), "", 0.0, theirs.tensors))
    with pytest.raises(WorkerBlamed) as blamed:
        await exchange.deltas()
    assert blamed.value.error.reason == Reason.NOT_OWNER


async def test_a_lost_worker_ends_what_waits_for_it() -> None:
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    exchange = exchange_of(fleet, {0: a.worker, 1: b.worker})
    end_step(exchange)
    waiting = asyncio.ensure_future(exchange.deltas())
    await asyncio.sleep(0)
    fleet.leave(b, "it was unplugged")
    with pytest.raises(WorkerLost, match="unplugged"):
        await waiting
    with pytest.raises(WorkerLost):
        await exchange.reserve({a.worker: 10})


async def test_what_a_batch_did_not_need_is_given_back_and_an_end_forgets_what_waits() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker})
    await exchange.reserve({a.worker: 150})
    exchange.emit(a.worker, capture(40))
    await asyncio.sleep(0.01)
    assert a.outbox.reserved == 150
    end_step(exchange)
    assert a.outbox.reserved == 40
    fleet.release(exchange, "over", keep=False)
    assert a.outbox.reserved == 0
    exchange.emit(a.worker, capture(40))  # the batch was still in the model
    await asyncio.sleep(0.01)
    assert [type(await a.outbox.next()) for _ in range(2)] == [StepEnd, Revoke]
    assert a.outbox.in_flight == 0


async def test_a_worker_far_slower_than_asked_for_is_named_and_may_still_be_waited_for() -> None:
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    exchange = exchange_of(fleet, {0: a.worker, 1: b.worker})
    end_step(exchange)
    fleet.accept(a, delta([0]))
    with pytest.raises(WorkerSlow, match=b.worker) as slow:
        await exchange.deltas(within=0.01)
    assert (slow.value.workers, slow.value.seconds) == ([b.worker], 0.01)
    fleet.accept(b, delta([1]))
    assert len(await exchange.deltas(within=0.01)) == 2


async def test_a_worker_that_lost_what_it_had_offered_is_lost_and_not_blamed() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker})
    fleet.accept(a, Refusal(JOB, 1, 0, Reason.STATE_MISSING, "not here"))
    with pytest.raises(WorkerLost, match="not here") as lost:
        await exchange.deltas()
    assert lost.value.worker == a.worker


# --- snapshots ------------------------------------------------------------------------------------------------------


async def folded(steps: int = 1) -> tuple[Fleet, Attendance, Attendance, Exchange]:
    """An exchange of two workers with so many steps behind it."""
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    exchange = exchange_of(fleet, {0: a.worker, 1: b.worker})
    for step in range(steps):
        end_step(exchange)
        fleet.accept(a, delta([0], step=step))
        fleet.accept(b, delta([1], step=step))
        await exchange.deltas()
        exchange.acknowledge({a.worker: "d", b.worker: "d"})
    return fleet, a, b, exchange


async def test_a_snapshot_is_complete_when_every_worker_sent_its_half_whatever_the_step_meanwhile() -> None:
    fleet, a, b, exchange = await folded()
    assert exchange.request_snapshot() == 1
    for attendance in (a, b):
        assert await sent(attendance, SnapshotRequest) == SnapshotRequest(JOB, 1, 1)
    waiting = asyncio.ensure_future(exchange.snapshots())
    fleet.accept(a, half([0], step=1))
    end_step(exchange)
    fleet.accept(a, delta([0], step=1))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    fleet.accept(b, half([1], step=1))
    fleet.accept(b, delta([1], step=1))
    assert await waiting == [half([0], step=1), half([1], step=1)]
    assert len(await asyncio.wait_for(exchange.deltas(), 1)) == 2


async def test_a_half_said_twice_counts_once_and_the_next_snapshot_is_its_own() -> None:
    fleet, a, b, exchange = await folded()
    exchange.request_snapshot()
    for attendance, index in ((a, 0), (b, 1)) * 2:
        fleet.accept(attendance, half([index], step=1))
    assert len(await asyncio.wait_for(exchange.snapshots(), 1)) == 2
    end_step(exchange)
    fleet.accept(a, delta([0], step=1))
    fleet.accept(b, delta([1], step=1))
    await exchange.deltas()
    exchange.acknowledge({a.worker: "d", b.worker: "d"})
    assert exchange.request_snapshot() == 2
    fleet.accept(a, half([0], step=1))  # the last one, a third time
    fleet.accept(a, half([0], step=2))
    waiting = asyncio.ensure_future(exchange.snapshots())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    fleet.accept(b, half([1], step=2))
    assert [h.step for h in await waiting] == [2, 2]


def without(snapshot: Snapshot, index: int) -> Snapshot:
    names, tensors = snapshot.names, snapshot.tensors
    return dataclasses.replace(
        snapshot, names=names[:index] + names[index + 1 :], tensors=tensors[:index] + tensors[index + 1 :]
    )


def renamed(snapshot: Snapshot, name: tuple[int, str]) -> Snapshot:
    return dataclasses.replace(snapshot, names=(name, *snapshot.names[1:]))


HALF = half([0], step=1)
WRONG_HALVES = {
    "of another step": half([0], step=2),
    "of an earlier step": half([0], step=0),
    "of a shard of another worker": half([1], step=1),
    "of one shard too many": half([0, 1], step=1),
    "of no shard": half([], step=1),
    "a tensor of a shard of another worker": renamed(HALF, (1, "A.step")),
    "a tensor of no shard": renamed(HALF, (7, "A.step")),
    "a tensor of no parameter": renamed(HALF, (0, "Z.step")),
    "a parameter": renamed(without(HALF, 0), (0, "A")),
    "one name twice": renamed(HALF, HALF.names[1]),
    "another shape": dataclasses.replace(HALF, tensors=(encode(torch.ones(3), "fp32"), *HALF.tensors[1:])),
    "another codec": dataclasses.replace(HALF, tensors=(encode(torch.ones(()), "bf16"), *HALF.tensors[1:])),
    "another size": dataclasses.replace(
        HALF, tensors=(dataclasses.replace(HALF.tensors[0], nbytes=8), *HALF.tensors[1:])
    ),
}


@pytest.mark.parametrize("wrong", WRONG_HALVES)
async def test_a_half_that_is_not_what_was_asked_for_is_blamed_on_its_sender(wrong: str) -> None:
    fleet, a, _, exchange = await folded()
    exchange.request_snapshot()
    fleet.accept(a, WRONG_HALVES[wrong])
    with pytest.raises(WorkerBlamed) as blamed:
        await exchange.snapshots()
    assert (blamed.value.worker, blamed.value.error.reason) == (a.worker, Reason.PROTOCOL_VIOLATION)
    told = await sent(a, Refusal)
    assert isinstance(told, Refusal) and told.reason == Reason.PROTOCOL_VIOLATION


async def test_a_snapshot_that_nobody_asked_for_is_blamed() -> None:
    fleet, a, _, exchange = await folded()
    end_step(exchange)
    fleet.accept(a, half([0], step=1))
    with pytest.raises(WorkerBlamed, match="unasked"):
        await exchange.deltas()


async def test_a_snapshot_that_a_worker_leaves_unfinished_ends_with_it() -> None:
    fleet, a, b, exchange = await folded()
    exchange.request_snapshot()
    fleet.accept(a, half([0], step=1))
    waiting = asyncio.ensure_future(exchange.snapshots())
    await asyncio.sleep(0)
    fleet.leave(b, "it was unplugged")
    with pytest.raises(WorkerLost, match="unplugged"):
        await waiting


# --- registry -------------------------------------------------------------------------------------------------------


async def test_of_two_workers_with_one_identity_the_newest_boot_stays() -> None:
    fleet = Fleet(SMALL)
    older, _ = fleet.attend(hello("wkr-" + "0" * 24, boot=1))
    newer, _ = fleet.attend(hello("wkr-" + "0" * 24, boot=2))
    told = older.ended.result()
    assert told is not None and told.reason == Reason.DUPLICATE_WORKER
    with pytest.raises(ColaError, match="another process attended"):
        fleet.attend(hello("wkr-" + "0" * 24, boot=1))
    assert not newer.ended.done() and [c.status for c in fleet.cards()] == ["attending"]


async def test_the_same_process_that_comes_back_takes_the_place_of_its_own_stream() -> None:
    fleet = Fleet(SMALL)
    first, _ = fleet.attend(hello("wkr-" + "0" * 24))
    fleet.attend(hello("wkr-" + "0" * 24))
    assert first.ended.result() is None
    fleet.leave(first, "its stream ended")  # the old stream's servicer ends after the new one began
    assert [c.status for c in fleet.cards()] == ["attending"]


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (hello(versions=(PROTOCOL + 1, PROTOCOL + 2)), Reason.PROTOCOL_VERSION),
        (hello("../../etc"), Reason.PROTOCOL_VIOLATION),
    ],
)
async def test_who_cannot_be_talked_to_is_refused_by_name(greeting: Hello, reason: Reason) -> None:
    with pytest.raises(ColaError) as refused:
        Fleet(SMALL).attend(greeting)
    assert refused.value.reason == reason


async def test_a_quarantined_worker_is_ended_and_not_let_in_again() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    fleet.quarantine(a.worker, "a bad delta")
    assert a.ended.result() is not None and fleet.candidates(job=JOB) == []
    with pytest.raises(ColaError, match="bad delta"):
        fleet.attend(hello(a.worker, boot=9))
    assert [c.status for c in fleet.cards()] == ["quarantined"]


async def test_a_draining_worker_gets_nothing_new_and_leaves_when_its_jobs_have() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker})
    assert not exchange.leaving
    fleet.accept(a, Draining())
    assert exchange.leaving
    assert fleet.candidates(job=JOB) == [] and not a.ended.done()
    assert [c.status for c in fleet.cards()] == ["draining"]
    fleet.release(exchange, "over", keep=False)
    assert a.ended.result() is None


async def test_a_worker_that_is_drained_is_asked_to_leave_and_goes_when_it_knows_and_has_no_job() -> None:
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    exchange = exchange_of(fleet, {0: a.worker, 1: b.worker})
    assert fleet.drain(a.worker).status == "draining"
    assert exchange.leaving
    assert [c.worker for c in fleet.candidates(job=JOB)] == [b.worker]
    assert await sent(a, Drain) == Drain()
    fleet.release(exchange, "the job is moving", keep=True)
    assert not a.ended.done()
    fleet.accept(a, Draining())
    assert a.ended.result() is None and not b.ended.done()
    with pytest.raises(ColaError) as refused:
        fleet.drain("wkr-" + "0" * 24)
    assert refused.value.reason == Reason.UNKNOWN_WORKER


STATE = {site: (index, f"digest {index}") for index, site in enumerate(SITES)}


def owned(fleet: Fleet, *, step: int = 1) -> dict[str, set[int]]:
    return {c.worker: set(c.owned) for c in fleet.candidates(job=JOB, step=step, state=STATE)}


async def test_what_a_worker_has_on_its_disk_is_known_from_its_greeting_to_the_bit() -> None:
    fleet = Fleet(SMALL)
    offered = [
        OwnedShard(JOB, SITES[0], 1, "digest 0"),
        OwnedShard(JOB, SITES[1], 1, "digest 7"),
        OwnedShard(JOB[:-1] + "1", SITES[1], 1, "digest 1"),
        OwnedShard(JOB, "elsewhere", 1, "digest 1"),
    ]
    a, _ = fleet.attend(hello(owned=offered))
    assert owned(fleet) == {a.worker: {0}}
    assert owned(fleet, step=2) == {a.worker: set()}
    assert [c.owned for c in fleet.candidates(job=JOB)] == [frozenset()]


async def test_what_a_worker_has_on_its_disk_is_known_from_its_snapshots_until_it_is_lost_or_revoked() -> None:
    fleet, a, b, exchange = await folded()
    exchange.request_snapshot()
    fleet.accept(a, half([0], step=1))
    fleet.accept(b, half([1], step=1, kept=False))
    assert owned(fleet) == {a.worker: {0}, b.worker: set()}
    fleet.release(exchange, "the job is moving", keep=True)
    assert owned(fleet) == {a.worker: {0}, b.worker: set()}
    again = exchange_of(fleet, {0: a.worker, 1: a.worker}, epoch=2)
    fleet.accept(a, Refusal(JOB, 2, 1, Reason.STATE_MISSING, "not here"))
    assert owned(fleet) == {a.worker: set(), b.worker: set()}
    fleet.release(again, "lost", keep=True)

    last = exchange_of(fleet, {0: a.worker, 1: a.worker}, epoch=3)
    last.request_snapshot()
    fleet.accept(a, half([0, 1], step=0, epoch=3))
    assert owned(fleet, step=0) == {a.worker: {0, 1}, b.worker: set()}
    assert owned(fleet, step=1) == {a.worker: set(), b.worker: set()}
    fleet.release(last, "over", keep=False)
    assert owned(fleet, step=0) == {a.worker: set(), b.worker: set()}


async def test_a_snapshot_of_an_epoch_that_is_over_is_told_and_changes_nothing() -> None:
    fleet, a, _, exchange = await folded()
    exchange.request_snapshot()
    fleet.release(exchange, "lost", keep=True)
    fleet.accept(a, half([0], step=1))
    told = await sent(a, Refusal)
    assert isinstance(told, Refusal) and told.reason == Reason.STALE_EPOCH
    assert owned(fleet)[a.worker] == set()


def speeds(fleet: Fleet) -> dict[str, float]:
    return {c.worker: c.speed for c in fleet.candidates(job=JOB)}


def claiming(gflops: float, boot: int = 1, worker: str | None = None) -> Hello:
    greeting = hello(worker, boot)
    return dataclasses.replace(greeting, capacity=dataclasses.replace(greeting.capacity, gflops=gflops))


async def test_a_worker_is_as_fast_as_it_claims_until_its_steps_tell() -> None:
    fleet = Fleet(SMALL)
    a, _ = fleet.attend(claiming(8.0))
    assert speeds(fleet) == {a.worker: 8e9}
    for _ in range(ENOUGH):
        fleet.observe(a.worker, 1e9, 0.25)
    assert speeds(fleet) == {a.worker: pytest.approx(4e9)}
    assert [c.gflops for c in fleet.cards()] == [pytest.approx(4.0)]


async def test_claims_are_worth_what_the_first_steps_made_of_others_and_what_comes_later_is_a_workers_own() -> None:
    fleet = Fleet(SMALL)
    a, _ = fleet.attend(claiming(8.0))
    b, _ = fleet.attend(claiming(6.0))
    for _ in range(ENOUGH):
        fleet.observe(a.worker, 1e9, 0.25)
    assert speeds(fleet)[b.worker] == pytest.approx(3e9)
    for _ in range(20):
        fleet.observe(a.worker, 1e9, 2.5)
    assert speeds(fleet) == {a.worker: pytest.approx(0.4e9, rel=0.05), b.worker: pytest.approx(3e9)}


async def test_a_worker_far_slower_than_it_claims_does_not_speak_for_the_others() -> None:
    fleet = Fleet(SMALL)
    a, _ = fleet.attend(claiming(8.0))
    b, _ = fleet.attend(claiming(8.0))
    for _ in range(ENOUGH):
        fleet.observe(a.worker, 1e9, 100.0)
    assert speeds(fleet)[b.worker] == pytest.approx(8e9 / CLAIM)


@pytest.mark.parametrize("nonsense", [math.nan, -1.0, 0.0, 0.2])
async def test_a_claim_that_no_core_would_make_is_none(nonsense: float) -> None:
    fleet = Fleet(SMALL)
    a, _ = fleet.attend(claiming(nonsense))
    assert speeds(fleet) == {a.worker: LEAST_SPEED}
    for _ in range(ENOUGH):
        fleet.observe(a.worker, 1e9, 10.0)
    assert speeds(fleet) == {a.worker: pytest.approx(1e8)}


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
async def test_a_worker_that_tells_nonsense_of_its_time_is_not_believed(seconds: float) -> None:
    fleet = Fleet(SMALL)
    a, _ = fleet.attend(claiming(8.0))
    for _ in range(2 * ENOUGH):
        fleet.observe(a.worker, 1e9, seconds)
    assert speeds(fleet) == {a.worker: 8e9}


async def test_a_process_keeps_its_pace_over_its_streams_and_a_new_one_begins_anew() -> None:
    fleet = Fleet(SMALL)
    a, _ = fleet.attend(claiming(8.0))
    for _ in range(ENOUGH):
        fleet.observe(a.worker, 1e9, 1.0)
    fleet.attend(claiming(8.0, worker=a.worker))
    assert speeds(fleet) == {a.worker: pytest.approx(1e9)}
    fleet.attend(claiming(8.0, boot=2, worker=a.worker))
    assert speeds(fleet) == {a.worker: 8e9}
    fleet.observe("wkr-" + "0" * 24, 1e9, 1.0)  # one that has left


async def test_jobs_are_told_of_a_pace_when_it_is_known_and_when_it_changes_by_much() -> None:
    fleet = Fleet(SMALL)
    a, _ = fleet.attend(claiming(8.0))

    def told(seconds: float, times: int) -> bool:
        change = fleet.change()
        for _ in range(times):
            fleet.observe(a.worker, 1e9, seconds)
        return change.done()

    assert not told(1.0, ENOUGH - 1)
    assert told(1.0, 1)
    assert not told(SLOWED * 0.95, 30)
    assert told(SLOWED * 1.3, 30)
    assert not told(SLOWED * 1.3, 30)
    assert told(0.5, 30)


async def test_the_rate_of_a_way_is_what_its_captures_show_and_one_not_tried_yet_is_fast() -> None:
    fleet = Fleet(dataclasses.replace(SMALL, buffer_bytes=1 << 30))
    a, b = await attended(fleet, 2)

    def rates() -> dict[str, float]:
        return {c.worker: c.rate for c in fleet.candidates(job=JOB)}

    assert rates() == {a.worker: FASTEST, b.worker: FASTEST}
    for batch in range(ENOUGH):
        await a.outbox.reserve(1 << 20)
        a.outbox.put(capture(1 << 20, batch))
        await a.outbox.next()
        await asyncio.sleep(0.05)
        fleet.accept(a, Credit(JOB, 1, batch, 1 << 20, 0.02))
        fleet.observe(a.worker, 1e9, 1.0)
    assert (1 << 20) / 5 < rates()[a.worker] < (1 << 20) / 0.025  # at least so long it was neither here nor there
    assert rates()[b.worker] == FASTEST


async def test_a_job_that_takes_its_place_is_a_change_for_the_others() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    change = fleet.change()
    exchange_of(fleet, {0: a.worker, 1: a.worker})
    assert change.done()


async def test_a_job_is_no_load_to_itself() -> None:
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    exchange_of(fleet, {0: a.worker, 1: a.worker})
    loads = {c.worker: c.load for c in fleet.candidates(job=JOB)}
    assert loads == {a.worker: Load(), b.worker: Load()}
    loads = {c.worker: c.load for c in fleet.candidates(job=JOB[:-1] + "1")}
    assert loads == {a.worker: LOAD, b.worker: Load()}


async def test_a_worker_is_a_candidate_with_what_it_said_that_it_knows() -> None:
    fleet = Fleet(SMALL)
    plain, _ = fleet.attend(hello())
    able, _ = fleet.attend(hello(codecs=("fp32", "int8"), reductions=("all", "exact")))
    known = {c.worker: (c.codecs, c.reductions) for c in fleet.candidates(job=JOB)}
    assert known == {plain.worker: ({"fp32"}, {"all"}), able.worker: ({"fp32", "int8"}, {"all", "exact"})}


@pytest.mark.parametrize(("message", "copies"), [(delta([0]), 1), (half([0]), 3)], ids=["delta", "snapshot"])
async def test_a_message_larger_than_any_could_be_is_refused_before_it_is_read(
    message: Delta | Snapshot, copies: int
) -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker})
    fleet.open(exchange, {a.worker: Load(parameter_bytes=1 << 22)})
    most = copies * (1 << 22) + DELTA_SLACK_BYTES

    def of(nbytes: int) -> Delta | Snapshot:
        return dataclasses.replace(message, tensors=(EncodedTensor("fp32", (nbytes // 4,), 0, nbytes, 0, b""),))

    fleet.admit(a, message)
    fleet.admit(a, of(most))
    with pytest.raises(ColaError) as refused:
        fleet.admit(a, of(most + 4))
    assert refused.value.reason == Reason.PROTOCOL_VIOLATION
    fleet.refuse(a, message, refused.value)
    with pytest.raises(WorkerBlamed) as blamed:
        await exchange.snapshots()
    assert blamed.value.worker == a.worker


async def test_whoever_waits_for_a_change_sees_each_coming_and_going() -> None:
    fleet = Fleet(SMALL)
    coming = fleet.change()
    assert not coming.done()
    attendance, _ = fleet.attend(hello())
    draining = fleet.change()
    assert coming.done() and not draining.done()
    fleet.accept(attendance, Draining())
    going = fleet.change()
    assert draining.done() and not going.done()
    fleet.leave(attendance, "gone")
    assert going.done()


async def test_credit_reaches_the_outbox_whatever_its_epoch() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    await a.outbox.reserve(40)
    a.outbox.put(capture(40))
    await a.outbox.next()
    fleet.accept(a, Credit(JOB, 99, 0, 40, 0.0))
    assert (a.outbox.in_flight, a.outbox.reserved) == (0, 0)
    assert abs(a.last_seen - time.time()) < 5
