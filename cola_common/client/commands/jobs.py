"""`cola jobs`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cola_common import ids
from cola_common.client.commands.session import Session, connected
from cola_common.client.commands.specs import put_flags, put_settings, read_spec
from cola_common.client.connection import part_key
from cola_common.client.plot import plot as draw
from cola_common.client.tables import EVENTS, JOBS, METRICS, job_details
from cola_common.client.watch import watch as show
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Job, JobSpec, JobStatus

app = typer.Typer(help="Create, follow and steer fine-tuning jobs.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]
_ADAPTER, _TRAINING = "Adapter", "Training"


@app.command()
@connected
def create(
    session: Session,
    spec: Annotated[Path | None, typer.Argument(help="A TOML or JSON file with the job's fields; flags win.")] = None,
    model: Annotated[str | None, typer.Option(help="A base model of the server.")] = None,
    training_file: Annotated[str | None, typer.Option(help="A file's id, or a path to upload.")] = None,
    validation_file: Annotated[str | None, typer.Option(help="A file's id, or a path to upload.")] = None,
    suffix: Annotated[str | None, typer.Option(help="For the fine-tuned model's name.")] = None,
    seed: Annotated[int | None, typer.Option(help="For initial values and the data's order.")] = None,
    adapter: Annotated[Literal["lora", "linear", "mlp"] | None, typer.Option(rich_help_panel=_ADAPTER)] = None,
    r: Annotated[int | None, typer.Option("--r", help="LoRA's rank.", rich_help_panel=_ADAPTER)] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="LoRA's scale times its rank.", rich_help_panel=_ADAPTER)
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Suffixes with commas between, or 'all-linear'.", rich_help_panel=_ADAPTER),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Continue from a checkpoint's id, a file's id, or a folder.", rich_help_panel=_ADAPTER),
    ] = None,
    fold: Annotated[Literal["unmerged", "merged"] | None, typer.Option(rich_help_panel=_ADAPTER)] = None,
    n_epochs: Annotated[int | None, typer.Option(rich_help_panel=_TRAINING)] = None,
    max_steps: Annotated[int | None, typer.Option(help="In place of epochs.", rich_help_panel=_TRAINING)] = None,
    batch_size: Annotated[int | None, typer.Option(rich_help_panel=_TRAINING)] = None,
    max_length: Annotated[int | None, typer.Option(help="In tokens.", rich_help_panel=_TRAINING)] = None,
    learning_rate: Annotated[float | None, typer.Option(rich_help_panel=_TRAINING)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field, such as wire.values=fp16. Repeatable."),
    ] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key finds the same job.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show the job until it ends.")] = False,
) -> None:
    """Submit a job and print its id."""
    fields = {} if spec is None else read_spec(spec)
    put_flags(
        fields,
        {
            "model": model,
            "training_file": training_file,
            "validation_file": validation_file,
            "suffix": suffix,
            "seed": seed,
            "adapter.type": adapter,
            "adapter.r": r,
            "adapter.lora_alpha": lora_alpha,
            "adapter.target_modules": None if target_modules is None else _targets(target_modules),
            "adapter.init_from": init_from,
            "fold": fold,
            "hyperparameters.n_epochs": n_epochs,
            "hyperparameters.max_steps": max_steps,
            "hyperparameters.batch_size": batch_size,
            "hyperparameters.max_length": max_length,
            "hyperparameters.learning_rate": learning_rate,
        },
    )
    put_settings(fields, settings or [])
    if isinstance(fields.get("adapter"), dict):
        fields["adapter"].setdefault("type", "lora")
    JobSpec.parse(fields)  # before files are uploaded for it
    for name in ("training_file", "validation_file"):
        if fields.get(name) is not None:
            fields[name] = _uploaded(session, fields[name], name, part_key(idempotency_key, name))
    job = session.client.fine_tuning.jobs.create(**fields, idempotency_key=idempotency_key)
    if watch:
        session.say(f"Job {job.id}")
        _watch(session, job.id)
    else:
        session.one(job, job.id)


def _targets(text: str) -> str | list[str]:
    return text if text == "all-linear" else [part.strip() for part in text.split(",")]


def _uploaded(session: Session, file: str, name: str, key: str | None) -> str:
    if ids.valid("file", file):
        return file
    if not Path(file).is_file():
        raise ColaError(Reason.INVALID_JOB, param=name, problem=f"{file} is no file's id, and no file on this machine")
    return session.client.files.create(file=file, purpose="fine-tune", idempotency_key=key).id


@app.command("list")
@connected
def list_(
    session: Session,
    after: Annotated[str | None, typer.Option(help="Go on behind this job.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
) -> None:
    """List the jobs."""
    session.page(JOBS, session.client.fine_tuning.jobs.list(after=after, limit=limit), none="No jobs.")


@app.command()
@connected
def retrieve(session: Session, job: JobId) -> None:
    """Show a job as it stands."""
    _show(session, session.client.fine_tuning.jobs.retrieve(job))


@app.command()
@connected
def cancel(session: Session, job: JobId) -> None:
    """End a job for good."""
    _show(session, session.client.fine_tuning.jobs.cancel(job))


@app.command()
@connected
def pause(session: Session, job: JobId) -> None:
    """Stop a job until it is resumed."""
    _show(session, session.client.fine_tuning.jobs.pause(job))


@app.command()
@connected
def resume(session: Session, job: JobId) -> None:
    """Queue a paused job again."""
    _show(session, session.client.fine_tuning.jobs.resume(job))


@app.command()
@connected
def events(
    session: Session,
    job: JobId,
    after: Annotated[int, typer.Option(min=0, help="Go on behind this event.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, unless --follow.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Show what a job has told, oldest first."""
    jobs = session.client.fine_tuning.jobs
    if not follow:
        session.page(EVENTS, jobs.list_events(job, after=after, limit=limit), none="No events.")
        return
    for event in jobs.stream_events(job, after=after):
        if session.json:
            session.line(event)
        else:
            session.say(f"{event.id}  {event.message}")


@app.command()
@connected
def wait(
    session: Session,
    job: JobId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds; without it, no bound.")] = None,
) -> None:
    """Wait until a job has ended; exit code 1 unless it succeeded."""
    record = session.client.fine_tuning.jobs.wait(job, timeout=timeout)
    _show(session, record)
    _exit(record)


@app.command()
@connected
def watch(session: Session, job: JobId) -> None:
    """Show a job's progress until it ends: how far, how good, how fast, and where the time goes.

    Ctrl-C ends the showing, not the job. Exit code 1 unless the job succeeds.
    """
    _watch(session, job)


@app.command()
@connected
def metrics(
    session: Session,
    job: JobId,
    after_step: Annotated[int, typer.Option(min=0, help="Only later steps.")] = 0,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many of the last steps.")] = None,
) -> None:
    """Show what each step gave and cost."""
    records = session.client.fine_tuning.jobs.metrics(job, after_step=after_step)
    session.many(METRICS, records if last is None else records[-last:], none="No steps yet.")


@app.command()
@connected
def plot(
    session: Session,
    job: JobId,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png, .svg or .pdf file.")] = Path("loss.png"),
) -> None:
    """Draw a job's learning curve; needs matplotlib."""
    record = session.client.fine_tuning.jobs.retrieve(job)
    draw(session.client.fine_tuning.jobs.metrics(job), f"{record.model}  {record.id}", output)
    session.say(f"The picture is in {output}.")


def _show(session: Session, job: Job) -> None:
    session.one(job, job_details(job))


def _watch(session: Session, job_id: str) -> None:
    if session.json:
        for event in session.client.fine_tuning.jobs.stream_events(job_id):
            session.line(event)
        job = session.client.fine_tuning.jobs.retrieve(job_id)
    else:
        job = show(session.client, job_id, session.console)
    _exit(job)


def _exit(job: Job) -> None:
    if job.status is not JobStatus.SUCCEEDED:
        raise typer.Exit(1)
