"""Uploads: what may come in, checked as it comes. Nothing is ever unpickled, and nothing is opened by a peer's name."""

import contextlib
import hashlib
import re
import shutil
import stat
import struct
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, Self

from cola_common import ids
from cola_common.errors import ColaError, Reason
from cola_common.jobs import FileObject
from cola_server.jobs import jsonl
from cola_server.jobs.artefacts import Artefacts
from cola_server.jobs.store import JobStore

Purpose = Literal["fine-tune", "adapter"]

MAX_NAME = 255
"""As file systems have it."""

MAX_CONFIG_BYTES = 1 << 20
"""An adapter's JSON names its modules at most: 1 MiB is thousands of them."""

ADAPTERS = (
    {"adapter_config.json", "adapter_model.safetensors"},
    {"cola_adapter.json", "cola_adapter.safetensors"},
)
"""The members that a zip of an adapter has: PEFT's format or the project's own."""
WANTED = " or ".join(" and ".join(sorted(names)) for names in ADAPTERS)

MAX_TABLE_BYTES = 4096
"""The table of contents of such a zip takes under 300 bytes; extra fields may double it."""

# First bytes of formats that run code when they are opened, or expand to any size. A pickle begins with PROTO and its
# protocol's number; the zip is that of .pt and .npz, and fine only as an adapter.
ZIP = b"PK\x03\x04"
MAGIC: dict[bytes, str] = {
    **{bytes([0x80, protocol]): "pickle" for protocol in range(2, 6)},
    ZIP: "zip archive",
    b"PK\x05\x06": "zip archive",
    b"\x93NUMPY": "NumPy array",
    b"\x89HDF\r\n\x1a\n": "HDF5 file",
    b"\x1f\x8b": "gzip archive",
    b"\x28\xb5\x2f\xfd": "zstd archive",
    b"\xfd7zXZ\x00": "xz archive",
    b"BZh": "bzip2 archive",
    b"GGUF": "GGUF model",
}
SUFFIXES = {
    ".pkl": "pickle", ".pickle": "pickle", ".joblib": "pickle", ".pt": "PyTorch archive", ".pth": "PyTorch archive",
    ".ckpt": "PyTorch archive", ".bin": "PyTorch archive", ".npz": "NumPy archive", ".npy": "NumPy array",
    ".h5": "HDF5 file", ".gz": "gzip archive", ".zst": "zstd archive",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """The largest upload of each purpose, in bytes."""

    fine_tune: int = 512 << 20
    adapter: int = 2 << 30


class Upload:
    """A file that is coming in: `write` its bytes, then `finish`. A `with` block that ends before leaves nothing; it
    raises `ColaError(STORAGE_FULL)` where the disk has no room.
    """

    def __init__(
        self,
        store: JobStore,
        artefacts: Artefacts,
        filename: str,
        purpose: str,
        idempotency_key: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Raises: `ColaError(UNSAFE_NAME | UNSAFE_FORMAT | INVALID_FILE)` for the name or the purpose."""
        self._name = check_name(filename)
        if purpose not in ("fine-tune", "adapter"):
            problem = f"purpose is 'fine-tune' or 'adapter', not {purpose[:60]!r}"
            raise ColaError(Reason.INVALID_FILE, file=filename, problem=problem)
        self._purpose: Purpose = "fine-tune" if purpose == "fine-tune" else "adapter"
        limits = limits or Limits()
        self._limit = limits.fine_tune if self._purpose == "fine-tune" else limits.adapter
        self._key = idempotency_key
        self._store = store
        self._artefacts = artefacts
        self._id = ids.new("file")
        self._staged = artefacts.new_file(self._id)
        self._out = self._staged.path.open("wb")
        self._head = b""
        self._bytes = 0
        self._digest = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Takes the next bytes. Raises: `ColaError(FILE_TOO_LARGE)`; `ColaError(UNSAFE_FORMAT)` as soon as it shows."""
        self._bytes += len(chunk)
        if self._bytes > self._limit:
            raise ColaError(Reason.FILE_TOO_LARGE, file=self._name, limit=self._limit)
        if len(self._head) < HEAD_BYTES:
            self._head += chunk[:HEAD_BYTES]
            check_format(self._name, self._purpose, self._head)
        self._digest.update(chunk)
        self._out.write(chunk)

    def finish(self) -> FileObject:
        """Checks the whole, and keeps it. Returns: its record, or that of the file that the same key made before.

        Raises: `ColaError(INVALID_DATASET | UNSAFE_FORMAT | INVALID_FILE | UNSAFE_NAME)`.
        """
        self._out.close()
        if self._purpose == "fine-tune":
            jsonl.survey(self._staged.path, self._name)
        else:
            with self._artefacts.new_adapter(self._id) as adapter:
                unpack_adapter(self._staged.path, self._name, adapter.path)
                adapter.publish()
        self._staged.publish()
        made = FileObject(
            id=self._id,
            filename=self._name,
            purpose=self._purpose,
            bytes=self._bytes,
            created_at=time.time(),
            digest=self._digest.hexdigest(),
        )
        try:
            kept = self._store.add_file(made, self._key)
        except ColaError:
            self._artefacts.remove(self._id)
            raise
        if kept.id != self._id:
            self._artefacts.remove(self._id)
        return kept

    def __enter__(self) -> Self:
        self._staged.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what finds no room now has been told, or is not wanted
            self._out.close()
        self._staged.__exit__(kind, error, trace)


HEAD_BYTES = max(len(magic) for magic in MAGIC)


def check_name(name: str) -> str:
    """A plain file name, of no format that is never opened. Names are told to users; no path is made of them.

    Raises: `ColaError(UNSAFE_NAME)`, `ColaError(UNSAFE_FORMAT)`.
    """
    plain = (
        0 < len(name.encode(errors="replace")) <= MAX_NAME
        and name not in (".", "..")
        and re.search(r"[/\\]", name) is None
        and name.isprintable()  # no NUL, no control characters, no half surrogates
    )
    if not plain:
        raise ColaError(Reason.UNSAFE_NAME, name=name[:MAX_NAME])
    if (format := SUFFIXES.get(Path(name).suffix.lower())) is not None:
        raise ColaError(Reason.UNSAFE_FORMAT, file=name, format=format)
    return name


def check_format(name: str, purpose: Purpose, head: bytes) -> None:
    """Refuses by a file's first bytes. Raises: `ColaError(UNSAFE_FORMAT)`."""
    for magic, format in MAGIC.items():
        if head.startswith(magic) and not (purpose == "adapter" and magic == ZIP):
            raise ColaError(Reason.UNSAFE_FORMAT, file=name, format=format)


def unpack_adapter(path: Path, name: str, folder: Path) -> None:
    """Unpacks the zip of an adapter, stored without compression and with just the members of one of the formats.

    Raises: `ColaError(INVALID_FILE | UNSAFE_FORMAT | UNSAFE_NAME)`; `folder` may then hold a part.
    """
    try:
        _check_directory(path, name)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members, name, path.stat().st_size)
            for member in members:
                with archive.open(member) as source, (folder / member.filename).open("xb") as target:
                    shutil.copyfileobj(source, target)  # no more than file_size, whatever the archive holds
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        _refuse(name, f"not a whole zip archive: {error}")


def _check_directory(path: Path, name: str) -> None:
    """Refuses a table of contents of more than two members before `zipfile` takes memory for it.

    The record at a zip's end (22 bytes): signature, four numbers of 2 bytes, the last of which counts members, the
    table's size and offset in 4 bytes each, and the length of a comment, which has none here. Archives of 4 GiB have
    another in front of it, found by a signature 20 bytes before.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 42))
        end = file.read()
    if len(end) < 42 or end[20:24] != b"PK\x05\x06" or end[:4] == b"PK\x06\x07":
        _refuse(name, "not a plain zip archive")
    members, table_bytes = struct.unpack("<HL", end[30:36])
    if members != 2 or table_bytes > MAX_TABLE_BYTES:
        _refuse(name, f"an adapter is a zip of {WANTED}")


def _check_members(members: list[zipfile.ZipInfo], name: str, size: int) -> None:
    for member in members:
        mode = member.external_attr >> 16
        if (format := SUFFIXES.get(Path(member.filename).suffix.lower())) is not None:
            raise ColaError(Reason.UNSAFE_FORMAT, file=name, format=format)
        if member.filename not in set.union(*ADAPTERS):
            _refuse(name, f"{check_name(member.filename)!r} does not belong into an adapter")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            _refuse(name, f"{member.filename} is no regular file")
        if member.flag_bits & 0x1:
            _refuse(name, f"{member.filename} is encrypted")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            _refuse(name, f"{member.filename} is compressed; store it")
        if member.file_size > size or (member.filename.endswith(".json") and member.file_size > MAX_CONFIG_BYTES):
            _refuse(name, f"{member.filename} is too large")
    names = [member.filename for member in members]
    if len(names) != len(set(names)) or set(names) not in ADAPTERS:
        _refuse(name, f"an adapter is a zip of {WANTED}")


def _refuse(name: str, problem: str) -> NoReturn:
    raise ColaError(Reason.INVALID_FILE, file=name, problem=problem)
