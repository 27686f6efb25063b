"""What every command has: the server's address and how to reach it, the output's format, errors in one line."""

import functools
import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Concatenate, ParamSpec, Self, TypeVar, final

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from cola_common.client.jobs import JobFailedError
from cola_common.client.pages import Page
from cola_common.client.sync import Client
from cola_common.client.tables import Column, table
from cola_common.errors import ColaError, Reason

P = ParamSpec("P")
R = TypeVar("R", bound=BaseModel)

PIPE_WIDTH = 240  # what goes to a pipe or a file is searched and cut: rows stay whole
REFRESH_SECONDS = 1.0
DEFAULT_SERVER = "127.0.0.1:50051"
_PANEL = "Server and output"


class Format(StrEnum):
    """How a command writes what it found."""

    TABLE = "table"
    JSON = "json"


# The options of every command that talks to a server: name -> (annotation, default).
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "server": (
        Annotated[
            str,
            typer.Option(envvar="COLA_SERVER", metavar="HOST:PORT", help="The server.", rich_help_panel=_PANEL),
        ],
        DEFAULT_SERVER,
    ),
    "token_file": (
        Annotated[
            Path | None,
            typer.Option(envvar="COLA_TOKEN_FILE", help="A file that holds the client token.", rich_help_panel=_PANEL),
        ],
        None,
    ),
    "root_certificates": (
        Annotated[
            Path | None,
            typer.Option(
                envvar="COLA_ROOT_CERTIFICATES",
                help="A PEM file; given, the connection is TLS.",
                rich_help_panel=_PANEL,
            ),
        ],
        None,
    ),
    "insecure": (
        Annotated[
            bool,
            typer.Option(
                "--insecure",
                envvar="COLA_INSECURE",
                help="Allow a connection off this machine without TLS.",
                rich_help_panel=_PANEL,
            ),
        ],
        False,
    ),
    "format": (
        Annotated[Format, typer.Option(envvar="COLA_FORMAT", help="What to write.", rich_help_panel=_PANEL)],
        Format.TABLE,
    ),
}


@final
class Session:
    """One command's connection and output."""

    def __init__(
        self, *, server: str, token_file: Path | None, root_certificates: Path | None, insecure: bool, format: Format
    ) -> None:
        token = None if token_file is None else _token(token_file)
        self.json = format is Format.JSON
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = PIPE_WIDTH
        self.client = Client(server, token, root_certificates, insecure)

    def one(self, record: BaseModel, view: RenderableType) -> None:
        """Writes a record: as JSON, or as `view`."""
        if self.json:
            typer.echo(record.model_dump_json(indent=2))
        else:
            self.console.print(view)

    def many(self, columns: Sequence[Column[R]], records: Iterable[R], *, none: str, gap: int = 2) -> None:
        """Writes records: as a JSON array, or as a table; `none` is said in place of an empty table."""
        found = list(records)
        if self.json:
            typer.echo(json.dumps([record.model_dump(mode="json") for record in found], indent=2))
        elif found:
            self.console.print(table(columns, found, gap=gap))
        else:
            self.console.print(none)

    def page(self, columns: Sequence[Column[R]], page: Page[R], *, none: str) -> None:
        """Writes one page of records, and that there are more."""
        self.many(columns, page.data, none=none)
        if page.has_more and not self.json:
            last: Any = page.data[-1]
            self.console.print(f"There are more: --after {last.id}", style="dim", soft_wrap=True)

    def watch(self, columns: Sequence[Column[R]], fetch: Callable[[], Iterable[R]], *, none: str) -> None:
        """Shows records as they change, until Ctrl-C: on a terminal one table, elsewhere a line for each that is new or
        looks different; as JSON, where that is asked for.
        """
        if not self.json and self.console.is_terminal and not self.console.is_dumb_terminal:
            with Live(console=self.console, auto_refresh=False) as live:
                while True:
                    found = list(fetch())
                    live.update(table(columns, found) if found else Text(none), refresh=True)
                    time.sleep(REFRESH_SECONDS)
        seen: dict[object, tuple[str, ...]] = {}
        while True:
            for record in fetch():
                name, *_ = cells = tuple(str(column.cell(record)) for column in columns)
                if seen.get(name) != cells:
                    seen[name] = cells
                    if self.json:
                        self.line(record)
                    else:
                        self.say("  ".join(filter(None, cells)))
            time.sleep(REFRESH_SECONDS)

    def line(self, record: BaseModel) -> None:
        """Writes a record of a stream: one line of JSON."""
        typer.echo(record.model_dump_json())

    def say(self, text: str) -> None:
        """Tells what was done; nothing where JSON is asked for."""
        if not self.json:
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()


def connected(function: Callable[Concatenate[Session, P], None]) -> Callable[..., None]:
    """Makes a command of a function: it gets a session, and the command the options that a session is made of."""
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _OPTIONS.items()
    ]

    @functools.wraps(function)
    def command(*args: P.args, **values: P.kwargs) -> None:
        options: dict[str, Any] = {name: values.pop(name) for name in _OPTIONS}
        with plain_errors(), Session(**options) as session:
            function(session, *args, **values)

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # where typer looks for the options
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + added
    )
    return command


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a user can do something about become one line on stderr and exit code 1."""
    try:
        yield
    except (ColaError, JobFailedError, TimeoutError) as error:
        fail(str(error))
    except OSError as error:
        fail(str(error) if error.filename is None else f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def fail(problem: str) -> None:
    """Says what is wrong and ends the command."""
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), problem), soft_wrap=True)
    raise typer.Exit(1)


def _token(file: Path) -> str:
    text = file.read_text(encoding="utf-8").strip()
    if not text:
        raise ColaError(Reason.INVALID_CONFIG, setting="token_file", problem=f"{file} is empty")
    return text
