"""How deltas come: in the codec that each worker was assigned, and in no other."""

import asyncio
import dataclasses
import itertools

import pytest
import torch

from cola_common.errors import Reason
from cola_common.families import Lora
from cola_common.jobs import Codec
from cola_common.messages import Assign, OptimizerPlan, ShardPlan
from cola_common.tensor import CODECS, encode
from cola_server.fleet import Fleet, WorkerBlamed
from tests.server.fleet import SHAPES, SITES, SMALL, attended, delta, end_step, exchange_of, half, sent
from tests.support.wires import wire


@pytest.mark.parametrize("codec", CODECS)
async def test_a_delta_in_the_codec_that_was_assigned_completes_its_step(codec: Codec) -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker}, wires={a.worker: wire(deltas=codec)})
    end_step(exchange)
    sent_delta = delta([0, 1], codec=codec)
    fleet.accept(a, sent_delta)
    assert await asyncio.wait_for(exchange.deltas(), 1) == [sent_delta]


@pytest.mark.parametrize(("assigned", "sent_as"), list(itertools.permutations(CODECS, 2)))
async def test_a_delta_in_another_codec_than_was_assigned_is_blamed(assigned: Codec, sent_as: str) -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker}, wires={a.worker: wire(deltas=assigned)})
    end_step(exchange)
    fleet.accept(a, delta([0, 1], codec=sent_as))
    with pytest.raises(WorkerBlamed, match=f"{sent_as} .* instead of {assigned}") as blamed:
        await exchange.deltas()
    assert (blamed.value.worker, blamed.value.error.reason) == (a.worker, Reason.DELTA_MISMATCH)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("wrong", ["shape", "size"])
async def test_a_delta_of_another_shape_or_size_is_blamed_in_every_codec(codec: Codec, wrong: str) -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker}, wires={a.worker: wire(deltas=codec)})
    end_step(exchange)
    good = delta([0, 1], codec=codec)
    first = good.tensors[0]
    odd = {
        "shape": encode(torch.ones(4, 2), codec),  # A's is 2×4
        "size": dataclasses.replace(first, nbytes=first.nbytes + 1),
    }[wrong]
    fleet.accept(a, dataclasses.replace(good, tensors=(odd, *good.tensors[1:])))
    with pytest.raises(WorkerBlamed, match="shard 0, A") as blamed:
        await exchange.deltas()
    assert blamed.value.error.reason == Reason.DELTA_MISMATCH


async def test_a_matrix_that_lies_down_in_its_codec_is_blamed_where_it_stands() -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker}, wires={a.worker: wire(deltas="int8")})
    end_step(exchange)
    good = delta([0, 1], codec="int8")
    assert good.tensors[1].shape == (2, 3), "B is 3×2"
    standing = encode(torch.ones(3, 2), "int8")
    fleet.accept(a, dataclasses.replace(good, tensors=(good.tensors[0], standing, *good.tensors[2:])))
    with pytest.raises(WorkerBlamed, match=r"\(3, 2\) instead of int8 \(2, 3\)"):
        await exchange.deltas()


async def test_each_worker_is_assigned_what_travels_between_it_and_the_server() -> None:
    fleet = Fleet(SMALL)
    a, b = await attended(fleet, 2)
    wires = {a.worker: wire("all", "int8", "bf16"), b.worker: wire("exact", "fp16", "int4")}
    exchange = exchange_of(fleet, {0: a.worker, 1: b.worker}, wires=wires)
    plan = OptimizerPlan("sgd", 1e-3, 0.0, False, 0.0, 0.0, "constant", 0, 1)
    shards = [ShardPlan(i, SITES[i], Lora(2, 1.0), 4, 3, i) for i in (0, 1)]
    parameters = [{name: encode(torch.ones(shape), "fp32") for name, shape in of.items()} for of in SHAPES]
    exchange.assign(step=0, plan=plan, max_rows=5, shards=shards, parameters=parameters)
    for attendance, index in ((a, 0), (b, 1)):
        assign = await sent(attendance, Assign)
        assert isinstance(assign, Assign)
        assert (assign.values, assign.deltas) == (wires[attendance.worker].values, wires[attendance.worker].deltas)
        assert assign.shards == (shards[index],)
        assert {tensor.codec for tensor in assign.tensors} == {"fp32"}, "parameters lose nothing"
    end_step(exchange)
    fleet.accept(a, delta([0], codec="bf16"))
    fleet.accept(b, delta([1], codec="int4"))
    assert len(await asyncio.wait_for(exchange.deltas(), 1)) == 2


@pytest.mark.parametrize(("shape", "accepted"), [((2, 4), True), ((4, 2), False)])
async def test_a_half_of_a_snapshot_may_have_what_the_codec_has_not_let_through(
    shape: tuple[int, ...], accepted: bool
) -> None:
    fleet = Fleet(SMALL)
    (a,) = await attended(fleet, 1)
    exchange = exchange_of(fleet, {0: a.worker, 1: a.worker}, wires={a.worker: wire(deltas="int8")})
    exchange.request_snapshot()
    plain = half([0, 1])
    remainder = encode(torch.ones(shape), "fp32")
    said = dataclasses.replace(plain, names=(*plain.names, (0, "A.remainder")), tensors=(*plain.tensors, remainder))
    fleet.accept(a, said)
    if accepted:
        assert await asyncio.wait_for(exchange.snapshots(), 1) == [said]
    else:
        with pytest.raises(WorkerBlamed, match=r"A\.remainder"):
            await exchange.snapshots()
