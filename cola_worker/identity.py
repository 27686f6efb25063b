"""Who this worker is: an id that lives in its data folder."""

import os
from pathlib import Path

from cola_common import ids
from cola_common.errors import ColaError, Reason

FILE = "worker-id"


def identity(data_dir: Path) -> str:
    """The worker's id, made at the first start.

    Raises: `ColaError(INVALID_CONFIG)` for a folder that cannot be written, or whose file holds something else.
    """
    path = data_dir / FILE
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write(path, ids.new("wkr"))
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ColaError(Reason.INVALID_CONFIG, setting="data_dir", problem=error) from None
    if not ids.valid("wkr", text):
        problem = f"{path} holds no worker id; delete it, and the worker gets a new one"
        raise ColaError(Reason.INVALID_CONFIG, setting="data_dir", problem=problem)
    return text


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="ascii") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
