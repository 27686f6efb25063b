"""`cola models` and `cola workers`."""

from typing import Annotated

import typer

from cola_common.client.commands.session import Session, connected
from cola_common.client.tables import MODELS, WORKERS, table

models = typer.Typer(help="The server's base models.", no_args_is_help=True)
workers = typer.Typer(help="The server's workers: list and drain.", no_args_is_help=True)


@models.command("list")
@connected
def list_models(session: Session) -> None:
    """List the base models that jobs can name, and what the thread that computes for them does with its time."""
    session.many(MODELS, session.client.models.list(), none="No models.")


@workers.command("list")
@connected
def list_workers(
    session: Session,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing them, until Ctrl-C.")] = False,
) -> None:
    """List the workers that the server knows."""
    if watch:
        session.watch(WORKERS, session.client.workers.list, none="No workers.")
    else:
        session.many(WORKERS, session.client.workers.list(), none="No workers.")


@workers.command()
@connected
def drain(session: Session, worker: Annotated[str, typer.Argument(metavar="WORKER", help="A worker's id.")]) -> None:
    """Empty a worker: its jobs go on elsewhere and lose no step."""
    card = session.client.workers.drain(worker)
    session.one(card, table(WORKERS, [card]))


# A group needs a callback to stay one with a single command.
@models.callback()
def _models() -> None: ...
