"""How soon 1,000 workers are back after their server was killed and started again, and what they cost it in memory.

A real server with a tiny model, and workers that are real gRPC streams, each on a connection of its own, which greet,
send heartbeats and wait before they come again as `cola-worker` does, without torch: many to a process. All attend; the
server is killed and started again on the same port; each worker tells when it got its Welcome. Several rounds. Server
and workers share the machine.

    python -m benchmarks.reconnect [--workers 1000] [--rounds 3]
"""

import asyncio
import itertools
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import grpc
import typer

from benchmarks.record import write_record
from cola_common import ids
from cola_common.messages import PROTOCOL, Capacity, Heartbeat, Hello, OwnedShard, ToServer, ToWorker, Welcome
from cola_common.rpc.duplex import Duplex, StreamEnded
from cola_common.rpc.fleet import attend
from cola_common.rpc.limits import CHANNEL_OPTIONS
from cola_worker.backoff import wait_seconds

PROCESSES = 2
OWNED = 14  # shards on each worker's disk: two at each of seven sites
PATIENCE_SECONDS = 60.0
FILES = 256  # descriptors that the server may have at first, as on small systems: it must ask for more by itself
SETTLE_SECONDS = 5.0  # two heartbeats of everyone
TARGET_SECONDS = 5.0
TARGET_MIB = 150.0

# --- the workers' processes -------------------------------------------------------------------------------------------


class Simulated:
    """One worker. Prints its number and the time whenever it is let in."""

    def __init__(self, address: str, number: int) -> None:
        self._address = address
        self._number = number
        owned = tuple(OwnedShard(ids.new("ftjob"), f"model.layers.{i}", 1, "0" * 32) for i in range(OWNED))
        capacity = Capacity(cores=1, memory_bytes=1 << 30, device="cpu", gflops=1.0)
        self._hello = Hello(PROTOCOL, PROTOCOL, ids.new("wkr"), time.time_ns(), capacity, ("fp32",), owned)

    async def live(self) -> None:
        failures = 0
        while True:
            failures = 0 if await self._attend() else failures + 1
            await asyncio.sleep(wait_seconds(failures))

    async def _attend(self) -> bool:
        # In one process, channels to one address would share a connection.
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        beating, welcomed = None, False
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            stream = attend(channel)
            try:
                await stream.send(self._hello)
                welcome = await stream.receive()
                assert isinstance(welcome, Welcome)
                welcomed = True
                print(self._number, time.monotonic(), flush=True)
                beating = asyncio.create_task(_beat(stream, welcome.heartbeat_seconds))
                while True:
                    await stream.receive()
            except StreamEnded:
                return welcomed
            finally:
                if beating is not None:
                    beating.cancel()
                    await asyncio.gather(beating, return_exceptions=True)


async def _beat(stream: Duplex[ToServer, ToWorker], seconds: float) -> None:
    while True:
        await stream.send(Heartbeat(0, 0.0))
        await asyncio.sleep(seconds)


async def simulate(address: str, numbers: range) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in numbers:
            tasks.create_task(Simulated(address, number).live())


# --- the server's process ---------------------------------------------------------------------------------------------


class Server:
    """`cola-server` with one tiny model. Notes when it said that it listens, and that it serves."""

    def __init__(self, root: Path, listen: str) -> None:
        model, data = root / "model", root / "data"
        (data / "address").unlink(missing_ok=True)
        flags = [f"--model=tiny={model}", f"--listen={listen}", f"--data-dir={data}", "--device=cpu", "--threads=1"]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cola_server", *flags, "--log-format=json"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: dict[str, float] = {}
        self._serving = threading.Event()
        self._lines: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._serving.wait(PATIENCE_SECONDS) and "serving" in self.said, "".join(self._lines[-20:])
        self.address = (data / "address").read_text()

    def mib(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) / 1024

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)
            if line.startswith("{") and (event := json.loads(line)["event"]) in ("listening", "serving"):
                self.said[event] = time.monotonic()
                if event == "serving":
                    self._serving.set()
        self._serving.set()


# --- the measurement --------------------------------------------------------------------------------------------------


class Workers:
    """All simulated workers, and their welcomes."""

    def __init__(self, address: str, count: int) -> None:
        self._count = count
        self._welcomes: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        bounds = [count * part // PROCESSES for part in range(PROCESSES + 1)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.reconnect", f"--simulate={address},{low},{high}"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for low, high in itertools.pairwise(bounds)
        ]
        for process in self.processes:
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def welcomed(self) -> list[float]:
        """Waits until each worker was let in since the last call. Returns: when each was, in order."""
        at: dict[int, float] = {}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(at) < self._count:
            try:
                number, moment = self._welcomes.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{len(at)} of {self._count} workers attend") from None
            at[number] = moment
        return sorted(at.values())

    def again(self) -> int:
        """How many were let in beyond that: whose stream broke once more."""
        return self._welcomes.qsize()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            number, moment = line.split()
            self._welcomes.put((int(number), float(moment)))


def measure(root: Path, count: int, rounds: int) -> dict[str, object]:
    server = Server(root, "127.0.0.1:0")
    workers = None
    try:
        time.sleep(1)
        before = server.mib()
        workers = Workers(server.address, count)
        workers.welcomed()
        time.sleep(SETTLE_SECONDS)
        with_all = server.mib()
        results = []
        for number in range(rounds):
            assert workers.again() == 0, "a stream broke while nothing was wrong"
            server.kill()
            server = Server(root, server.address)
            back = workers.welcomed()
            listening, serving = server.said["listening"], server.said["serving"]
            results.append(
                {
                    "start_to_listening": listening - server.began,
                    "start_to_serving": serving - server.began,
                    "listening_to_half": back[count // 2] - listening,
                    "listening_to_all": back[-1] - listening,
                    "serving_to_all": back[-1] - serving,
                }
            )
            print(f"round {number + 1}: {_rounded(results[-1])}", flush=True)
            time.sleep(SETTLE_SECONDS)
    finally:
        for process in workers.processes if workers is not None else ():
            process.terminate()
            process.wait()
        server.process.terminate()
        server.process.wait()
    worst = {f"worst_{key}": max(result[key] for result in results) for key in ("listening_to_all", "serving_to_all")}
    memory = {"before": before, "with_all": with_all, "added": with_all - before}
    print(_rounded(worst), _rounded(memory))
    return {"seconds": [_rounded(result) for result in results], **_rounded(worst), "server_mib": _rounded(memory)}


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 2) for key, value in figures.items()}


def main(
    workers: Annotated[int, typer.Option(help="Simulated workers.")] = 1000,
    rounds: Annotated[int, typer.Option(help="How often the server is killed.")] = 3,
    simulate_: Annotated[str, typer.Option("--simulate", hidden=True)] = "",
) -> None:
    """Run the benchmark and write its record."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files if simulate_ else FILES, most_files))
    if simulate_:
        address, low, high = simulate_.split(",")
        asyncio.run(simulate(address, range(int(low), int(high))))
        return
    from tests.support.models import save_tiny

    with tempfile.TemporaryDirectory() as scratch:
        save_tiny("llama", Path(scratch) / "model")
        results = measure(Path(scratch), workers, rounds)
    write_record(
        "reconnect",
        {
            "what": __doc__.splitlines()[0],
            "workers": workers,
            "target": {"seconds": TARGET_SECONDS, "added_mib": TARGET_MIB},
            **results,
        },
    )


if __name__ == "__main__":
    typer.run(main)
