"""A job over a slow link: wall time of a step against PEFT on the server's core alone, in one run.

The worker is in a network namespace behind a veth pair with `tc tbf` at both ends, 100 Mbit/s and 1 Gbit/s each way.
A relay in front of the link (`benchmarks.relay`) holds every byte back for 20 ms each way, 40 ms for a round trip: the
harder reading of "20 ms". What link and relay carry with that delay is measured first, without the server.

SmolLM2-135M in fp32, one job at a time, B16×T64 without padding, LoRA r=8, AdamW; server and PEFT have one and the same
core and a thread each, worker and relay the other core. Jobs and PEFT take turns, and a job is compared with PEFT just
before it and just after it. A job's step is from one step's end to the next one's, with all that happens in between.

    auto        the job names nothing: nothing may be lost
    auto 0.01   max_error=0.01
    all/fp32    every row in fp32, for comparison

Needs root, and `ip` and `tc` (Debian's iproute2).

    python -m benchmarks.link [--rounds 2] [--steps 10] [--rates 100,1000] [--modes "auto,auto 0.01,all/fp32"]
        [--sites "q, v"] [--batch 16] [--record link]
"""

import json
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.process import Child, cpu_seconds, on_core, pin
from benchmarks.record import write_record
from benchmarks.relay import CHUNK
from benchmarks.smollm2 import CACHE, LENGTH, RANK, SITES, Cache, filling_rows, lora
from cola_common.client import Client
from cola_common.rpc.addresses import split
from cola_server.demo.smollm2 import converted
from tests.support.cluster import Cluster, Daemon
from tests.support.netns import Link

MODES: dict[str, dict[str, Any] | None] = {
    "auto": None,
    "auto 0.01": {"max_error": 0.01},
    "all/fp32": {"rows": "all", "values": "fp32", "deltas": "fp32"},
}
DELAY_SECONDS = 0.02
"""Each way: the harder reading of 20 ms of delay."""
WARM_STEPS = 4
AIMS = {1000: 1.10, 100: 1.15}
"""A step of `auto` on q and v against PEFT's, by Mbit/s."""
PARTS = ("model", "reduce", "encode", "wire", "worker", "decode", "fold")


# --- what link and relay carry ----------------------------------------------------------------------------------------


def pump(address: str, size: int) -> None:
    """The child in the namespace: a byte there and back, `size` bytes from the peer, and as many to it."""
    with socket.create_connection(split(address)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.perf_counter()
        peer.sendall(b"?")
        assert peer.recv(1)
        trip = time.perf_counter() - began
        seconds = []
        for down in (True, False):
            began = time.perf_counter()
            if down:
                peer.sendall(b"?")
                missing = size
                while missing:
                    missing -= len(peer.recv(min(CHUNK, missing)))
            else:
                peer.sendall(bytes(size))
                assert peer.recv(1)
            seconds.append(time.perf_counter() - began - trip)
        print(json.dumps({"round_trip_seconds": trip, "down": size / seconds[0], "up": size / seconds[1]}), flush=True)


def carried(link: Link, rate: float, scratch: Path) -> dict[str, float]:
    """Seconds of a round trip, and Mbit/s each way, of the link with the relay in front of it."""
    size = round(rate / 8)  # what takes a second
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = "{}:{}".format(*listener.getsockname())

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                assert peer.recv(1)
                peer.sendall(b"!")
                assert peer.recv(1)
                peer.sendall(bytes(size))
                missing = size
                while missing:
                    missing -= len(peer.recv(min(CHUNK, missing)))
                peer.sendall(b"!")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with (
            relaying(link, target, rate, scratch) as (_, address),
            Child(
                "benchmarks.link",
                [f"--pump={address}", f"--size={size}"],
                scratch / "pump.log",
                [*link.command, *on_core(1)],
            ) as child,
        ):
            found = json.loads(child.says())
        thread.join(10)
    return {name: value if name == "round_trip_seconds" else value * 8 / 1e6 for name, value in found.items()}


@contextmanager
def relaying(link: Link, target: str, rate: float, scratch: Path) -> Iterator[tuple[int, str]]:
    """A relay of its own for so many bits a second: its process' id, and its address."""
    arguments = [link.outside, target, f"--rate={rate}", f"--delay={DELAY_SECONDS}"]
    with Child("benchmarks.relay", arguments, scratch / "relay.log", on_core(1)) as child:
        yield child.process.pid, child.says()


# --- jobs and PEFT ----------------------------------------------------------------------------------------------------


def plain(path: str, batch: int) -> None:
    """The child process: for each line, a number of steps, prints the median of seconds a step; with what sites that
    is, says the line before the number.
    """
    import torch

    from benchmarks.ordinary import Peft, tokens

    torch.set_num_threads(1)
    ids = tokens(batch, LENGTH)
    trained: dict[str, Peft] = {}
    for line in sys.stdin:
        sites, steps = json.loads(line)
        if sites not in trained:
            trained[sites] = Peft(path, SITES[sites], RANK)
            trained[sites].step(ids)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            trained[sites].step(ids)
            seconds.append(time.perf_counter() - began)
        print(statistics.median(seconds), flush=True)


def run_job(client: Client, file: str, sites: str, mode: str, batch: int, steps: int) -> dict[str, Any]:
    """A job's step, its parts, and what travelled: medians over the steps after the first few."""
    job = client.fine_tuning.jobs.create(
        model="smollm2",
        training_file=file,
        adapter=lora(sites),
        hyperparameters={
            "max_steps": steps + WARM_STEPS,
            "batch_size": batch,
            "max_length": LENGTH,
            "learning_rate": 1e-4,
        },
        wire=MODES[mode],
    )
    done = client.fine_tuning.jobs.wait(job.id)
    assert done.status == "succeeded", done.error
    assert done.wire_plan is not None
    metrics = client.fine_tuning.jobs.metrics(job.id)[WARM_STEPS - 1 :]
    assert all(each.tokens == batch * LENGTH for each in metrics)
    whole = [after.created_at - before.created_at for before, after in pairwise(metrics)]
    return {
        "step_seconds": statistics.median(whole),
        "each": [round(value, 3) for value in whole],
        "seconds": statistics.median(each.seconds for each in metrics),
        "parts": {part: statistics.median(getattr(each, f"{part}_seconds") for each in metrics) for part in PARTS},
        "sent_bytes": metrics[-1].sent_bytes,
        "received_bytes": metrics[-1].received_bytes,
        "epochs": done.epoch,
        "plan": done.wire_plan.model_dump(),
    }


class Bench:
    """Server and PEFT on one core; the worker is behind the link."""

    def __init__(self, cluster: Cluster, link: Link, ordinary: Child, batch: int, steps: int, plain_steps: int) -> None:
        self.cluster = cluster
        self.link = link
        self.ordinary = ordinary
        self.batch = batch
        self.steps = steps
        self.plain_steps = plain_steps
        self.rounds: dict[str, list[dict[str, Any]]] = {}
        self._workers = 0

    def peft(self, sites: str) -> float:
        return float(self.ordinary.ask(json.dumps([sites, self.plain_steps])))

    def at(self, rate: float, sites: list[str], modes: list[str], scratch: Path) -> None:
        """Jobs over the link as it is now, by a new worker: of it the server knows nothing from another rate."""
        self._workers += 1
        name = f"worker-{self._workers}"
        with relaying(self.link, self.cluster.address, rate * 1e6, scratch) as (pid, address):
            worker = Daemon(
                "cola_worker",
                [f"--server={address}", f"--data-dir={self.cluster.root / name}", "--insecure", "--threads=1"],
                self.cluster.root / f"{name}.log",
                before=[*self.link.command, *on_core(1)],
            )
            self.cluster.workers.append(worker)
            try:
                self.cluster.await_workers(1)
                with self.cluster.client() as client:
                    self._jobs(client, rate, sites, modes, pid)
            finally:
                worker.stop()
                self.cluster.workers.remove(worker)

    def _jobs(self, client: Client, rate: float, sites: list[str], modes: list[str], relay: int) -> None:
        file = client.files.create(file=("rows.jsonl", filling_rows(self.batch * 8)), purpose="fine-tune")
        for place in sites:
            before = self.peft(place)
            for mode in modes:
                busy, late = cpu_seconds(relay), self.cluster.server.waited_seconds()
                job = run_job(client, file.id, place, mode, self.batch, self.steps)
                busy, late = cpu_seconds(relay) - busy, self.cluster.server.waited_seconds() - late
                after = self.peft(place)
                peft = (before + after) / 2
                ratio = job["step_seconds"] / peft
                found = {
                    "ratio": ratio,
                    "peft": [before, after],
                    "relay_cpu_seconds": busy,
                    "server_without_a_core_seconds": late,
                    **job,
                }
                self.rounds.setdefault(f"{rate:g} Mbit/s, {place}, {mode}", []).append(found)
                plan = job["plan"]
                print(
                    f"{rate:g} Mbit/s, {place}, {mode}: {job['step_seconds']:.3f} s a step, PEFT {before:.3f} and "
                    f"{after:.3f}: {ratio:.3f}; {plan['rows']} {plan['values']}/{plan['deltas']}, "
                    f"{job['sent_bytes'] / 1e6:.2f} MB there, {job['received_bytes'] / 1e6:.2f} MB back, "
                    f"{', '.join(f'{part} {value:.3f}' for part, value in job['parts'].items())}; "
                    f"{late:.1f} s without a core",
                    flush=True,
                )
                before = after


def main(
    rounds: Annotated[int, typer.Option(help="Of all rates and modes.")] = 2,
    steps: Annotated[int, typer.Option(help="Of a job, after the first few.")] = 10,
    plain_steps: Annotated[int, typer.Option(help="Of PEFT between two jobs.")] = 4,
    rates: Annotated[str, typer.Option(help="Of the link, Mbit/s.")] = "100,1000",
    modes: Annotated[str, typer.Option(help=f"Of {', '.join(MODES)}.")] = ",".join(MODES),
    sites: Annotated[str, typer.Option(help=f"Of {'; '.join(SITES)}, separated by semicolons.")] = "q, v",
    batch: Annotated[int, typer.Option(help=f"Examples of {LENGTH} tokens.")] = 16,
    record: Annotated[str, typer.Option(help="What its record is called.")] = "link",
    cache: Cache = CACHE,
    plainly: Annotated[bool, typer.Option("--plain", hidden=True)] = False,
    pump_from: Annotated[str, typer.Option("--pump", hidden=True)] = "",
    size: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Run the benchmark and write its record."""
    if pump_from:
        pump(pump_from, size)
        return
    path = converted(cache)
    if plainly:
        plain(str(path), batch)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what is asked to end takes its namespace along
    numbers = [float(each) for each in rates.split(",")]
    carries: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, Link() as link:
        scratch = Path(folder)
        for rate in numbers:
            link.limit(rate * 1e6)
            found = carries[f"{rate:g} Mbit/s"] = carried(link, rate * 1e6, scratch)
            print(f"{rate:g} Mbit/s: {', '.join(f'{n} {v:.3f}' for n, v in found.items())}", flush=True)
        flags = [f"--cache={cache}", "--plain", f"--batch={batch}"]
        with (
            Cluster(scratch / "run", {"smollm2": path}, workers=0, flags=["--threads=1"]) as cluster,
            Child("benchmarks.link", flags, scratch / "plain.log", on_core(0)) as ordinary,
        ):
            pin(cluster.server.process.pid, 0)
            bench = Bench(cluster, link, ordinary, batch, steps, plain_steps)
            for _ in range(rounds):
                for rate in numbers:
                    link.limit(rate * 1e6)
                    bench.at(rate, sites.split(";"), modes.split(","), scratch)
    ratios = {case: statistics.median(each["ratio"] for each in found) for case, found in bench.rounds.items()}
    for case, ratio in ratios.items():
        print(f"{case}: {ratio:.3f} of PEFT")
    write_record(
        record,
        {
            "what": __doc__.splitlines()[0],
            "shape": {"batch": batch, "length": LENGTH, "rank": RANK, "steps": steps, "warm_steps": WARM_STEPS},
            "delay_seconds_each_way": DELAY_SECONDS,
            "link_and_relay": carries,
            "rounds": bench.rounds,
            "ratios_to_peft": ratios,
            "aims": {f"{rate} Mbit/s, q, v, auto": aim for rate, aim in AIMS.items()},
        },
    )


if __name__ == "__main__":
    typer.run(main)
