"""How long the model waits for workers: its thread's idle share by the number of cohorts, with workers that are late.

Server and two workers as processes, a thread each; a Llama of 4 layers, hidden size 512, fp32. Two jobs of one example
of 64 tokens make a cohort: LoRA r=8 on q and v, AdamW, clipping, `bf16` values. Every delta is on its way for as long
as a pass of a whole cohort takes, which each round measures first; the way keeps no other delta waiting. The idle share
is waiting / (busy + waiting) of the time in which all jobs run, as the server reports it.

    python -m benchmarks.idle [--cohorts 1,2,3,4,6] [--seconds 20] [--rounds 3]
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import write_record
from benchmarks.small import save_llama
from cola_common.client import Client
from tests.support.cluster import Cluster

AIM, ENOUGH = 0.05, 3
"""The idle share, from so many cohorts on."""
LAYERS, HIDDEN, RANK, LENGTH, JOBS = 4, 512, 8, 64, 2
TARGETS = ["q_proj", "v_proj"]
WORKERS = ("a", "b")
WARM = 3


def submit(client: Client, number: int, batch: int = 1) -> str:
    rows = "\n".join(
        json.dumps({"text": " ".join(f"w{(number + i * j) % 50}" for j in range(LENGTH))}) for i in range(64)
    )
    file = client.files.create(file=(f"{number}.jsonl", rows.encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="small",
        training_file=file.id,
        adapter={"type": "lora", "r": RANK, "target_modules": TARGETS},
        hyperparameters={"max_length": LENGTH, "batch_size": batch, "max_steps": 1_000_000},
        wire={"rows": "all", "values": "bf16"},
    )
    return job.id


def until_steps(client: Client, jobs: list[str], count: int) -> None:
    """Waits for so many more steps of every job."""
    wanted = {job: client.fine_tuning.jobs.retrieve(job).step + count for job in jobs}
    while any(client.fine_tuning.jobs.retrieve(job).step < step for job, step in wanted.items()):
        time.sleep(0.2)


def pass_seconds(client: Client) -> float:
    """What a whole cohort's pass takes: that of one job which is as large, and has the model to itself."""
    job = submit(client, 0, batch=JOBS)
    until_steps(client, [job], 20)
    client.fine_tuning.jobs.cancel(job)
    metrics = client.fine_tuning.jobs.metrics(job)[WARM:]
    return statistics.median(each.model_seconds + each.encode_seconds for each in metrics)


def watch(cluster: Cluster, client: Client, cohorts: int, seconds: float) -> dict[str, Any]:
    """So many cohorts' jobs at once, watched for so long once all have made some steps."""
    jobs = [submit(client, number) for number in range(cohorts * JOBS)]
    until_steps(client, jobs, WARM)
    (before,) = client.models.list()
    starved, began = cluster.server.waited_seconds(), time.time()
    time.sleep(seconds)
    (after,) = client.models.list()
    starved = cluster.server.waited_seconds() - starved
    for job in jobs:
        client.fine_tuning.jobs.cancel(job)
    steps = [m for job in jobs for m in client.fine_tuning.jobs.metrics(job) if began <= m.created_at <= time.time()]
    busy, waiting = after.busy_seconds - before.busy_seconds, after.waiting_seconds - before.waiting_seconds
    assert after.jobless_seconds == before.jobless_seconds
    return {
        "idle": round(waiting / (busy + waiting), 4),
        "busy_seconds": round(busy, 2),
        "waiting_seconds": round(waiting, 2),
        "server_without_a_core_seconds": round(starved, 2),
        "steps": len(steps),
        "passes_seconds": round(sum(each.model_seconds + each.encode_seconds for each in steps), 2),
        "medians": {
            name: round(statistics.median(getattr(each, name) for each in steps), 4)
            for name in ("seconds", "model_seconds", "encode_seconds", "wire_seconds", "worker_seconds", "fold_seconds")
        },
    }


def main(
    cohorts: Annotated[str, typer.Option(help="Numbers of cohorts.")] = "1,2,3,4,6",
    seconds: Annotated[float, typer.Option(help="For which each is watched.")] = 20.0,
    rounds: Annotated[int, typer.Option(help="Of all of them.")] = 3,
) -> None:
    """Run the benchmark and write its record."""
    counts = [int(count) for count in cohorts.split(",")]
    watched: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    late: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        flags = ["--threads=1", f"--cohort-tokens={JOBS * LENGTH}", f"--max-running-jobs={max(counts) * JOBS}"]
        with Cluster(
            root / "run",
            {
                "small": save_llama(
                    root / "small", layers=LAYERS, hidden=HIDDEN, intermediate=2 * HIDDEN, heads=8, positions=2 * LENGTH
                )
            },
            workers=0,
            flags=flags,
        ) as cluster:
            for name in WORKERS:
                cluster.start_worker(name, ["--threads=1"], faulty=True)
            cluster.await_workers(len(WORKERS))
            with cluster.client() as client:
                for _ in range(rounds):
                    for name in WORKERS:
                        cluster.misbehave(name, "")
                    late.append(pass_seconds(client))
                    print(f"a cohort's pass: {late[-1] * 1000:.1f} ms", flush=True)
                    for name in WORKERS:
                        cluster.misbehave(name, f"far={late[-1]}")
                    for count in counts:
                        watched[count].append(watch(cluster, client, count, seconds))
                        print(f"{count} cohorts: {watched[count][-1]}", flush=True)
    idle = {count: statistics.median(each["idle"] for each in of) for count, of in watched.items()}
    for count, share in idle.items():
        print(f"{count} cohorts: idle {share:.1%}")
    write_record(
        "idle",
        {
            "what": __doc__.splitlines()[0],
            "shape": {"layers": LAYERS, "hidden": HIDDEN, "rank": RANK, "sites": TARGETS, "length": LENGTH, "batch": 1,
                      "jobs_of_a_cohort": JOBS},
            "pass_and_late_seconds": late,
            "rounds": watched,
            "idle": idle,
            "aim": {"idle": AIM, "from_cohorts": ENOUGH},
        },
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
