"""`cola files`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cola_common.client.commands.session import Session, connected
from cola_common.client.details import file_details
from cola_common.client.files import Purpose
from cola_common.client.quantities import bytes_text
from cola_common.client.tables import FILES

app = typer.Typer(help="Upload, list, read and delete files.", no_args_is_help=True)

FileId = Annotated[str, typer.Argument(metavar="FILE", help="A file's id.")]


@app.command()
@connected
def create(
    session: Session,
    path: Annotated[Path, typer.Argument(help="JSONL, or with --purpose adapter the folder of an adapter.")],
    purpose: Annotated[Purpose, typer.Option(help="What the file is for.")] = "fine-tune",
    idempotency_key: Annotated[str | None, typer.Option(help="The same key finds the same file.")] = None,
) -> None:
    """Upload a file and print its id."""
    file = session.client.files.create(file=path, purpose=purpose, idempotency_key=idempotency_key)
    session.one(file, file.id)


@app.command("list")
@connected
def list_(
    session: Session,
    after: Annotated[str | None, typer.Option(help="Go on behind this file.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
) -> None:
    """List the uploaded files."""
    session.page(FILES, session.client.files.list(after=after, limit=limit), none="No files.")


@app.command()
@connected
def retrieve(session: Session, file: FileId) -> None:
    """Show a file's record."""
    record = session.client.files.retrieve(file)
    session.one(record, file_details(record))


@app.command()
@connected
def delete(session: Session, file: FileId) -> None:
    """Delete a file."""
    session.client.files.delete(file)
    session.say(f"{file} is deleted.")


@app.command()
@connected
def content(
    session: Session,
    file: FileId,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
) -> None:
    """Write a file's content to stdout or to a file."""
    data = session.client.files.content(file)
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        output.write_bytes(data)
        session.say(f"{bytes_text(len(data))} are in {output}.")
