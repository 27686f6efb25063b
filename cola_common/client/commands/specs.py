"""A job's fields as a command gets them: from a file, from flags, and from `--set`."""

import functools
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Concatenate, Literal, ParamSpec

import typer

from cola_common.client.commands.session import Session
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Codec, JobSpec, Rows

P = ParamSpec("P")

_ADAPTER, _TRAINING, _WIRE = "Adapter", "Training", "What travels"


def _targets(text: str) -> str | list[str]:
    return text if text == "all-linear" else [part.strip() for part in text.split(",")]


# The flags of every command that takes a job's fields: parameter -> (the field's path, annotation).
_FLAGS: dict[str, tuple[str, Any]] = {
    "model": ("model", Annotated[str | None, typer.Option(help="A base model of the server.")]),
    "training_file": (
        "training_file",
        Annotated[str | None, typer.Option(help="A file's id, or a path to upload.")],
    ),
    "joint_files": (
        "joint_files",
        Annotated[
            list[str] | None,
            typer.Option("--joint-file", help="Another one, whose rows follow those of the training file. Repeatable."),
        ],
    ),
    "validation_file": (
        "validation_file",
        Annotated[str | None, typer.Option(help="A file's id, or a path to upload.")],
    ),
    "suffix": ("suffix", Annotated[str | None, typer.Option(help="For the fine-tuned model's name.")]),
    "seed": ("seed", Annotated[int | None, typer.Option(help="For initial values and the data's order.")]),
    "group": (
        "collaboration.group",
        Annotated[str | None, typer.Option(help="Train with others: the name of a group, which the first job makes.")],
    ),
    "group_size": (
        "collaboration.size",
        Annotated[int | None, typer.Option(help="How many jobs the group is; none starts before.")],
    ),
    "adapter": (
        "adapter.type",
        Annotated[Literal["lora", "linear", "mlp"] | None, typer.Option(rich_help_panel=_ADAPTER)],
    ),
    "r": ("adapter.r", Annotated[int | None, typer.Option("--r", help="LoRA's rank.", rich_help_panel=_ADAPTER)]),
    "lora_alpha": (
        "adapter.lora_alpha",
        Annotated[float | None, typer.Option(help="LoRA's scale times its rank.", rich_help_panel=_ADAPTER)],
    ),
    "target_modules": (
        "adapter.target_modules",
        Annotated[
            str | None,
            typer.Option(help="Suffixes with commas between, or 'all-linear'.", rich_help_panel=_ADAPTER),
        ],
    ),
    "init_from": (
        "adapter.init_from",
        Annotated[
            str | None,
            typer.Option(help="Continue from a checkpoint's id, a file's id, or a folder.", rich_help_panel=_ADAPTER),
        ],
    ),
    "fold": (
        "fold",
        Annotated[Literal["unmerged", "merged"] | None, typer.Option(rich_help_panel=_ADAPTER)],
    ),
    "n_epochs": ("hyperparameters.n_epochs", Annotated[int | None, typer.Option(rich_help_panel=_TRAINING)]),
    "max_steps": (
        "hyperparameters.max_steps",
        Annotated[int | None, typer.Option(help="In place of epochs.", rich_help_panel=_TRAINING)],
    ),
    "batch_size": ("hyperparameters.batch_size", Annotated[int | None, typer.Option(rich_help_panel=_TRAINING)]),
    "max_length": (
        "hyperparameters.max_length",
        Annotated[int | None, typer.Option(help="In tokens.", rich_help_panel=_TRAINING)],
    ),
    "learning_rate": (
        "hyperparameters.learning_rate",
        Annotated[float | None, typer.Option(rich_help_panel=_TRAINING)],
    ),
    "wire_rows": (
        "wire.rows",
        Annotated[
            Literal[Rows, "auto"] | None,
            typer.Option(help="All rows, their exact gradient, or fewer: a sketch.", rich_help_panel=_WIRE),
        ],
    ),
    "wire_values": (
        "wire.values",
        Annotated[
            Literal[Codec, "auto"] | None,
            typer.Option(help="The codec of what goes to the workers.", rich_help_panel=_WIRE),
        ],
    ),
    "wire_deltas": (
        "wire.deltas",
        Annotated[
            Literal[Codec, "auto"] | None,
            typer.Option(help="The codec of what comes back.", rich_help_panel=_WIRE),
        ],
    ),
    "max_error": (
        "wire.max_error",
        Annotated[
            float | None,
            typer.Option(help="Of a gradient, relative, that 'auto' may make; 0: none.", rich_help_panel=_WIRE),
        ],
    ),
}
_SPEC = Annotated[Path | None, typer.Argument(help="A TOML or JSON file with the job's fields; flags win.")]
_SETTINGS = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field, such as wire.sketch_rows=128. Repeatable."),
]


def with_fields(function: Callable[Concatenate[Session, dict[str, Any], P], None]) -> Callable[..., None]:
    """Makes a command of a function: it gets the fields of a job, checked, and the command what they are made of. To
    stand below `connected`.
    """
    session, _, *own = inspect.signature(function, eval_str=True).parameters.values()
    flags = {"spec": _SPEC, **{name: annotation for name, (_, annotation) in _FLAGS.items()}, "settings": _SETTINGS}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in flags.items()
    ]

    @functools.wraps(function)
    def command(session: Session, *args: P.args, **values: P.kwargs) -> None:
        given: dict[str, Any] = {name: values.pop(name) for name in flags}
        function(session, _fields(given), *args, **values)

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # where `connected` looks for them
        [session, *added, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
    )
    return command


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    fields = {} if given["spec"] is None else read_spec(given["spec"])
    if fields.get("wire") == "auto":  # short for a table that leaves everything open, which flags may narrow
        fields["wire"] = {}
    flags = {path: given[name] or None if name == "joint_files" else given[name] for name, (path, _) in _FLAGS.items()}
    if given["target_modules"] is not None:
        flags["adapter.target_modules"] = _targets(given["target_modules"])
    put_flags(fields, flags)
    put_settings(fields, given["settings"] or [])
    if isinstance(fields.get("adapter"), dict):
        fields["adapter"].setdefault("type", "lora")
    JobSpec.parse(fields)  # before files are uploaded for it
    return fields


def read_spec(path: Path) -> dict[str, Any]:
    """The fields in a `.json` file, or in a TOML file of any other name.

    Raises: `OSError`; `ColaError(INVALID_FILE)`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # of either parser, or no UTF-8
        raise ColaError(Reason.INVALID_FILE, file=path, problem=error) from None
    if not isinstance(fields, dict):
        raise ColaError(Reason.INVALID_FILE, file=path, problem="the file is not one object")
    return fields


def put(fields: dict[str, Any], path: str, value: object) -> None:
    """Sets a field by its path, such as `hyperparameters.batch_size`.

    Raises: `ColaError(INVALID_JOB)` where the path leads through a value that is no table.
    """
    *parents, name = path.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ColaError(Reason.INVALID_JOB, param=path, problem=f"{parent} is no table")
    fields[name] = value


def put_flags(fields: dict[str, Any], flags: Mapping[str, object]) -> None:
    """Sets the fields of the flags that were given."""
    for path, value in flags.items():
        if value is not None:
            put(fields, path, value)


def put_settings(fields: dict[str, Any], settings: Sequence[str]) -> None:
    """Sets fields from `PATH=VALUE`, the value in TOML's notation; one that is not is a text.

    Raises: `ColaError(INVALID_JOB)`.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not all(path.split(".")):
            problem = "write it as field=value, such as hyperparameters.batch_size=8"
            raise ColaError(Reason.INVALID_JOB, param=setting, problem=problem)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        put(fields, path, value)
