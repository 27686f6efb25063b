"""What a step costs the GPU host: CPU seconds of the whole server process against ordinary training, in one run.

    (a) the frozen model's forward and backward pass
    (b) PEFT LoRA with AdamW in one process
    (c) the whole server process, unmerged and merged: capture, encode and send included, a worker on the other core;
        with `exact` rows in fp32, as a job has them by itself, and with `all` rows in bf16

SmolLM2-135M in fp32, B4×T64 without padding, LoRA r=8 on all seven linears, one thread for each. They alternate in
rounds; the figures are medians over the rounds. CPU seconds are user and system time of the process.

    python -m benchmarks.server_step [--rounds 5] [--steps 10]
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.process import Child, cpu_seconds, on_core, pin
from benchmarks.record import write_record
from benchmarks.smollm2 import CACHE, LENGTH, RANK, SITES, Cache, filling_rows, lora
from cola_common.client import Client
from cola_common.jobs import StepMetrics
from cola_server.demo.smollm2 import converted
from tests.support.cluster import Cluster

PLACE = "seven"
BATCH = 4
WARMUP_STEPS = 3
EXACT = {"rows": "exact", "values": "fp32", "deltas": "fp32"}
ALL = {"rows": "all", "values": "bf16", "deltas": "fp32"}
SERVED = {
    "unmerged": ("unmerged", EXACT),
    "merged": ("merged", EXACT),
    "unmerged, all rows": ("unmerged", ALL),
    "merged, all rows": ("merged", ALL),
}
"""Fold and wire of a job."""


def server_round(
    client: Client, pid: int, file: str, steps: int, fold: str, wire: dict[str, str]
) -> tuple[float, StepMetrics]:
    """CPU seconds a step of the server process, over `steps` steps of a job after its first few; its last metrics."""
    job = client.fine_tuning.jobs.create(
        model="smollm2",
        training_file=file,
        adapter=lora(PLACE),
        hyperparameters={
            "max_steps": steps + WARMUP_STEPS,
            "batch_size": BATCH,
            "max_length": LENGTH,
            "shuffle": False,
            "learning_rate": 1e-4,
        },
        fold=fold,
        wire=wire,
    )
    began = ended = 0.0
    for event in client.fine_tuning.jobs.stream_events(job.id):
        if event.type == "metrics" and event.data["step"] == WARMUP_STEPS:
            began = cpu_seconds(pid)
        if event.type == "metrics" and event.data["step"] == WARMUP_STEPS + steps:
            ended = cpu_seconds(pid)
    done = client.fine_tuning.jobs.wait(job.id)
    assert done.status == "succeeded", done.error
    return (ended - began) / steps, client.fine_tuning.jobs.metrics(job.id)[-1]


def plain_rounds(path: str, rounds: int, steps: int) -> None:
    """The child process for (a) and (b): runs a round of each whenever a line comes in, and prints seconds a step."""
    import torch

    from benchmarks.ordinary import Frozen, Peft, tokens

    torch.set_num_threads(1)
    ids = tokens(BATCH, LENGTH)
    frozen, peft = Frozen(path), Peft(path, SITES[PLACE], RANK)

    def timed(step: Callable[[Any], None]) -> float:
        step(ids)
        began = time.process_time()
        for _ in range(steps):
            step(ids)
        return (time.process_time() - began) / steps

    for _ in range(WARMUP_STEPS):
        frozen.step(ids)
        peft.step(ids)
    print("ready", flush=True)
    for _ in range(rounds):
        sys.stdin.readline()
        print(json.dumps([timed(frozen.step), timed(peft.step)]), flush=True)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps of each in a round.")] = 10,
    cache: Cache = CACHE,
    plain: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run the benchmark and write its record."""
    path = converted(cache)
    if plain:
        plain_rounds(str(path), rounds, steps)
        return
    seconds: dict[str, list[float]] = {name: [] for name in ("frozen", "peft", *SERVED)}
    sent: dict[str, int] = {}
    shape = [f"--rounds={rounds}", f"--steps={steps}", f"--cache={cache}"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with (
            Cluster(scratch / "run", {"smollm2": path}, workers=0, flags=["--threads=1"]) as cluster,
            Child("benchmarks.server_step", ["--plain", *shape], scratch / "plain.log", on_core(0)) as ordinary,
            cluster.client() as client,
        ):
            server = cluster.server.process.pid
            pin(server, 0)
            pin(cluster.start_worker("worker", ["--threads=1"]).process.pid, 1)
            cluster.await_workers(1)
            assert ordinary.says() == "ready"
            file = client.files.create(file=("rows.jsonl", filling_rows(BATCH * 8)), purpose="fine-tune")
            for number in range(1, rounds + 1):
                frozen, peft = json.loads(ordinary.ask())
                seconds["frozen"].append(frozen)
                seconds["peft"].append(peft)
                for name, (fold, wire) in SERVED.items():
                    each, metrics = server_round(client, server, file.id, steps, fold, wire)
                    seconds[name].append(each)
                    sent[name] = metrics.sent_bytes
                latest = ", ".join(f"{name} {values[-1]:.3f}" for name, values in seconds.items())
                print(f"round {number}: {latest}", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        f"{name} / peft": statistics.median(a / b for a, b in zip(seconds[name], seconds["peft"], strict=True))
        for name in ("frozen", *SERVED)
    }
    for name, value in {**medians, **ratios}.items():
        print(f"{name:26} {value:.3f}")
    write_record(
        "server_step",
        {
            "what": __doc__.splitlines()[0],
            "shape": {"batch": BATCH, "length": LENGTH, "rank": RANK, "sites": SITES[PLACE]},
            "wire": {name: wire for name, (_, wire) in SERVED.items()},
            "cpu_seconds_a_step": seconds,
            "medians": medians,
            "ratios": ratios,
            "sent_bytes_a_step": sent,
            "targets": {"unmerged / peft": 1.05, "merged / peft": 1.0},
        },
    )


if __name__ == "__main__":
    typer.run(main)
