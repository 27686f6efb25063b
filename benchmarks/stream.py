"""Captures through the project's stream and decoder, against bare grpc.aio that moves the same bytes.

Two processes on one machine: the server sends, the worker receives and decodes on a thread of its own, as the real one
does. Each round measures both ways, one after the other, so that what slows the machine slows both; the result is the
median of the rounds' ratios. Run it with `python benchmarks/stream.py`; it writes a dated record to benchmarks/records.
"""

import asyncio
import json
import multiprocessing
import os
import platform
import queue
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch

from cola_common.messages import Capture, Credit, Part, ToServer, ToWorker
from cola_common.rpc import malloc
from cola_common.rpc.channels import connect
from cola_common.rpc.duplex import Duplex
from cola_common.rpc.fleet import Context, add_fleet, attend
from cola_common.rpc.limits import CHUNK_BYTES, SERVER_OPTIONS
from cola_common.tensor import decode, encode

RECORDS = Path(__file__).parent / "records"
TARGET = 0.8

ROUNDS = 15
ROUND_BYTES = 512 << 20
CODEC = "bf16"
# Bytes of one tensor, x or g, and how many of them make a capture.
SHAPES = {"packed small sites": (32 << 10, 8), "1 MiB": (512 << 10, 2), "16 MiB": (8 << 20, 2)}
WIDTH = 512


def captures(tensor_bytes: int, tensors: int) -> list[Capture]:
    """A round's captures; a few tensors are sent again and again, too many for the cache."""
    rows = tensor_bytes // 2 // WIDTH
    capture_bytes = tensor_bytes * tensors
    distinct = max(2, (64 << 20) // capture_bytes)
    parts = tuple(Part("xg"[index % 2], index, 0) for index in range(tensors))
    made = [
        Capture("job", 1, batch, parts, tuple(encode(torch.randn(rows, WIDTH), CODEC) for _ in parts))
        for batch in range(distinct)
    ]
    return [made[number % distinct] for number in range(ROUND_BYTES // capture_bytes)]


# --- the worker's process -------------------------------------------------------------------------------------------


def worker(address: str, orders: Connection) -> None:
    """Receives a round at a time, each in the way that the server orders."""
    malloc.tune()
    torch.set_num_threads(1)

    async def main() -> None:
        async with connect(address) as channel:
            loop = asyncio.get_running_loop()
            while (order := await loop.run_in_executor(None, orders.recv)) is not None:
                await (receive_bare(channel) if order == "bare" else receive_captures(channel))

    asyncio.run(main())


async def receive_bare(channel: grpc.aio.Channel) -> None:
    call: Any = channel.stream_stream("/bare/Attend")()
    await call.write(b"ready")
    missing = ROUND_BYTES
    while missing:
        missing -= len(await call.read())
    await call.write(b"done")
    await call.done_writing()
    await call.read()


async def receive_captures(channel: grpc.aio.Channel) -> None:
    duplex = attend(channel)
    await duplex.send(Credit("job", 1, 0, 0))
    loop = asyncio.get_running_loop()
    received: queue.SimpleQueue[Capture | None] = queue.SimpleQueue()
    room = asyncio.Semaphore(4)  # captures that wait for the decoder: the window of the real stream

    def decoder() -> None:
        while (capture := received.get()) is not None:
            for tensor in capture.tensors:
                decode(tensor)
            loop.call_soon_threadsafe(room.release)

    thread = threading.Thread(target=decoder)
    thread.start()
    missing = ROUND_BYTES
    while missing:
        await room.acquire()
        capture = await duplex.receive()
        assert isinstance(capture, Capture)
        received.put(capture)
        missing -= sum(tensor.nbytes for tensor in capture.tensors)
    received.put(None)
    await loop.run_in_executor(None, thread.join)
    await duplex.send(Credit("job", 1, 0, ROUND_BYTES))
    await duplex.goodbye("done")


# --- the server's process -------------------------------------------------------------------------------------------


class Rounds:
    """Sends rounds and notes how long each took, from the first byte's sending until the worker said that it has all."""

    def __init__(self) -> None:
        self.captures: list[Capture] = []
        self.seconds: asyncio.Queue[float] = asyncio.Queue()

    async def bare(self, _requests: Any, context: Context) -> None:
        chunk = bytes(CHUNK_BYTES)
        await context.read()
        start = time.perf_counter()
        for _ in range(ROUND_BYTES // CHUNK_BYTES):
            await context.write(chunk)
        await context.read()
        self.seconds.put_nowait(time.perf_counter() - start)

    async def ours(self, duplex: Duplex[ToWorker, ToServer], _context: Context) -> None:
        await duplex.receive()
        start = time.perf_counter()
        for capture in self.captures:
            await duplex.send(capture)
        await duplex.receive()
        self.seconds.put_nowait(time.perf_counter() - start)


@asynccontextmanager
async def serving(rounds: Rounds) -> AsyncIterator[str]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_fleet(server, rounds.ours)
    handler: Any = grpc.stream_stream_rpc_method_handler(rounds.bare)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Attend": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(1)


async def measure() -> dict[str, dict[str, float]]:
    """For each shape: the medians of MB/s both ways, and of the rounds' ratios."""
    rounds = Rounds()
    results: dict[str, dict[str, float]] = {}
    orders, far_end = multiprocessing.Pipe()
    async with serving(rounds) as address:
        process = multiprocessing.get_context("spawn").Process(target=worker, args=(address, far_end))
        process.start()
        for name, shape in SHAPES.items():
            rounds.captures = captures(*shape)
            speeds: dict[str, list[float]] = {"bare": [], "captures": []}
            for _ in range(ROUNDS + 1):
                for way, measured in speeds.items():
                    orders.send(way)
                    measured.append(ROUND_BYTES / await rounds.seconds.get() / 1e6)
            pairs = list(zip(*speeds.values(), strict=True))[1:]  # the first warms up
            results[name] = {
                "bare_mb_per_second": round(statistics.median(bare for bare, _ in pairs)),
                "captures_mb_per_second": round(statistics.median(ours for _, ours in pairs)),
                "ratio": round(statistics.median(ours / bare for bare, ours in pairs), 3),
            }
            print(f"{name}: {results[name]}", flush=True)
        orders.send(None)
        await asyncio.to_thread(process.join)
    return results


def machine() -> dict[str, str | int | None]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("grpcio", "protobuf", "torch", "xxhash")},
    }


def main() -> int:
    """Returns 1 where a ratio misses the target."""
    malloc.tune()
    torch.manual_seed(0)
    results = asyncio.run(measure())
    record = {
        "benchmark": "stream",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": {"rounds": ROUNDS, "round_bytes": ROUND_BYTES, "codec": CODEC, "chunk_bytes": CHUNK_BYTES},
        "target_ratio": TARGET,
        "results": results,
    }
    path = RECORDS / f"stream-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)
    return 0 if all(result["ratio"] >= TARGET for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
