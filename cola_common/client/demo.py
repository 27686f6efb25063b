"""`cola demo`: one server, two workers and one job on this machine, from data to a checked adapter.

The command uses the daemons as their operators do and the SDK as its users do. What needs torch (converting the model,
checking the adapter with PEFT) runs as `python -m cola_server.demo`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from cola_common.client.daemons import Daemons
from cola_common.client.plot import plot
from cola_common.client.sync import Client
from cola_common.client.watch import watch
from cola_common.errors import ColaError, Reason
from cola_common.jobs import JobStatus, StepMetrics

MAX_LENGTH = 64
BATCH_SIZE = 4
LEARNING_RATE = 2e-3

AGREEMENT = 1e-3
"""How far PEFT's loss may be from the job's own, in nats. Both are fp32 sums, in different orders."""


@dataclass(frozen=True)
class Report:
    """What a demo run gave; written to `report.json`. Losses are nats a token, on rows that were not trained on."""

    model: str
    job: str
    steps: int
    train_rows: int
    evaluation_rows: int
    perplexity_before: float
    perplexity_after: float
    job_loss: float
    """The job's own validation loss at its last step, by the server."""
    peft_loss: float
    """The loss of the downloaded adapter, by transformers and PEFT alone."""
    agrees: bool
    """Whether the two are within `AGREEMENT`."""
    sent_bytes: int
    received_bytes: int
    raw_bytes: int
    """What both would be with every row in fp32."""
    training_seconds: float
    part_seconds: dict[str, float]
    """Sums over the steps; the parts overlap."""
    total_seconds: float


def demo(
    model: Annotated[
        str | None, typer.Option(help="A causal LM, as a folder or hub id. [default: SmolLM2-135M, from its package]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 50,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the plot, the report and the logs.")] = Path(
        "demo-output"
    ),
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the converted SmolLM2. [default: ~/.cache/cola]")
    ] = None,
) -> None:
    """Fine-tune a small model through one server and some workers on this machine, and check the adapter with PEFT."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does, these too must end the daemons
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    console = Console()
    report = run(console, model=model, steps=steps, workers=workers, output=output, cache=cache or _default_cache())
    show(console, report, output)
    if not report.agrees:
        raise typer.Exit(1)


def run(console: Console, *, model: str | None, steps: int, workers: int, output: Path, cache: Path) -> Report:
    """Does everything that the demo does but the final table.

    Raises: `ColaError`, also where a daemon ends or the job does not succeed.
    """
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    for earlier in ("adapter", "data", "logs"):
        shutil.rmtree(output / earlier, ignore_errors=True)

    console.print("Preparing the data" + ("" if model else " and SmolLM2-135M (the first time takes half a minute)"))
    chosen = [] if model is None else ["--model", _absolute(model)]
    prepared = _torch_side(output, "prepare", ["--folder", str(output / "data"), "--cache", str(cache), *chosen])

    with (
        tempfile.TemporaryDirectory(prefix="cola-demo-") as scratch,
        Daemons(Path(scratch), output / "logs") as daemons,
    ):
        console.print(f"Starting one server and {workers} worker{'s' if workers > 1 else ''}")
        address = daemons.start_server("demo", prepared["model"], split_jobs=workers)
        for number in range(1, workers + 1):
            daemons.start_worker(f"worker-{number}", address)
        with Client(address) as client:
            daemons.watch(client.close)
            try:
                job, loss, metrics = _train(client, console, prepared, steps, output)
            except RuntimeError:  # the client was closed under the call: by the watch, where there is a failure
                if daemons.failure is None:
                    raise
                raise daemons.failure from None

    console.print("Checking the adapter with transformers and PEFT")
    lengths = ["--rows", prepared["evaluation"], "--max-length", str(MAX_LENGTH)]
    losses = _torch_side(
        output, "evaluate", ["--model", prepared["model"], "--adapter", str(output / "adapter"), *lengths]
    )
    name = model or "SmolLM2-135M-Instruct"
    plot(metrics, f"{name}, {steps} steps", output / "loss.png")
    report = Report(
        model=name,
        job=job,
        steps=steps,
        train_rows=prepared["train_rows"],
        evaluation_rows=prepared["evaluation_rows"],
        perplexity_before=losses["before"]["perplexity"],
        perplexity_after=losses["after"]["perplexity"],
        job_loss=loss,
        peft_loss=losses["after"]["mean"],
        agrees=abs(loss - losses["after"]["mean"]) < AGREEMENT,
        sent_bytes=sum(record.sent_bytes for record in metrics),
        received_bytes=sum(record.received_bytes for record in metrics),
        raw_bytes=sum(record.raw_bytes + record.raw_delta_bytes for record in metrics),
        training_seconds=sum(record.seconds for record in metrics),
        part_seconds={
            part: sum(getattr(record, f"{part}_seconds") for record in metrics)
            for part in ("model", "reduce", "encode", "wire", "worker", "fold")
        },
        total_seconds=time.monotonic() - began,
    )
    (output / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def show(console: Console, report: Report, output: Path) -> None:
    """The report for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row(
        "Perplexity on held-out rows",
        f"{report.perplexity_before:.1f} before, [bold]{report.perplexity_after:.1f} after[/bold] {report.steps} steps",
    )
    verdict = "[green]agree[/green]" if report.agrees else "[red]DISAGREE[/red]"
    table.add_row(
        "Loss by the job, by PEFT",
        f"{report.job_loss:.5f}, {report.peft_loss:.5f}: they {verdict} (bound {AGREEMENT:g})",
    )
    table.add_row(
        "On the wire",
        f"{report.sent_bytes / 1e6:.1f} MB to the workers, {report.received_bytes / 1e6:.1f} MB back: "
        f"{report.raw_bytes / (report.sent_bytes + report.received_bytes):.1f} times fewer than every row in fp32",
    )
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in report.part_seconds.items())
    table.add_row("Training", f"{report.training_seconds:.1f} s; parts, which overlap: {parts}")
    table.add_row("Everything", f"{report.total_seconds:.0f} s")
    table.add_row("Files", f"{output}/adapter (for PEFT), loss.png, report.json, logs/")
    console.print(table)


def _train(
    client: Client, console: Console, prepared: dict[str, Any], steps: int, output: Path
) -> tuple[str, float, list[StepMetrics]]:
    """Runs the job and downloads its adapter: the job's id, its last validation loss and its metrics."""
    train = client.files.create(file=prepared["train"], purpose="fine-tune")
    evaluation = client.files.create(file=prepared["evaluation"], purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="demo",
        training_file=train.id,
        validation_file=evaluation.id,
        seed=0,
        adapter={"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        hyperparameters={
            "max_steps": steps,
            "batch_size": BATCH_SIZE,
            "max_length": MAX_LENGTH,
            "learning_rate": LEARNING_RATE,
        },
    )
    job = watch(client, job.id, console)
    if job.status is not JobStatus.SUCCEEDED:
        problem = job.error.message if job.error is not None else f"the job is {job.status}"
        raise ColaError(Reason.INTERNAL, problem=f"{job.id}: {problem}")
    last = max(client.fine_tuning.jobs.checkpoints.list(job.id), key=lambda checkpoint: checkpoint.step_number)
    client.fine_tuning.jobs.checkpoints.download(last.id, output / "adapter")
    return job.id, last.metrics["valid_loss"], client.fine_tuning.jobs.metrics(job.id)


def _torch_side(output: Path, command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What `python -m cola_server.demo COMMAND …` answers; what else it says goes to a log.

    Raises: `ColaError(INTERNAL)` with the log's last line.
    """
    log = output / "logs" / f"{command}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        ended = subprocess.run(
            [sys.executable, "-m", "cola_server.demo", command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            check=False,
        )
    if ended.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no word why"]
        raise ColaError(Reason.INTERNAL, problem=f"{lines[-1]} (all of it in {log})")
    return cast("dict[str, Any]", json.loads(ended.stdout))


def _absolute(model: str) -> str:
    """A folder by its full path, for the daemons; a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cola"
