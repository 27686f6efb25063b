"""A snapshot is of one step in all its parts, and what goes wrong with it is told to the attempt."""

import asyncio
import dataclasses
import threading
from typing import Any

import pytest
import torch

from cola_common.adapters import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.messages import Snapshot
from cola_common.tensor import decode, digest, encode
from cola_server.fleet import Attendance, Exchange, Fleet, WorkerBlamed, WorkerLost
from cola_server.training.keeper import Keeper
from cola_server.training.snapshots import Snapshot as Whole
from tests.server.fleet import SHAPES, SMALL, attended, exchange_of, half

PARAMETERS: list[Parameters] = [
    {name: torch.full(shape, float(index)) for name, shape in of_shard.items()} for index, of_shard in enumerate(SHAPES)
]


class Folder:
    """Takes snapshots as `Snapshots` does; while `gate` is shut a write does not come to its end."""

    def __init__(self) -> None:
        self.written: list[Whole] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: ColaError | None = None

    def write(self, snapshot: Whole) -> None:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.written.append(snapshot)


@pytest.fixture
def folder() -> Folder:
    return Folder()


async def keeping(folder: Any) -> tuple[Keeper, Exchange, Fleet, Attendance, Attendance]:
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    exchange = exchange_of(fleet, {0: a.worker, 1: b.worker}, epoch=4)
    return Keeper(exchange, folder), exchange, fleet, a, b


def right(index: int) -> Snapshot:
    """A half that tells the digest of what is in it."""
    plain = half([index], epoch=4)
    entries = {entry: decode(t) for (_, entry), t in zip(plain.names, plain.tensors, strict=True)}
    return dataclasses.replace(plain, digests=((index, digest.state({**PARAMETERS[index], **entries})),))


async def test_a_snapshot_has_the_servers_parameters_and_the_workers_state(folder: Folder) -> None:
    keeper, _, fleet, a, b = await keeping(folder)
    assert not keeper.busy
    await keeper.wait()
    keeper.begin(PARAMETERS, trained_tokens=77)
    assert keeper.busy
    fleet.accept(b, right(1))
    keeper.look()
    assert keeper.busy
    fleet.accept(a, right(0))
    await keeper.wait()
    assert not keeper.busy
    (written,) = folder.written
    assert (written.epoch, written.step, written.trained_tokens) == (4, 0, 77)
    assert all(ours is theirs for ours, theirs in zip(written.parameters, PARAMETERS, strict=True))
    assert [set(state) for state in written.optimizer] == [{entry for _, entry in right(i).names} for i in (0, 1)]
    assert written.optimizer[1]["B.exp_avg"].shape == (3, 2)
    assert list(written.digests) == [right(i).digests[0][1] for i in (0, 1)]


def incomplete(snapshot: Snapshot) -> Snapshot:
    return dataclasses.replace(snapshot, names=snapshot.names[1:], tensors=snapshot.tensors[1:])


def other_values(snapshot: Snapshot) -> Snapshot:
    return dataclasses.replace(snapshot, tensors=(encode(torch.tensor(2.0), "fp32"), *snapshot.tensors[1:]))


def other_bytes(snapshot: Snapshot) -> Snapshot:
    torn = dataclasses.replace(snapshot.tensors[0], data=bytes(4))
    return dataclasses.replace(snapshot, tensors=(torn, *snapshot.tensors[1:]))


def other_digest(snapshot: Snapshot) -> Snapshot:
    return dataclasses.replace(snapshot, digests=((1, "0" * 32),))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (incomplete, Reason.DIGEST_MISMATCH),
        (other_values, Reason.DIGEST_MISMATCH),
        (other_digest, Reason.DIGEST_MISMATCH),
        (other_bytes, Reason.CHECKSUM_MISMATCH),
    ],
)
async def test_a_half_that_is_not_what_its_digest_says_is_blamed_and_not_written(
    damage: Any, reason: Reason, folder: Folder
) -> None:
    keeper, _, fleet, a, b = await keeping(folder)
    keeper.begin(PARAMETERS, 0)
    fleet.accept(a, right(0))
    fleet.accept(b, damage(right(1)))
    with pytest.raises(WorkerBlamed) as blamed:
        await keeper.wait()
    assert (blamed.value.worker, blamed.value.error.reason) == (b.worker, reason)
    assert folder.written == []


async def test_a_worker_that_is_lost_meanwhile_ends_it(folder: Folder) -> None:
    keeper, _, fleet, a, b = await keeping(folder)
    keeper.begin(PARAMETERS, 0)
    fleet.accept(a, right(0))
    fleet.leave(b, "it was unplugged")
    with pytest.raises(WorkerLost, match="unplugged"):
        await keeper.wait()
    assert folder.written == []


@pytest.mark.parametrize("how", ["wait", "look"])
async def test_a_full_disk_is_told(how: str, folder: Folder) -> None:
    folder.error = ColaError(Reason.STORAGE_FULL, file="snapshots")
    keeper, _, fleet, a, b = await keeping(folder)
    keeper.begin(PARAMETERS, 0)
    fleet.accept(a, right(0))
    fleet.accept(b, right(1))
    with pytest.raises(ColaError) as refused:
        if how == "wait":
            await keeper.wait()
        while True:
            keeper.look()
            await asyncio.sleep(0.001)
    assert refused.value.reason == Reason.STORAGE_FULL
    assert not keeper.busy
    await keeper.close()


async def test_the_end_of_an_attempt_waits_for_what_is_being_written_and_for_nothing_else(folder: Folder) -> None:
    keeper, _, _, _, _ = await keeping(folder)
    keeper.begin(PARAMETERS, 0)
    await asyncio.wait_for(keeper.close(), 1)  # halves that may never come are not waited for

    keeper, _, fleet, a, b = await keeping(folder)
    folder.gate.clear()
    keeper.begin(PARAMETERS, 0)
    fleet.accept(a, right(0))
    fleet.accept(b, right(1))
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(keeper.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    folder.gate.set()
    await asyncio.wait_for(closing, 5)
    assert len(folder.written) == 1
