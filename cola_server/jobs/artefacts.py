"""Artefacts: what is too large for the database, as files under the data folder, named by ids alone.

    files/<file id>            an upload, as it was sent
    adapters/<file id>/        an uploaded adapter, unpacked
    checkpoints/<ftckpt id>/   an adapter at a step
    snapshots/<ftjob id>/      what an unfinished job needs to go on: its two newest generations
    tmp/                       what is not finished; emptied when the folder is opened

An artefact is written under `tmp`, synced to the disk, and renamed: it is there whole or not at all.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from safetensors import SafetensorError

from cola_common import failpoints, ids
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Checkpoint, FileObject

GENERATIONS = 2
"""Snapshots that a job keeps: where the newest turns out to be damaged, there is one before it."""

_UNKNOWN = {
    "file": (Reason.UNKNOWN_FILE, "file"),
    "ftckpt": (Reason.UNKNOWN_CHECKPOINT, "checkpoint"),
    "ftjob": (Reason.UNKNOWN_JOB, "job"),
}


class Artefacts:
    """The artefacts under one data folder, which belongs to one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder where there is none. Raises: `ColaError(INVALID_CONFIG)` if another process has it open."""
        self._files = folder / "files"
        self._adapters = folder / "adapters"
        self._checkpoints = folder / "checkpoints"
        self._snapshots = folder / "snapshots"
        self._homes = (self._files, self._adapters, self._checkpoints, self._snapshots)
        self.tmp = folder / "tmp"
        """For files that nobody needs once this process has ended."""
        self._removing = threading.Lock()  # who cancels a job and the job's own end both remove its snapshots
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            problem = f"{folder} is in use by another process"
            raise ColaError(Reason.INVALID_CONFIG, setting="data_dir", problem=problem) from None
        shutil.rmtree(self.tmp, ignore_errors=True)
        for made in (*self._homes, self.tmp):
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

    def snapshots(self, job: str) -> list[Path]:
        """A job's snapshots, newest first: their names must be in the order of their making."""
        return sorted((self._snapshots / _checked("ftjob", job)).glob("*.safetensors"), reverse=True)

    def ids(self) -> set[str]:
        """The ids of all artefacts; snapshots go by their job's."""
        return {path.name for home in self._homes for path in home.iterdir()}

    # --- whether they are what they were ----------------------------------------------------------------------------

    def check(self, record: FileObject | Checkpoint) -> None:
        """Looks whether what this record tells of is here, without reading it. Raises: `ColaError(INVALID_FILE)`."""
        if isinstance(record, Checkpoint):
            if len(list((self._checkpoints / record.id).glob("*.safetensors"))) != 1:
                raise _damaged(record, "it is gone from the data folder")
            return
        path = self._files / record.id
        if not path.is_file():
            raise _damaged(record, "it is gone from the data folder")
        if (found := path.stat().st_size) != record.bytes:
            raise _damaged(record, f"it was {record.bytes} bytes, and {found} are here")
        if record.purpose == "adapter" and not any((self._adapters / record.id).glob("*.safetensors")):
            raise _damaged(record, "its unpacked adapter is gone from the data folder")

    def verify_file(self, file: FileObject) -> None:
        """Reads an upload again. Raises: `ColaError(INVALID_FILE)` if it is not what was sent."""
        self.check(file)
        if _digest(self._files / file.id) != file.digest:
            raise _damaged(file, "its bytes are not those that were sent")

    def verify_checkpoint(self, checkpoint: Checkpoint) -> Path:
        """Reads a checkpoint's weights again. Returns: its folder.

        Raises: `ColaError(INVALID_FILE)` if they are not what was written.
        """
        self.check(checkpoint)
        folder = self._checkpoints / checkpoint.id
        if _digest(_weights(folder)) != checkpoint.digest:
            raise _damaged(checkpoint, f"the bytes of {_weights(folder).name} are not those that were written")
        return folder

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
            digest = _digest(_weights(folder))
            staged.publish()
        return digest

    def write_snapshot(self, job: str, name: str, data: bytes | memoryview) -> None:
        """Keeps a snapshot of a job as `name`, and the one before it; older ones go."""
        home = self._snapshots / _checked("ftjob", job)
        folder = self._stage()
        with Staged(folder / name, folder, home / name) as staged:
            failpoints.hit("snapshot.before_write")
            staged.path.write_bytes(data)
            if not home.is_dir():
                home.mkdir()
                _sync(self._snapshots)
            failpoints.hit("snapshot.before_rename")
            staged.publish()
        failpoints.hit("snapshot.after_rename")
        for old in self.snapshots(job)[GENERATIONS:]:
            old.unlink()

    def set_aside(self, path: Path) -> None:
        """Takes a damaged snapshot out of use, and leaves it to be looked at."""
        path.rename(path.with_name(path.name + ".damaged"))
        _sync(path.parent)

    def discard(self, path: Path) -> None:
        """Removes a snapshot."""
        path.unlink()
        _sync(path.parent)

    def remove_snapshots(self, job: str) -> None:
        """Removes all snapshots of a job: it has ended."""
        self.remove(_checked("ftjob", job))

    def remove(self, id: str) -> None:
        """Removes all that goes by this id, a job's snapshots by the job's; what is no id removes nothing."""
        if not any(ids.valid(prefix, id) for prefix in ("file", "ftckpt", "ftjob")):
            return
        with self._removing:
            for home in self._homes:
                path = home / id
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder that is gone when the block ends."""
        folder = self._stage()
        with Staged(folder, folder, folder):
            yield folder

    def _stage(self) -> Path:
        with storing("tmp"):
            return Path(tempfile.mkdtemp(dir=self.tmp))


class Staged:
    """An artefact that is being written at `path`, an empty file or folder. It is there once it is published; what a
    `with` block leaves unpublished is gone. The block raises `ColaError(STORAGE_FULL)` where the disk has no room.
    """

    def __init__(self, path: Path, folder: Path, target: Path) -> None:
        self.path = path
        self._folder = folder
        self._target = target
        self._storing = storing(f"{target.parent.name}/{target.name}")

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
        self._storing.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()
        self._storing.__exit__(kind, error, trace)


@contextmanager
def storing(name: str) -> Iterator[None]:
    """A disk without room within this block is told by the name of what was written: `ColaError(STORAGE_FULL)`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes files itself, and has the number in its text alone.
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else told and int(told[1])
        if number not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ColaError(Reason.STORAGE_FULL, file=name) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _weights(folder: Path) -> Path:
    (weights,) = folder.glob("*.safetensors")
    return weights


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(record: FileObject | Checkpoint, problem: str) -> ColaError:
    name = record.id if isinstance(record, Checkpoint) else f"{record.id} ({record.filename})"
    return ColaError(Reason.INVALID_FILE, file=name, problem=problem)


def _checked(prefix: Literal["file", "ftckpt", "ftjob"], id: str) -> str:
    """The id, safe to name a path with. What is no id names nothing that is here."""
    if not ids.valid(prefix, id):
        reason, field = _UNKNOWN[prefix]
        raise ColaError(reason, **{field: id})
    return id
