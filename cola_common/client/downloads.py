"""A checkpoint's folder as it comes in: every chunk checked, nothing in place before all of it is there."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO, final

import xxhash

from cola_common.errors import ColaError, Reason

# A name from outside becomes a file: letters, digits and a few marks, no leading dot, no folders.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@final
class IncomingFolder:
    """Writes a download's chunks to a hidden folder beside its target and renames that when it is whole.

    Raises: `FileExistsError` where the target is a file or a folder that is not empty.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} is there already and not empty; give the name of a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        self._name = ""
        self._file: BinaryIO | None = None
        self._written = 0
        self._size = 0

    def take(self, path: str, file_bytes: int, offset: int, data: bytes, checksum: int) -> None:
        """Adds one chunk. Files come one after the other, each from its first byte to its last.

        Raises: `ColaError(CHECKSUM_MISMATCH)`; `ColaError(PROTOCOL_VIOLATION)` for a chunk that is not the next one.
        """
        if xxhash.xxh3_64_intdigest(data) != checksum:
            raise ColaError(Reason.CHECKSUM_MISMATCH, what=f"{path!r} at byte {offset}")
        if self._file is None or path != self._name:
            self._end_file()
            if not _NAME.fullmatch(path):
                raise _violation(f"a checkpoint's file is called {path!r}")
            self._name, self._size, self._written = path, file_bytes, 0
            try:
                self._file = (self._folder / path).open("xb")
            except FileExistsError:
                raise _violation(f"{path} was sent twice") from None
        if file_bytes != self._size or offset != self._written or offset + len(data) > self._size:
            raise _violation(f"{path}: {len(data)} bytes at {offset}; next is byte {self._written} of {self._size}")
        self._file.write(data)
        self._written += len(data)

    def finish(self) -> Path:
        """Puts the folder in its place and returns that.

        Raises: `ColaError(PROTOCOL_VIOLATION)` where the last file is not whole, or there is none.
        """
        if self._file is None:
            raise _violation("a checkpoint without files")
        self._end_file()
        _sync(self._folder)
        self._folder.chmod(0o755)  # mkdtemp's folders are for their owner alone
        self._folder.rename(self._target)
        _sync(self._target.parent)
        return self._target

    def discard(self) -> None:
        """Removes what is not in place yet; after `finish`, nothing."""
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end_file(self) -> None:
        if self._file is None:
            return
        if self._written != self._size:
            raise _violation(f"{self._name} ended at byte {self._written} of {self._size}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _violation(problem: str) -> ColaError:
    return ColaError(Reason.PROTOCOL_VIOLATION, problem=problem)
