"""What reducing and encoding take of the server's step, at 1,024 rows of SmolLM2-135M.

Server on one core, worker on the other, a thread each; fp32, B16×T64 without padding, LoRA r=8 on q and v, and on seven
linears; jobs one after another, in rounds. The share is (reduce + encode) / (model + reduce + encode + fold) of each
step as its metrics tell it; the figures are medians over the steps of all rounds, after the first few of each job.
`exact` in fp32 and in bf16, and `sketch` 64 in int8 and `all` rows in bf16 for comparison.

    python -m benchmarks.reduce_cost [--rounds 2] [--steps 8] [--batch 16] [--sites "q, v;seven"]
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.process import pin
from benchmarks.record import write_record
from benchmarks.smollm2 import CACHE, LENGTH, RANK, SITES, Cache, filling_rows, lora
from cola_common.client import Client
from cola_common.jobs import StepMetrics
from cola_server.demo.smollm2 import converted
from tests.support.cluster import Cluster

WIRES: dict[str, dict[str, Any]] = {
    "exact/fp32": {"rows": "exact", "values": "fp32", "deltas": "fp32"},
    "exact/bf16": {"rows": "exact", "values": "bf16", "deltas": "bf16"},
    "sketch 64/int8": {"rows": "sketch", "sketch_rows": 64, "values": "int8", "deltas": "int8"},
    "all/bf16": {"rows": "all", "values": "bf16", "deltas": "bf16"},
}
WARM_STEPS = 3
AIMS = {"q, v": 0.02, "seven": 0.06}
"""The share with `exact`."""
PARTS = ("model", "reduce", "encode", "fold")


def job_steps(client: Client, file: str, sites: str, wire: str, batch: int, steps: int) -> list[StepMetrics]:
    """A job's steps but for the first few."""
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
        wire=WIRES[wire],
    )
    done = client.fine_tuning.jobs.wait(job.id)
    assert done.status == "succeeded", done.error
    metrics = client.fine_tuning.jobs.metrics(job.id)[WARM_STEPS:]
    assert all(each.tokens == batch * LENGTH for each in metrics)
    return metrics


def parts(step: StepMetrics) -> dict[str, float]:
    """Seconds of the server's thread, and the share."""
    seconds = {part: float(getattr(step, f"{part}_seconds")) for part in PARTS}
    return {**seconds, "share": (seconds["reduce"] + seconds["encode"]) / sum(seconds.values())}


def main(
    rounds: Annotated[int, typer.Option(help="Of all jobs.")] = 2,
    steps: Annotated[int, typer.Option(help="Of a job, after the first few.")] = 8,
    batch: Annotated[int, typer.Option(help=f"Examples of {LENGTH} tokens.")] = 16,
    sites: Annotated[str, typer.Option(help=f"Of {'; '.join(SITES)}, separated by semicolons.")] = ";".join(SITES),
    wires: Annotated[str, typer.Option(help=f"Of {', '.join(WIRES)}.")] = ",".join(WIRES),
    cache: Cache = CACHE,
) -> None:
    """Run the benchmark and write its record."""
    found: dict[str, list[dict[str, float]]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(Path(folder), {"smollm2": converted(cache)}, workers=0, flags=["--threads=1"]) as cluster,
        cluster.client() as client,
    ):
        pin(cluster.server.process.pid, 0)
        pin(cluster.start_worker("worker", ["--threads=1"]).process.pid, 1)
        cluster.await_workers(1)
        file = client.files.create(file=("rows.jsonl", filling_rows(batch * 8)), purpose="fine-tune")
        for number in range(1, rounds + 1):
            for place in sites.split(";"):
                for wire in wires.split(","):
                    late = cluster.server.waited_seconds()
                    of_job = [parts(each) for each in job_steps(client, file.id, place, wire, batch, steps)]
                    late = cluster.server.waited_seconds() - late
                    found.setdefault(f"{place}, {wire}", []).extend(of_job)
                    medians = {name: statistics.median(each[name] for each in of_job) for name in of_job[0]}
                    told = ", ".join(f"{name} {value:.4f}" for name, value in medians.items())
                    print(f"round {number}: {place}, {wire}: {told}; {late:.1f} s without a core", flush=True)
    medians_of = {
        case: {name: statistics.median(each[name] for each in steps_of) for name in steps_of[0]}
        for case, steps_of in found.items()
    }
    for case, medians in medians_of.items():
        print(f"{case:24} {medians['share']:.2%} of {sum(medians[part] for part in PARTS):.3f} s")
    write_record(
        "reduce_cost",
        {
            "what": __doc__.splitlines()[0],
            "shape": {"batch": batch, "length": LENGTH, "rank": RANK, "rounds": rounds, "steps": steps},
            "medians": medians_of,
            "steps": found,
            "aims": AIMS,
        },
    )


if __name__ == "__main__":
    typer.run(main)
