"""What the wire plans save and what they cost: bytes a step, and the loss at the end.

    (a) bytes, both directions, against fp32 (x, g) of every row with x unshared: 256, 1,024 and 4,096 rows on q and v
        and on seven linears. Bytes do not depend on values, so a cell is what the server's own account of traffic says;
        what real jobs sent and received is compared with it: every mode at 256 rows, some at more
    (b) the loss on the demo's evaluation rows after 200 steps of the demo's task, three seeds: jobs of all modes and
        seeds at once on one server, as their own validation tells it; against `all` rows in fp32. A batch of 4 has
        some 100 rows without padding, of which a sketch of 64 keeps most: `--batch 40` asks more of it

SmolLM2-135M in fp32; LoRA r=8, `linear`, and `mlp` with 128 hidden. Each process has one thread.

What it costs a gradient is told by `benchmarks.wire_errors`.

    python -m benchmarks.wire [--parts ab] [--rows 256,1024,4096] [--real-rows 1024,4096] [--steps 200] [--seeds 3]
        [--modes lora/all/fp32,…] [--batch 4] [--threads 1] [--record wire]
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.record import write_record
from benchmarks.smollm2 import CACHE, LENGTH, LORA, SITES, Cache
from cola_common.client import Client
from cola_common.jobs import Codec, JobSpec, Rows, WirePlan
from cola_server.demo.dialogues import read_dialogues, split_dialogues, write_rows
from cola_server.demo.smollm2 import converted
from cola_server.model import BaseModel, Site, load, probe
from cola_server.training.traffic import capture_bytes, delta_bytes
from tests.support.cluster import Cluster
from tests.support.wires import wire

FORMS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "linear": {"type": "linear"},
    "mlp": {"type": "mlp", "hidden_sizes": [128]},
}
RATES = {"lora": 2e-3, "linear": 1e-4, "mlp": 1e-3}
"""LoRA's is the demo's. A full matrix moves with every weight at once, and takes less."""


@dataclass(frozen=True)
class Mode:
    """An adapter and what travels of it."""

    form: str
    rows: Rows
    values: Codec
    deltas: Codec
    sketch_rows: int = 0

    @property
    def name(self) -> str:
        rows = f"{self.rows} {self.sketch_rows}" if self.sketch_rows else self.rows
        codecs = self.values if self.values == self.deltas else f"{self.values}/{self.deltas}"
        return f"{self.form}/{rows}/{codecs}"

    @property
    def plan(self) -> WirePlan:
        return wire(self.rows, self.values, self.deltas, sketch_rows=self.sketch_rows)

    @property
    def asked(self) -> dict[str, Any]:
        """As a job's field."""
        kept = {"sketch_rows": self.sketch_rows} if self.sketch_rows else {}
        return {"rows": self.rows, "values": self.values, "deltas": self.deltas, **kept}

    def adapter(self, sites: str) -> dict[str, Any]:
        """As a job's field."""
        return {**FORMS[self.form], "target_modules": SITES[sites]}


MODES = {
    mode.name: mode
    for mode in (
        Mode("lora", "all", "fp32", "fp32"),
        Mode("lora", "all", "bf16", "bf16"),
        Mode("lora", "exact", "fp32", "fp32"),
        Mode("lora", "exact", "bf16", "bf16"),
        Mode("lora", "exact", "int8", "int8"),
        Mode("lora", "sketch", "int8", "int8", 64),
        Mode("linear", "all", "fp32", "fp32"),
        Mode("linear", "sketch", "int8", "int8", 64),
        Mode("linear", "sketch", "int8", "int4", 64),
        Mode("mlp", "all", "fp32", "fp32"),
        Mode("mlp", "all", "int8", "int8"),
        Mode("mlp", "all", "int4", "int4"),
    )
}
OF_LOSS = (
    "lora/all/fp32,lora/exact/bf16,lora/sketch 64/int8,linear/all/fp32,linear/sketch 64/int8,"
    "linear/sketch 64/int8/int4,mlp/all/fp32,mlp/all/int4"
)
OF_REAL = ("lora/all/bf16", "lora/exact/bf16", "lora/sketch 64/int8", "mlp/all/int4")
"""What is compared with real jobs also at more than 256 rows: a pass of 4,096 takes half a minute."""
AIMS = {
    "lora/exact/bf16": {"rows": 1024, "times_fewer": 100, "loss": "within the baseline's spread over seeds"},
    "lora/sketch 64/int8": {"rows": 4096, "times_fewer": 60, "loss": 0.01},
    "linear/sketch 64/int8/int4": {"rows": 4096, "times_fewer": 60, "loss": 0.01},
    "mlp/all/int4": {"rows": 1024, "times_fewer": 7, "loss": 0.01},
}


def say(text: str) -> None:
    print(text, flush=True)


# --- (a) bytes --------------------------------------------------------------------------------------------------------


def sites_of(base: BaseModel, mode: Mode, sites: str) -> tuple[Site, ...]:
    spec = JobSpec.parse({"model": base.name, "training_file": "file-0", "adapter": mode.adapter(sites)})
    return probe(base, spec.adapter, labels=None, fold="unmerged")


def counted(found: Sequence[Site], mode: Mode, rows: int) -> dict[str, float]:
    """What one step of so many rows moves, by the server's account."""
    sent = capture_bytes(found, mode.plan, tokens=rows, examples=rows // LENGTH)
    received = delta_bytes(found, mode.deltas)
    raw = sum(4 * site.calls * rows * (site.d_in + site.d_out) for site in found)
    raw_deltas = delta_bytes(found, "fp32")
    return {
        "sent": sent,
        "received": received,
        "raw": raw,
        "raw_deltas": raw_deltas,
        "times_fewer": raw / (sent + received),
        "times_fewer_with_raw_deltas": (raw + raw_deltas) / (sent + received),
    }


def check(client: Client, file: str, mode: Mode, sites: str, rows: int, cell: dict[str, float]) -> None:
    """A real job of one step must move what was counted. Raises: `AssertionError`."""
    job = client.fine_tuning.jobs.create(
        model="smollm2",
        training_file=file,
        adapter=mode.adapter(sites),
        hyperparameters={"max_steps": 1, "batch_size": rows // LENGTH, "max_length": LENGTH, "learning_rate": 1e-4},
        wire=mode.asked,
    )
    done = client.fine_tuning.jobs.wait(job.id)
    assert done.status == "succeeded", done.error
    (step,) = client.fine_tuning.jobs.metrics(job.id)
    moved = {
        "sent": step.sent_bytes,
        "received": step.received_bytes,
        "raw": step.raw_bytes,
        "raw_deltas": step.raw_delta_bytes,
    }
    assert step.tokens == rows, f"{step.tokens} tokens: the text is too short"
    assert moved == {name: cell[name] for name in moved}, f"{mode.name} on {sites}, {rows} rows: {moved} and not {cell}"


def bytes_part(base: BaseModel, path: Path, counts: list[int], real: list[int]) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = defaultdict(dict)
    for sites in SITES:
        for mode in MODES.values():
            found = sites_of(base, mode, sites)
            table[sites][mode.name] = {rows: counted(found, mode, rows) for rows in counts}
            fewer = "  ".join(f"{rows}: {cell['times_fewer']:8.1f}" for rows, cell in table[sites][mode.name].items())
            say(f"{sites:6} {mode.name:20} times fewer at rows  {fewer}")
    cells = [(sites, mode, min(counts)) for sites in SITES for mode in MODES.values()]
    cells += [("q, v", MODES[name], rows) for rows in real if rows in counts for name in OF_REAL]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Cluster(Path(scratch), {"smollm2": path}, workers=0, flags=["--threads=1"]) as cluster,
        cluster.client() as client,
    ):
        cluster.start_worker("worker", ["--threads=1"])
        cluster.await_workers(1)
        lines = "\n".join(json.dumps({"text": text}) for text in long_texts(max(counts) // LENGTH))
        file = client.files.create(file=("rows.jsonl", lines.encode()), purpose="fine-tune")
        for number, (sites, mode, rows) in enumerate(cells, 1):
            check(client, file.id, mode, sites, rows, table[sites][mode.name][rows])
            say(f"real job {number} of {len(cells)} moved what was counted: {mode.name} on {sites}, {rows} rows")
    return {
        "bytes": table,
        "same_of_real_jobs": [f"{mode.name} on {sites}, {rows} rows" for sites, mode, rows in cells],
    }


def long_texts(count: int) -> list[str]:
    """So many texts of more than `LENGTH` tokens."""
    words = " ".join(f"{question} {answer}" for question, answer in split_dialogues(read_dialogues()).train).split()
    return [" ".join(words[(150 * i) % (len(words) - 150) :][:150]) for i in range(count)]


# --- (b) the loss at the end ------------------------------------------------------------------------------------------


def loss_part(path: Path, names: list[str], seeds: int, steps: int, batch: int, threads: int) -> dict[str, Any]:
    split = split_dialogues(read_dialogues())
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_rows(root / "train.jsonl", split.train)
        write_rows(root / "evaluation.jsonl", split.evaluation)
        flags = [f"--threads={threads}", f"--max-running-jobs={len(names) * seeds}"]
        with (
            Cluster(root / "run", {"smollm2": path}, workers=0, flags=flags) as cluster,
            cluster.client() as client,
        ):
            cluster.start_worker("worker", ["--threads=1"])
            cluster.await_workers(1)
            files = [
                client.files.create(file=root / f"{name}.jsonl", purpose="fine-tune").id
                for name in ("train", "evaluation")
            ]
            jobs = {
                (name, seed): client.fine_tuning.jobs.create(
                    model="smollm2",
                    training_file=files[0],
                    validation_file=files[1],
                    seed=seed,
                    adapter=MODES[name].adapter("q, v"),
                    hyperparameters={
                        "max_steps": steps,
                        "batch_size": batch,
                        "max_length": LENGTH,
                        "learning_rate": RATES[MODES[name].form],
                    },
                    wire=MODES[name].asked,
                ).id
                for name in names
                for seed in range(seeds)
            }
            follow(client, list(jobs.values()), steps)
            losses: dict[str, list[float]] = {name: [] for name in names}
            rows: dict[str, float] = {}
            for (name, _), job in jobs.items():
                metrics = client.fine_tuning.jobs.metrics(job)
                last = metrics[-1].valid_loss
                assert last is not None and metrics[-1].step == steps
                losses[name].append(last)
                rows[name] = statistics.mean(each.tokens for each in metrics)
    return {"losses": losses, "compared": compared(losses), "mean_rows_of_a_batch": statistics.mean(rows.values())}


def follow(client: Client, jobs: list[str], steps: int) -> None:
    """Waits for all to succeed, and tells how far they are."""
    began = told = time.monotonic()
    while True:
        states = [client.fine_tuning.jobs.retrieve(job) for job in jobs]
        for state in states:
            assert state.status != "failed", f"{state.spec.adapter.type}, {state.spec.wire}: {state.error}"
        if all(state.status == "succeeded" for state in states):
            return
        if time.monotonic() - told > 30:
            told = time.monotonic()
            done = [state.step for state in states]
            say(f"{told - began:5.0f} s: {len(jobs)} jobs at steps {min(done)} to {max(done)} of {steps}")
        time.sleep(2)


def compared(losses: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Each mode with `all` rows in fp32 of its form, seed by seed."""
    results = {}
    for name, of_mode in losses.items():
        base = losses.get(f"{MODES[name].form}/all/fp32")
        results[name] = {"mean": statistics.mean(of_mode), "spread": max(of_mode) - min(of_mode)}
        if base is not None and base is not of_mode:
            apart = [one - other for one, other in zip(of_mode, base, strict=True)]
            results[name] |= {
                "worse_in_the_mean": statistics.mean(apart),
                "worse_relative": statistics.mean(apart) / statistics.mean(base),
                "furthest_of_a_seed": max(apart, key=abs),
                "spread_of_base": max(base) - min(base),
            }
    for name, result in results.items():
        say(f"{name:20} " + "  ".join(f"{what} {value:+.5f}" for what, value in result.items()))
    return results


# --- all of it ------------------------------------------------------------------------------------------------------


def main(
    parts: Annotated[str, typer.Option(help="Which of a and b.")] = "ab",
    rows: Annotated[str, typer.Option(help="Of a step, for bytes.")] = "256,1024,4096",
    real_rows: Annotated[str, typer.Option(help="Of these, what some real jobs are tried with too.")] = "1024,4096",
    steps: Annotated[int, typer.Option(help="Of the demo's task.")] = 200,
    seeds: Annotated[int, typer.Option(help="Of each mode.")] = 3,
    modes: Annotated[str, typer.Option(help="Whose losses are compared, as form/rows/codec.")] = OF_LOSS,
    batch: Annotated[int, typer.Option(help="Examples of a batch in the demo's task.")] = 4,
    threads: Annotated[int, typer.Option(help="Of the server in that task: more where nothing else runs.")] = 1,
    record: Annotated[str, typer.Option(help="What its record is called.")] = "wire",
    cache: Cache = CACHE,
) -> None:
    """Run the benchmark and write its record."""
    torch.set_num_threads(1)
    path = converted(cache)
    base = load("smollm2", str(path), device="cpu")
    fields: dict[str, Any] = {"what": __doc__.splitlines()[0], "aims": AIMS}
    if "a" in parts:
        counts, real = ([int(n) for n in each.split(",") if n] for each in (rows, real_rows))
        fields |= bytes_part(base, path, counts, real)
    if "b" in parts:
        shape = {"steps": steps, "batch": batch, "seeds": seeds, "length": LENGTH, "learning_rates": RATES}
        fields |= {"loss_shape": shape, **loss_part(path, modes.split(","), seeds, steps, batch, threads)}
    write_record(record, fields)


if __name__ == "__main__":
    typer.run(main)
