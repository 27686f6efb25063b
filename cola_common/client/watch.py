"""Following a job on a terminal, or line by line where there is none."""

from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cola_common.client.progress import JobProgress
from cola_common.client.quantities import clock_text, duration_text
from cola_common.client.sync import Client
from cola_common.client.tables import LEVEL_STYLES, STATUS_STYLES
from cola_common.jobs import Job, JobEvent, JobStatus

LINE_SECONDS = 10.0  # between two lines of progress in a log


def watch(client: Client, job_id: str, console: Console) -> Job:
    """Shows a job until it ends, and returns it: a live picture on a terminal, lines elsewhere.

    Raises: `ColaError` as `stream_events`.
    """
    past = list(client.fine_tuning.jobs.list_events(job_id))
    view = JobProgress(client.fine_tuning.jobs.retrieve(job_id))
    view.add(client.fine_tuning.jobs.metrics(job_id))
    for event in past:
        _tell(event, console)
    events = _updates(client, view, past[-1].id if past else 0)
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(view, console=console, refresh_per_second=4):
            for event in events:
                _tell(event, console)
    else:
        told = 0.0
        for event in events:
            _tell(event, console)
            if event.type == "metrics" and event.created_at >= told + LINE_SECONDS:
                told = event.created_at
                console.print(f"{clock_text(event.created_at)}  {view.line()}", soft_wrap=True)
        console.print(view)
    _tell_end(view, console)
    return view.job


def _updates(client: Client, view: JobProgress, after: int) -> Iterator[JobEvent]:
    """A job's events from behind `after` until it ends; before each is given out, the view knows what it tells of."""
    jobs = client.fine_tuning.jobs
    for event in jobs.stream_events(view.job.id, after=after):
        if event.type != "metrics":
            view.set_job(jobs.retrieve(view.job.id))
        # Records are stored before their event is: one that is older than the newest record is known already. Where
        # steps come faster than calls are answered, one call so fetches many of them.
        elif view.newest is None or event.created_at > view.newest.created_at:
            known = 0 if view.newest is None else view.newest.step
            step = int(event.data.get("step", known + 1))
            view.add(jobs.metrics(view.job.id, after_step=min(step - 1, known)))
        yield event
    view.set_job(jobs.retrieve(view.job.id))
    view.add(jobs.metrics(view.job.id, after_step=0 if view.newest is None else view.newest.step))


def _tell(event: JobEvent, console: Console) -> None:
    if event.type != "metrics":
        time = Text(clock_text(event.created_at), "dim")
        console.print(Text.assemble(time, "  ", (event.message, LEVEL_STYLES[event.level])), soft_wrap=True)


def _tell_end(view: JobProgress, console: Console) -> None:
    job = view.job
    text = Text.assemble((job.status.value, f"bold {STATUS_STYLES[job.status]}"))
    if view.elapsed is not None:
        text.append(f" after {duration_text(view.elapsed)}")
    if job.error is not None:
        text.append(f": {job.error.message}")
    console.print(text, soft_wrap=True)
    if job.status is JobStatus.SUCCEEDED:
        console.print(f"Its adapters: cola checkpoints list {job.id}", soft_wrap=True)
