"""`cola models` and `cola workers`."""

import typer

from cola_common.client.commands.session import Session, connected
from cola_common.client.tables import MODELS, WORKERS

models = typer.Typer(help="The server's base models.", no_args_is_help=True)
workers = typer.Typer(help="The server's workers.", no_args_is_help=True)


@models.command("list")
@connected
def list_models(session: Session) -> None:
    """List the base models that jobs can name."""
    session.many(MODELS, session.client.models.list(), none="No models.")


@workers.command("list")
@connected
def list_workers(session: Session) -> None:
    """List the workers that the server knows."""
    session.many(WORKERS, session.client.workers.list(), none="No workers.")


# A group needs a callback to stay one with a single command.
@models.callback()
def _models() -> None: ...


@workers.callback()
def _workers() -> None: ...
