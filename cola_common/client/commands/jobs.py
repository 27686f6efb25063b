"""`cola jobs`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cola_common import ids
from cola_common.client.commands.session import Session, connected
from cola_common.client.commands.specs import with_fields
from cola_common.client.connection import part_key
from cola_common.client.details import estimate_details, job_details
from cola_common.client.plot import plot as draw
from cola_common.client.tables import EVENTS, JOBS, METRICS, TRAFFIC
from cola_common.client.watch import watch as show
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Job, JobStatus

app = typer.Typer(help="Create, follow and steer fine-tuning jobs.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]


@app.command()
@connected
@with_fields
def create(
    session: Session,
    fields: dict[str, Any],
    idempotency_key: Annotated[str | None, typer.Option(help="The same key finds the same job.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show the job until it ends.")] = False,
) -> None:
    """Submit a job and print its id."""
    fields = _with_files(session, fields, [], idempotency_key)
    job = session.client.fine_tuning.jobs.create(**fields, idempotency_key=idempotency_key)
    if watch:
        session.say(f"Job {job.id}")
        _watch(session, job.id)
    else:
        session.one(job, job.id)


@app.command()
@connected
@with_fields
def estimate(session: Session, fields: dict[str, Any]) -> None:
    """Tell what such a job would take: memory, bytes and time. Nothing is made, and files are not kept."""
    uploaded: list[str] = []
    try:
        record = session.client.fine_tuning.jobs.estimate(**_with_files(session, fields, uploaded))
    finally:
        for file in uploaded:
            session.client.files.delete(file)
    session.one(record, estimate_details(record))


def _with_files(
    session: Session, fields: dict[str, Any], uploaded: list[str], key: str | None = None
) -> dict[str, Any]:
    """The fields with ids in the place of paths; those of files that had to be uploaded go to `uploaded`."""

    def id_of(file: str, name: str, part: str) -> str:
        if ids.valid("file", file):
            return file
        if not Path(file).is_file():
            problem = f"{file} is no file's id, and no file on this machine"
            raise ColaError(Reason.INVALID_JOB, param=name, problem=problem)
        made = session.client.files.create(file=file, purpose="fine-tune", idempotency_key=part_key(key, part))
        uploaded.append(made.id)
        return made.id

    fields = dict(fields)
    for name in ("training_file", "validation_file"):
        if fields.get(name) is not None:
            fields[name] = id_of(fields[name], name, name)
    fields["joint_files"] = [
        id_of(file, "joint_files", f"joint_files.{number}")
        for number, file in enumerate(fields.get("joint_files") or ())
    ]
    return fields


@app.command("list")
@connected
def list_(
    session: Session,
    after: Annotated[str | None, typer.Option(help="Go on behind this job.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing them, until Ctrl-C.")] = False,
) -> None:
    """List the jobs."""
    jobs = session.client.fine_tuning.jobs
    if watch:
        session.watch(JOBS, lambda: jobs.list(after=after, limit=limit).data, none="No jobs.")
    else:
        session.page(JOBS, jobs.list(after=after, limit=limit), none="No jobs.")


@app.command("get", hidden=True)  # the word that some look for
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
    wire: Annotated[bool, typer.Option("--wire", help="What travelled, what that saved, and its time.")] = False,
) -> None:
    """Show what each step gave and cost."""
    records = session.client.fine_tuning.jobs.metrics(job, after_step=after_step)
    shown = records if last is None else records[-last:]
    session.many(TRAFFIC if wire else METRICS, shown, none="No steps yet.", gap=1 if wire else 2)


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
