"""The fleet without a network: outbox, exchange and registry against messages made by hand."""

import asyncio
import dataclasses
import math
import time

import pytest
import torch

from cola_common import ids
from cola_common.errors import ColaError, Reason
from cola_common.messages import (
    PROTOCOL,
    Ack,
    Calls,
    Capacity,
    Capture,
    Credit,
    Delta,
    Draining,
    EncodedTensor,
    Hello,
    Norm,
    NormTotal,
    Part,
    Refusal,
    Revoke,
    StepEnd,
    ToWorker,
)
from cola_common.tensor import encode
from cola_server.fleet import Attendance, Exchange, Fleet, FleetLimits, Outbox, OutboxClosed, WorkerBlamed, WorkerLost

JOB = "ftjob-000000000000000000000000"
SHAPES = [{"A": (2, 4), "B": (3, 2)}, {"A": (2, 4), "B": (3, 2)}]
SMALL = FleetLimits(window_bytes=100, buffer_bytes=200)


def hello(worker: str | None = None, boot: int = 1, versions: tuple[int, int] = (PROTOCOL, PROTOCOL)) -> Hello:
    return Hello(
        protocol_min=versions[0],
        protocol_max=versions[1],
        worker=worker or ids.new("wkr"),
        boot=boot,
        capacity=Capacity(cores=1, memory_bytes=1 << 30, device="cpu", gflops=1.0),
        codecs=("fp32",),
        owned=(),
    )


def capture(nbytes: int, batch: int = 0, epoch: int = 1) -> Capture:
    tensor = EncodedTensor("fp32", (nbytes // 4,), 0, nbytes, 0, bytes(nbytes))
    return Capture(JOB, epoch, batch, (Part("g", 0, 0),), (tensor,))


def exchange_of(fleet: Fleet, owners: dict[int, str], *, clip: float = 0.0, epoch: int = 1) -> Exchange:
    exchange = Exchange(
        job=JOB,
        epoch=epoch,
        owners=owners,
        outboxes=fleet.outboxes(set(owners.values())),
        shapes=SHAPES,
        max_grad_norm=clip,
    )
    fleet.open(exchange, dict.fromkeys(exchange.workers, 1000))
    return exchange


def delta(indices: list[int], *, step: int = 0, epoch: int = 1, codec: str = "fp32", square: float = 1.0) -> Delta:
    names = [(i, name) for i in indices for name in SHAPES[i]]
    tensors = [encode(torch.ones(SHAPES[i][name]), codec) for i, name in names]
    squares = tuple((i, square) for i in indices)
    return Delta(JOB, epoch, step, tuple(names), squares, "digest", 0.1, tuple(tensors))


def end_step(exchange: Exchange, indices: tuple[int, ...] = (0, 1)) -> None:
    exchange.end_batch(batch=0, batches=1, calls=[Calls(i, 1, 5) for i in indices])


async def sent(attendance: Attendance, kind: type[ToWorker]) -> ToWorker:
    while not isinstance(message := await asyncio.wait_for(attendance.outbox.next(), 1), kind):
        pass
    return message


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
    outbox.credit(80)
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
    outbox.credit(1 << 40)
    assert (outbox.in_flight, outbox.reserved) == (0, 50)


# --- exchange -------------------------------------------------------------------------------------------------------


async def attended(fleet: Fleet, count: int) -> list[Attendance]:
    return sorted((fleet.attend(hello())[0] for _ in range(count)), key=lambda a: a.worker)


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
    assert a.ended.result() is not None and fleet.candidates(values="fp32") == []
    with pytest.raises(ColaError, match="bad delta"):
        fleet.attend(hello(a.worker, boot=9))
    assert [c.status for c in fleet.cards()] == ["quarantined"]


async def test_a_draining_worker_gets_nothing_new_and_leaves_when_its_jobs_have() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker})
    fleet.accept(a, Draining())
    assert fleet.candidates(values="fp32") == [] and not a.ended.done()
    fleet.release(exchange, "over", keep=False)
    assert a.ended.result() is None


async def test_a_message_larger_than_any_delta_could_be_is_refused_before_it_is_read() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    huge = delta([0])
    with pytest.raises(ColaError) as refused:
        fleet.admit(a, dataclasses.replace(huge, tensors=(EncodedTensor("fp32", (1 << 30,), 0, 4 << 30, 0, b""),)))
    assert refused.value.reason == Reason.PROTOCOL_VIOLATION
    fleet.admit(a, huge)


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
    fleet.accept(a, Credit(JOB, 99, 0, 40))
    assert (a.outbox.in_flight, a.outbox.reserved) == (0, 0)
    assert abs(a.last_seen - time.time()) < 5
