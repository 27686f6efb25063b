"""Captures through the project's stream, and through its stream and decoder, against bare grpc.aio that moves the same
bytes, looks at none of them, and has gRPC's own options. Both have malloc tuned.

Two processes on one machine: the server sends, the worker receives and decodes on a thread of its own, as the real one
does. Each round measures all ways, one after the other, so that what slows the machine slows all; the result is the
median of the rounds' ratios. Run it with `python benchmarks/stream.py`; it writes a dated record to benchmarks/records.
"""

import asyncio
import multiprocessing
import queue
import statistics
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from operator import truediv
from typing import Any

import grpc
import torch

from benchmarks.record import write_record
from cola_common.messages import Capture, Credit, EncodedTensor, Part, ToServer, ToWorker
from cola_common.rpc import malloc
from cola_common.rpc.channels import connect
from cola_common.rpc.duplex import Duplex
from cola_common.rpc.fleet import Context, add_fleet, attend
from cola_common.rpc.limits import CHUNK_BYTES, SERVER_OPTIONS
from cola_common.tensor import decode, encode

TARGET = 0.8  # of `decoded`

WAYS = ("bare", "stream", "decoded")
ROUNDS = 15
REPEATS = 8  # a round sends its bytes, more than caches hold, as often as this
CODEC = "bf16"
FRAME_BYTES = CHUNK_BYTES  # as the server packs: small tensors share a capture that is no longer than a chunk
# For each case: rows of a batch, layers that are told apart, and the widths of a layer's x and g in the order of the
# backward pass.
CASES = {
    "SmolLM2-135M, all linears, 512 rows": (
        512, 8, (1536, 576, 576, 1536, 1536, 576, 576, 576, 576, 192, 192),
    ),
    "d=4096, q and v, 2048 rows": (2048, 2, (4096, 4096, 4096)),
}  # fmt: skip


def captures(rows: int, layers: int, widths: tuple[int, ...]) -> list[Capture]:
    """A round's captures, without its repeats."""
    made: list[Capture] = []
    frame: list[EncodedTensor] = []
    for width in widths * layers:
        tensor = encode(torch.randn(rows, width), CODEC)
        if frame and sum(t.nbytes for t in frame) + tensor.nbytes > FRAME_BYTES:
            made.append(Capture("job", 1, 0, (Part("g", 0, 0),) * len(frame), tuple(frame)))
            frame = []
        frame.append(tensor)
    return [*made, Capture("job", 1, 0, (Part("g", 0, 0),) * len(frame), tuple(frame))]


def chunks(captures: list[Capture]) -> list[bytes]:
    """The same bytes as bare gRPC's messages."""
    joined = b"".join(tensor.data for capture in captures for tensor in capture.tensors)
    return [joined[start : start + CHUNK_BYTES] for start in range(0, len(joined), CHUNK_BYTES)]


# --- the worker's process -------------------------------------------------------------------------------------------


def worker(address: str, bare_address: str, orders: Connection) -> None:
    """Receives a round at a time, each in the way that the server orders."""
    malloc.tune()
    torch.set_num_threads(1)

    async def main() -> None:
        async with connect(address) as channel, grpc.aio.insecure_channel(bare_address) as bare_channel:
            loop = asyncio.get_running_loop()
            while (order := await loop.run_in_executor(None, orders.recv)) is not None:
                way, size = order
                if way == "bare":
                    await receive_bare(bare_channel, size)
                else:
                    await receive_captures(channel, size, decoding=way == "decoded")

    asyncio.run(main())


async def receive_bare(channel: grpc.aio.Channel, missing: int) -> None:
    call: Any = channel.stream_stream("/bare/Attend")()
    await call.write(b"ready")
    while missing:
        missing -= len(await call.read())
    await call.write(b"done")
    await call.done_writing()
    await call.read()


async def receive_captures(channel: grpc.aio.Channel, missing: int, *, decoding: bool) -> None:
    duplex = attend(channel)
    await duplex.send(Credit("job", 1, 0, 0, 0.0))
    loop = asyncio.get_running_loop()
    received: queue.SimpleQueue[Capture | None] = queue.SimpleQueue()
    room = asyncio.Semaphore(4)  # captures that wait for the decoder: the window of the real stream

    def decoder() -> None:
        while (capture := received.get()) is not None:
            for tensor in capture.tensors if decoding else ():
                decode(tensor)
            loop.call_soon_threadsafe(room.release)

    thread = threading.Thread(target=decoder)
    thread.start()
    while missing:
        await room.acquire()
        capture = await duplex.receive()
        assert isinstance(capture, Capture)
        received.put(capture)
        missing -= sum(tensor.nbytes for tensor in capture.tensors)
    received.put(None)
    await loop.run_in_executor(None, thread.join)
    await duplex.send(Credit("job", 1, 0, 0, 0.0))
    await duplex.goodbye("done")


# --- the server's process -------------------------------------------------------------------------------------------


class Rounds:
    """Sends rounds and notes how long each took, from the first write until the worker says that it has all."""

    def __init__(self) -> None:
        self.captures: list[Capture] = []
        self.chunks: list[bytes] = []
        self.seconds: asyncio.Queue[float] = asyncio.Queue()

    async def bare(self, _requests: Any, context: Context) -> None:
        await context.read()
        start = time.perf_counter()
        for chunk in self.chunks * REPEATS:
            await context.write(chunk)
        await context.read()
        self.seconds.put_nowait(time.perf_counter() - start)

    async def ours(self, duplex: Duplex[ToWorker, ToServer], _context: Context) -> None:
        await duplex.receive()
        start = time.perf_counter()
        for capture in self.captures * REPEATS:
            await duplex.send(capture)
        await duplex.receive()
        self.seconds.put_nowait(time.perf_counter() - start)


@asynccontextmanager
async def serving(server: grpc.aio.Server) -> AsyncIterator[str]:
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(1)


def servers(rounds: Rounds) -> tuple[grpc.aio.Server, grpc.aio.Server]:
    """The project's server, and a bare one."""
    ours, bare = grpc.aio.server(options=SERVER_OPTIONS), grpc.aio.server()
    add_fleet(ours, rounds.ours)
    handler: Any = grpc.stream_stream_rpc_method_handler(rounds.bare)
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Attend": handler}),))
    return ours, bare


async def measure() -> dict[str, dict[str, float]]:
    """For each case: the medians of MB/s, and of the rounds' ratios to bare."""
    rounds = Rounds()
    results: dict[str, dict[str, float]] = {}
    orders, far_end = multiprocessing.Pipe()
    ours, bare = servers(rounds)
    async with serving(ours) as address, serving(bare) as bare_address:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=worker, args=(address, bare_address, far_end))
        process.start()
        for name, case in CASES.items():
            rounds.captures = captures(*case)
            rounds.chunks = chunks(rounds.captures)
            size = REPEATS * sum(map(len, rounds.chunks))
            speeds: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(ROUNDS + 1):
                for way in WAYS:
                    orders.send((way, size))
                    speeds[way].append(size / await rounds.seconds.get() / 1e6)
            warm = {way: measured[1:] for way, measured in speeds.items()}
            results[name] = {
                f"{way}_mb_per_second": round(statistics.median(measured)) for way, measured in warm.items()
            } | {f"{way}_ratio": round(statistics.median(map(truediv, warm[way], warm["bare"])), 3) for way in WAYS[1:]}
            print(f"{name}: {results[name]}", flush=True)
        orders.send(None)
        await asyncio.to_thread(process.join)
    return results


def main() -> None:
    malloc.tune()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as the worker, and no threads that spin beside what is measured
    results = asyncio.run(measure())
    settings = {"rounds": ROUNDS, "codec": CODEC, "frame_bytes": FRAME_BYTES, "chunk_bytes": CHUNK_BYTES}
    write_record("stream", {"settings": settings, "target_ratio": TARGET, "results": results})


if __name__ == "__main__":
    main()
