"""Whether `exact` rows train the adapter that `all` rows do, on a real model: the whole adapter after 50 steps.

SmolLM2-135M in fp32 on the demo's data, batches of 4 texts of up to 64 tokens, LoRA r=8 on q and v, and on all seven
linears, SGD with momentum and AdamW; one job at a time on a server and a worker. Beside it is the noise of rounding:
`all` rows again, with the rows of each batch in another order. At the end, a few steps in every lossy mode: a digest
that differs between server and worker would start the job's next epoch.

    python -m benchmarks.equality [--steps 50]
"""

import itertools
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.record import write_record
from benchmarks.smollm2 import CACHE, LENGTH, RANK, SITES, Cache, lora
from cola_common.adapters import peft_format
from cola_common.client import Client
from cola_common.tensor import CODECS
from cola_server.demo.dialogues import read_dialogues, split_dialogues, write_rows
from cola_server.demo.smollm2 import converted
from tests.support.cluster import Cluster

BATCH = 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.05},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
}
LIMITS = {"sgd": 1e-5, "adamw": 1e-4}
LOSSLESS = {"values": "fp32", "deltas": "fp32"}


def train(client: Client, file: str, scratch: Path, steps: int, **fields: Any) -> tuple[torch.Tensor, int]:
    """A job's adapter, all of it in a row, and the epochs that it took."""
    job = client.fine_tuning.jobs.create(model="smollm2", training_file=file, **fields)
    job = client.fine_tuning.jobs.wait(job.id)
    assert job.status == "succeeded" and job.step == steps, job.error
    (last,) = client.fine_tuning.jobs.checkpoints.list(job.id).data[:1]
    client.fine_tuning.jobs.checkpoints.download(last.id, scratch / job.id)
    shards = peft_format.load(scratch / job.id).parameters
    return torch.cat([p.flatten() for site in sorted(shards) for p in shards[site].values()]), job.epoch


def fields_of(sites: str, optimizer: dict[str, Any], steps: int, wire: dict[str, str]) -> dict[str, Any]:
    """Of a job."""
    return {
        "adapter": lora(sites),
        "hyperparameters": {
            "max_steps": steps,
            "batch_size": BATCH,
            "max_length": LENGTH,
            "shuffle": False,
            **optimizer,
        },
        "wire": wire,
    }


def main(
    steps: Annotated[int, typer.Option(help="Of each job.")] = 50,
    cache: Cache = CACHE,
) -> None:
    """Run it and write its record."""
    path = converted(cache)
    pairs = split_dialogues(read_dialogues()).train[: BATCH * steps]
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    errors: dict[str, dict[str, float]] = {}
    epochs: dict[str, int] = {}
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_rows(root / "rows.jsonl", pairs)
        write_rows(root / "permuted.jsonl", [pair for batch in batches for pair in reversed(batch)])
        flags = ["--threads=1", "--max-running-jobs=1"]
        with Cluster(root / "run", {"smollm2": path}, workers=1, flags=flags) as cluster, cluster.client() as client:
            rows, permuted = (
                client.files.create(file=root / name, purpose="fine-tune").id
                for name in ("rows.jsonl", "permuted.jsonl")
            )
            for sites, (name, optimizer) in itertools.product(SITES, OPTIMIZERS.items()):

                def run(file: str, rows_of: str, sites: str = sites, optimizer: Any = optimizer) -> torch.Tensor:
                    fields = fields_of(sites, optimizer, steps, {"rows": rows_of, **LOSSLESS})
                    return train(client, file, root, steps, **fields)[0]

                wanted = run(rows, "all")
                exact, noise = (float((other - wanted).norm() / wanted.norm())
                                for other in (run(rows, "exact"), run(permuted, "all")))  # fmt: skip
                errors[f"{sites}, {name}"] = {"exact": exact, "permuted": noise, "limit": LIMITS[name]}
                print(f"{sites:6} {name:6} exact {exact:.2e}, permuted rows {noise:.2e}", flush=True)
            for how, values, deltas in itertools.product(("all", "exact", "sketch"), CODECS, CODECS):
                if how == "sketch" or (values, deltas) != ("fp32", "fp32"):
                    wire = {"rows": how, "values": values, "deltas": deltas}
                    fields = fields_of("q, v", OPTIMIZERS["adamw"], 2, wire)
                    epochs[f"{how} {values} {deltas}"] = train(client, rows, root, 2, **fields)[1]
            again = [mode for mode, count in epochs.items() if count != 1]
            print(f"{len(epochs)} lossy modes; digests that did not agree: {', '.join(again) or 'none'}")
    write_record(
        "equality",
        {
            "what": __doc__.splitlines()[0],
            "shape": {"batch": BATCH, "length": LENGTH, "rank": RANK, "steps": steps},
            "relative_error_of_the_adapter": errors,
            "epochs_of_lossy_modes": epochs,
        },
    )


if __name__ == "__main__":
    typer.run(main)
