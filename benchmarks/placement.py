"""A worker four times slower than another gets its share and no more: a job's step time against the best split.

Server and two workers as processes, each on one thread; a Llama of 8 layers, and `mlp` adapters, which are work for
workers. Both workers attend equally fast, and the server splits the job as it likes. After some steps one of them is
slowed down: stopped for three quarters of each tenth of a second, as `cpulimit` does. When the job has settled its step
time is measured; then, with the same workers, that of the same job with each number of its input groups on the slow
worker, from none to all: the exhaustive search, since the layers are alike.

    python -m benchmarks.placement [--steps 60] [--forced-steps 12]
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import write_record
from benchmarks.small import save_llama
from cola_common.client import Client
from cola_common.jobs import StepMetrics
from tests.support.cluster import Cluster
from tests.support.throttle import Throttle

TARGET = 1.25
TIMES = 4.0
LAYERS, WIDTH, HIDDEN, BATCH, LENGTH = 8, 256, 1024, 4, 32
BEFORE = 5  # steps until the worker slows down
SETTLED = 15  # of the job's last steps
WARM = 4  # steps of a forced split that do not count


class Server(Cluster):
    """Its placement can be told how many groups go to which worker."""

    server_module = "benchmarks.placement"


def forced(place: Any, file: Path) -> Any:
    """`place`, unless the file says: so many groups to that worker, the rest to the other."""

    def chosen(shards: Sequence[Any], *args: Any, **options: Any) -> Mapping[int, str] | None:
        if not file.exists():
            owners: Mapping[int, str] | None = place(shards, *args, **options)
            return owners
        wanted = json.loads(file.read_text())
        slow = sorted({s.group for s in shards})[: wanted["groups"]]
        return {s.index: wanted["slow" if s.group in slow else "fast"] for s in shards}

    return chosen


def serve() -> None:
    """`cola-server` with that."""
    from cola_server.cli import main as server
    from cola_server.training import owners

    (folder,) = (word.partition("=")[2] for word in sys.argv if word.startswith("--data-dir="))
    owners.place = forced(owners.place, Path(folder).parent / "split")
    server()


def submit(client: Client, file: str, steps: int) -> str:
    job = client.fine_tuning.jobs.create(
        model="small",
        training_file=file,
        adapter={"type": "mlp", "hidden_sizes": [HIDDEN], "target_modules": ["q_proj", "v_proj"]},
        hyperparameters={"max_steps": steps, "batch_size": BATCH, "max_length": LENGTH},
        wire={"rows": "all", "values": "bf16"},
    )
    return job.id


def groups(client: Client) -> dict[str, int]:
    """The input groups of each worker: q and v of a layer."""
    return {worker.id: worker.shards // 2 for worker in client.workers.list()}


def figures(metrics: Sequence[StepMetrics]) -> dict[str, float]:
    """Medians."""
    return {
        name: round(statistics.median(getattr(each, name) for each in metrics), 4)
        for name in ("seconds", "model_seconds", "worker_seconds", "wire_seconds", "fold_seconds")
    }


def chosen_split(cluster: Cluster, client: Client, file: str, steps: int) -> tuple[dict[str, Any], Throttle, str]:
    """The job as the server places it, with the worker that it slows down on its way; that stays slow."""
    names = ("a", "b")
    ids = {cluster.worker_id(name): name for name in names}
    job = submit(client, file, steps)
    while client.fine_tuning.jobs.retrieve(job).step < BEFORE:
        time.sleep(0.02)
    at_first = groups(client)
    slow = max(at_first, key=at_first.__getitem__)  # where the job is, if it is whole
    throttle = Throttle(cluster.workers[names.index(ids[slow])].process, TIMES).__enter__()
    course: list[tuple[int, int]] = []  # (step, groups on the slow worker)
    while not client.fine_tuning.jobs.retrieve(job).status.terminal:
        now = groups(client)
        if sum(now.values()) == LAYERS and (not course or course[-1][1] != now[slow]):
            course.append((client.fine_tuning.jobs.retrieve(job).step, now[slow]))
        time.sleep(0.05)
    metrics = client.fine_tuning.jobs.metrics(job)
    assert len(metrics) == steps, client.fine_tuning.jobs.retrieve(job).error
    return {"groups_on_the_slow_worker_from_step": course, **figures(metrics[-SETTLED:])}, throttle, slow


def main(
    steps: Annotated[int, typer.Option(help="Of the job that the server places.")] = 60,
    forced_steps: Annotated[int, typer.Option(help="Of each split that is tried.")] = 12,
) -> None:
    """Run the benchmark and write its record."""
    rows = "\n".join(json.dumps({"text": " ".join(f"w{(i + i * j) % 50}" for j in range(LENGTH))}) for i in range(64))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        models = {
            "small": save_llama(
                root / "small", layers=LAYERS, hidden=WIDTH, intermediate=WIDTH, heads=4, positions=2 * LENGTH
            )
        }
        with Server(root, models, workers=0, flags=["--threads=1", "--snapshot-steps=0"]) as cluster:
            for name in ("a", "b"):
                cluster.start_worker(name, ["--threads=1"])
            cluster.await_workers(2)
            with cluster.client() as client:
                file = client.files.create(file=("rows.jsonl", rows.encode()), purpose="fine-tune").id
                chosen, throttle, slow = chosen_split(cluster, client, file, steps)
                print(f"chosen: {chosen}", flush=True)
                try:
                    (fast,) = (worker.id for worker in client.workers.list() if worker.id != slow)
                    tried = []
                    for count in range(LAYERS + 1):
                        (root / "split").write_text(json.dumps({"slow": slow, "fast": fast, "groups": count}))
                        job = submit(client, file, forced_steps)
                        client.fine_tuning.jobs.wait(job)
                        tried.append(figures(client.fine_tuning.jobs.metrics(job)[WARM:]))
                        print(f"{count} groups of {LAYERS} on the slow worker: {tried[-1]}", flush=True)
                finally:
                    throttle.__exit__(None, None, None)
    best = min(tried, key=lambda each: each["seconds"])
    ratio = chosen["seconds"] / best["seconds"]
    print(f"chosen / best: {ratio:.3f}")
    write_record(
        "placement",
        {
            "what": __doc__.splitlines()[0],
            "shape": {"layers": LAYERS, "width": WIDTH, "mlp": HIDDEN, "batch": BATCH, "length": LENGTH},
            "slowed": f"SIGSTOP for {1 - 1 / TIMES:.0%} of each 0.1 s, after the worker has measured itself",
            "chosen": chosen,
            "by_groups_on_the_slow_worker": tried,
            "best_groups": tried.index(best),
            "ratio": round(ratio, 3),
            "target_ratio": TARGET,
        },
    )


if __name__ == "__main__":
    if any(word.startswith("--data-dir=") for word in sys.argv):
        serve()
    else:
        typer.run(main)
