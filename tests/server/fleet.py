"""Workers and a job of two shards for the tests of `cola_server.fleet`, with messages made by hand."""

import asyncio
from collections.abc import Mapping, Sequence

import torch

from cola_common import ids
from cola_common.jobs import WirePlan
from cola_common.messages import (
    PROTOCOL,
    Calls,
    Capacity,
    Capture,
    Delta,
    EncodedTensor,
    Hello,
    OwnedShard,
    Part,
    Snapshot,
    ToWorker,
)
from cola_common.tensor import encode, encode_parameter, encoded_shape, nbytes
from cola_server.fleet import Attendance, DeltaForm, Exchange, Fleet, FleetLimits, Load
from tests.support.wires import wire

JOB = "ftjob-000000000000000000000000"
SITES = ["layers.0.q", "layers.0.k"]
SHAPES = [{"A": (2, 4), "B": (3, 2)}, {"A": (2, 4), "B": (3, 2)}]
LOAD = Load(parameter_bytes=1000, work=1e6, nbytes=1e5)
SMALL = FleetLimits(window_bytes=100, buffer_bytes=200)


def hello(
    worker: str | None = None,
    boot: int = 1,
    versions: tuple[int, int] = (PROTOCOL, PROTOCOL),
    owned: Sequence[OwnedShard] = (),
    codecs: Sequence[str] = ("fp32",),
    reductions: Sequence[str] = ("all",),
) -> Hello:
    return Hello(
        protocol_min=versions[0],
        protocol_max=versions[1],
        worker=worker or ids.new("wkr"),
        boot=boot,
        capacity=Capacity(cores=1, memory_bytes=1 << 30, device="cpu", gflops=1.0),
        codecs=tuple(codecs),
        owned=tuple(owned),
        reductions=tuple(reductions),
    )


def capture(nbytes: int, batch: int = 0, epoch: int = 1) -> Capture:
    tensor = EncodedTensor("fp32", (nbytes // 4,), 0, nbytes, 0, bytes(nbytes))
    return Capture(JOB, epoch, batch, (Part("g", 0, 0),), (tensor,))


def exchange_of(
    fleet: Fleet,
    owners: dict[int, str],
    *,
    clip: float = 0.0,
    epoch: int = 1,
    wires: Mapping[str, WirePlan] | None = None,
) -> Exchange:
    """All in fp32 without `wires`."""
    wires = wires or dict.fromkeys(owners.values(), wire())
    exchange = Exchange(
        job=JOB,
        epoch=epoch,
        owners=owners,
        outboxes=fleet.outboxes(set(owners.values())),
        wires=wires,
        sites=SITES,
        shapes=SHAPES,
        deltas=[
            {name: form(shape, wires[owners[i]].deltas) for name, shape in of_shard.items()}
            for i, of_shard in enumerate(SHAPES)
            if i in owners
        ],
        max_grad_norm=clip,
    )
    fleet.open(exchange, dict.fromkeys(exchange.workers, LOAD))
    return exchange


def form(shape: tuple[int, ...], codec: str) -> DeltaForm:
    """As the delta of a parameter of that shape comes."""
    written = encoded_shape(shape, codec)
    return DeltaForm(codec, written, nbytes(codec, written))


def delta(indices: list[int], *, step: int = 0, epoch: int = 1, codec: str = "fp32", square: float = 1.0) -> Delta:
    names = [(i, name) for i in indices for name in SHAPES[i]]
    tensors = [encode_parameter(torch.ones(SHAPES[i][name]), codec) for i, name in names]
    squares = tuple((i, square) for i in indices)
    return Delta(JOB, epoch, step, tuple(names), squares, "digest", 0.1, tuple(tensors))


def half(indices: list[int], *, step: int = 0, epoch: int = 1, kept: bool = True) -> Snapshot:
    """A worker's half of a snapshot, as AdamW's state is."""
    shapes = {
        (i, f"{name}.{entry}"): () if entry == "step" else shape
        for i in indices
        for name, shape in SHAPES[i].items()
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    tensors = tuple(encode(torch.ones(shape), "fp32") for shape in shapes.values())
    digests = tuple((i, f"digest {i}") for i in indices)
    return Snapshot(JOB, epoch, step, tuple(shapes), digests, kept, tensors)


def end_step(exchange: Exchange, indices: tuple[int, ...] = (0, 1)) -> None:
    exchange.end_batch(batch=0, batches=1, calls=[Calls(i, 1, 5) for i in indices])


async def sent(attendance: Attendance, kind: type[ToWorker]) -> ToWorker:
    while not isinstance(message := await asyncio.wait_for(attendance.outbox.next(), 1), kind):
        pass
    return message


async def attended(fleet: Fleet, count: int) -> list[Attendance]:
    return sorted((fleet.attend(hello())[0] for _ in range(count)), key=lambda a: a.worker)
