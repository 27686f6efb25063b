"""A job's fields as a command gets them: from a file, from flags, and from `--set`."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_common.errors import ColaError, Reason


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
