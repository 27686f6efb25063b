"""`cola-worker`: reads the settings, then attends."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from cola_common.errors import ColaError
from cola_worker.config import WorkerConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Flag = typer.Option


@app.command()
def attend(
    server: Annotated[str | None, Flag(help="The server's HOST:PORT.")] = None,
    data_dir: Annotated[Path | None, Flag(help="The worker's id and the state of its shards.")] = None,
    config: Annotated[Path | None, Flag(help="TOML file with these settings.")] = None,
    token_file: Annotated[Path | None, Flag(help="File that holds the server's token for workers.")] = None,
    root_certificates: Annotated[Path | None, Flag(help="PEM file; the connection is TLS.")] = None,
    threads: Annotated[int | None, Flag(help="Threads of the numerics; one a core by default.")] = None,
    insecure: Annotated[bool | None, Flag("--insecure", help="Plaintext to another machine.")] = None,
    log_format: Annotated[str | None, Flag(help="text or json.")] = None,
) -> None:
    """Own shards of fine-tuning jobs, and turn what a server captures into their updates."""
    flags = {key: value for key, value in locals().items() if key != "config" and value is not None}
    try:
        settings = WorkerConfig.read(config, flags)
        from cola_worker.app import run  # only now: it brings torch

        asyncio.run(run(settings))
    except ColaError as error:
        typer.echo(f"cola-worker: {error}", err=True)
        sys.exit(1)


def main() -> None:
    """The console script."""
    app()
