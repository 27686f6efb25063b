"""The `cola` command."""

from typing import Annotated

import typer

from cola_common import __version__
from cola_common.client.commands import checkpoints, files, jobs, listings
from cola_common.client.commands.session import plain_errors
from cola_common.client.demo import demo

app = typer.Typer(
    name="cola",
    help="Fine-tuning as a service with gradient offloading.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(listings.models, name="models")
app.add_typer(listings.workers, name="workers")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


app.command()(plain_errors()(demo))


def main() -> None:
    """Runs the command."""
    app()
