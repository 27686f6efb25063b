"""What an undisturbed job pays for its snapshots: the demo's job with and without them, in turns, in one run.

Two servers with two workers each, SmolLM2-135M, LoRA r=8 on q and v, AdamW, B4×T64, `bf16` values; one server takes
snapshots as it does by default, the other none. A round is a job of some steps on each. Wall seconds a step are those
between the records of the first and the last step, so that what happens between steps counts; CPU seconds are those of
server and workers together over the same steps. The figures are medians of the rounds' ratios.

    python -m benchmarks.snapshots [--rounds 6] [--steps 15]
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.process import cpu_seconds
from benchmarks.record import write_record
from benchmarks.smollm2 import CACHE, LENGTH, RANK, Cache, filling_rows, lora
from cola_common.client import Client
from cola_server.demo.smollm2 import converted
from tests.support.cluster import Cluster

BATCH = 4


def one_round(cluster: Cluster, client: Client, file: str, steps: int) -> tuple[float, float, int]:
    """Wall and CPU seconds a step, and the bytes a step moved."""
    job = client.fine_tuning.jobs.create(
        model="smollm2",
        training_file=file,
        adapter=lora("q, v"),
        hyperparameters={"max_steps": steps + 1, "batch_size": BATCH, "max_length": LENGTH},
        wire={"rows": "all", "values": "bf16"},
    )
    pids = [daemon.process.pid for daemon in (cluster.server, *cluster.workers)]
    began = ended = 0.0
    for event in client.fine_tuning.jobs.stream_events(job.id):
        if event.type == "metrics" and event.data["step"] == 1:
            began = sum(map(cpu_seconds, pids))
        if event.type == "metrics" and event.data["step"] == steps + 1:
            ended = sum(map(cpu_seconds, pids))
    done = client.fine_tuning.jobs.wait(job.id)
    assert done.status == "succeeded", done.error
    metrics = client.fine_tuning.jobs.metrics(job.id)
    wall = (metrics[-1].created_at - metrics[0].created_at) / steps
    return wall, (ended - began) / steps, metrics[-1].sent_bytes + metrics[-1].received_bytes


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of the two.")] = 6,
    steps: Annotated[int, typer.Option(help="Steps of each in a round.")] = 15,
    cache: Cache = CACHE,
) -> None:
    """Run the benchmark and write its record."""
    models = {"smollm2": converted(cache)}
    rows = filling_rows(BATCH * (steps + 1))
    figures: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    step_bytes = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        flags = {"with": [], "without": ["--snapshot-steps=0"]}
        with (
            Cluster(root / "with", models, workers=2, flags=["--split-jobs=2", *flags["with"]]) as one,
            Cluster(root / "without", models, workers=2, flags=["--split-jobs=2", *flags["without"]]) as other,
            one.client() as of_one,
            other.client() as of_other,
        ):
            sides = {"with": (one, of_one), "without": (other, of_other)}
            files = {
                name: client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
                for name, (_, client) in sides.items()
            }
            for number in range(rounds):
                order = list(sides) if number % 2 else list(reversed(sides))
                for name in order:
                    wall, cpu, step_bytes = one_round(*sides[name], files[name], steps)
                    figures[name].append((wall, cpu))
                latest = ", ".join(f"{name} {v[-1][0]:.3f} s, CPU {v[-1][1]:.3f} s" for name, v in figures.items())
                print(f"round {number + 1}: {latest}", flush=True)
    ratios = {
        kind: statistics.median(a[at] / b[at] for a, b in zip(figures["with"], figures["without"], strict=True))
        for at, kind in enumerate(("wall", "cpu"))
    }
    for name, value in ratios.items():
        print(f"with / without, {name}: {value:.4f}")
    write_record(
        "snapshots",
        {
            "what": __doc__.splitlines()[0],
            "shape": {"batch": BATCH, "length": LENGTH, "rank": RANK, "values": "bf16", "workers": 2},
            "step_bytes": step_bytes,
            "seconds_a_step": figures,
            "ratios": ratios,
        },
    )


if __name__ == "__main__":
    typer.run(main)
