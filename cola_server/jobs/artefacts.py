"""Artefacts: what is too large for the database, as files under the data folder, named by ids alone.

    files/<file id>            an upload, as it was sent
    adapters/<file id>/        an uploaded adapter, unpacked
    checkpoints/<ftckpt id>/   an adapter at a step
    tmp/                       what is not finished; emptied when the folder is opened

An artefact is written under `tmp`, synced to the disk, and renamed: it is there whole or not at all.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from cola_common import ids
from cola_common.errors import ColaError, Reason


class Artefacts:
    """The artefacts under one data folder, which belongs to one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder where there is none. Raises: `ColaError(INVALID_CONFIG)` if another process has it open."""
        self._files = folder / "files"
        self._adapters = folder / "adapters"
        self._checkpoints = folder / "checkpoints"
        self._tmp = folder / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            problem = f"{folder} is in use by another process"
            raise ColaError(Reason.INVALID_CONFIG, setting="data_dir", problem=problem) from None
        shutil.rmtree(self._tmp, ignore_errors=True)
        for made in (self._files, self._adapters, self._checkpoints, self._tmp):
            made.mkdir(exist_ok=True)

    def close(self) -> None:
        """Leaves the folder to others."""
        self._lock.close()

    # --- where things are -------------------------------------------------------------------------------------------

    def file_path(self, id: str) -> Path:
        """Where an upload lies. Raises: `ColaError(UNKNOWN_FILE)`."""
        path = self._files / _checked("file", id)
        if not path.is_file():
            raise ColaError(Reason.UNKNOWN_FILE, file=id)
        return path

    def checkpoint_path(self, id: str) -> Path:
        """The folder of a checkpoint. Raises: `ColaError(UNKNOWN_CHECKPOINT)`."""
        path = self._checkpoints / _checked("ftckpt", id)
        if not path.is_dir():
            raise ColaError(Reason.UNKNOWN_CHECKPOINT, checkpoint=id)
        return path

    def adapter_path(self, source: str) -> Path:
        """The folder of an adapter to continue from: a checkpoint's, or an uploaded one's.

        Raises: `ColaError(UNKNOWN_CHECKPOINT)`, `ColaError(UNKNOWN_FILE)`.
        """
        if source.startswith("ftckpt-"):
            return self.checkpoint_path(source)
        path = self._adapters / _checked("file", source)
        if not path.is_dir():
            raise ColaError(Reason.UNKNOWN_FILE, file=source)
        return path

    def ids(self) -> set[str]:
        """The ids of all artefacts."""
        return {path.name for home in (self._files, self._adapters, self._checkpoints) for path in home.iterdir()}

    # --- making and removing ----------------------------------------------------------------------------------------

    def new_file(self, id: str) -> "Staged":
        """A file to be the upload `id`."""
        target = self._files / _checked("file", id)
        folder = self._stage()
        (folder / "file").touch()
        return Staged(folder / "file", folder, target)

    def new_adapter(self, id: str) -> "Staged":
        """A folder to be the unpacked adapter of upload `id`."""
        target = self._adapters / _checked("file", id)
        folder = self._stage()
        return Staged(folder, folder, target)

    def write_checkpoint(self, id: str, write: Callable[[Path], object]) -> str:
        """Makes the checkpoint `id` of what `write` puts into an empty folder, if it does not raise.

        Returns: the SHA-256 of the weights, the folder's one `.safetensors` file, in hex.
        """
        target = self._checkpoints / _checked("ftckpt", id)
        folder = self._stage()
        with Staged(folder, folder, target) as staged:
            write(folder)
            (weights,) = folder.glob("*.safetensors")
            with weights.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            staged.publish()
        return digest

    def remove(self, id: str) -> None:
        """Removes all that goes by this id; what is no id removes nothing."""
        if not (ids.valid("file", id) or ids.valid("ftckpt", id)):
            return
        for home in (self._files, self._adapters, self._checkpoints):
            path = home / id
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder that is gone when the block ends."""
        folder = self._stage()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _stage(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._tmp))


class Staged:
    """An artefact that is being written at `path`, an empty file or folder. It is there once it is published; what a
    `with` block leaves unpublished is gone.
    """

    def __init__(self, path: Path, folder: Path, target: Path) -> None:
        self.path = path
        self._folder = folder
        self._target = target

    def publish(self) -> None:
        """Syncs the artefact to the disk and moves it to its place."""
        for path in (*self.path.rglob("*"), self.path):
            _sync(path)
        self.path.rename(self._target)
        _sync(self._target.parent)

    def discard(self) -> None:
        """Removes what was not published."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(prefix: Literal["file", "ftckpt"], id: str) -> str:
    """The id, safe to name a path with. What is no id names nothing that is here."""
    if not ids.valid(prefix, id):
        raise (
            ColaError(Reason.UNKNOWN_FILE, file=id)
            if prefix == "file"
            else ColaError(Reason.UNKNOWN_CHECKPOINT, checkpoint=id)
        )
    return id
