"""`cola checkpoints`."""

from pathlib import Path
from typing import Annotated

import typer

from cola_common.client.commands.session import Session, connected
from cola_common.client.tables import CHECKPOINTS

app = typer.Typer(help="List and download a job's adapters.", no_args_is_help=True)


@app.command("list")
@connected
def list_(
    session: Session,
    job: Annotated[str, typer.Argument(help="A job's id.")],
    after: Annotated[str | None, typer.Option(help="Go on behind this checkpoint.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
) -> None:
    """List a job's checkpoints."""
    page = session.client.fine_tuning.jobs.checkpoints.list(job, after=after, limit=limit)
    session.page(CHECKPOINTS, page, none="No checkpoints yet.")


@app.command()
@connected
def download(
    session: Session,
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    merged: Annotated[bool, typer.Option("--merged", help="The whole model with the adapter in its weights.")] = False,
) -> None:
    """Download an adapter: a folder that peft.PeftModel.from_pretrained loads."""
    folder = session.client.fine_tuning.jobs.checkpoints.download(checkpoint, output, merged=merged)
    session.say(f"The {'model' if merged else 'adapter'} is in {folder}.")
