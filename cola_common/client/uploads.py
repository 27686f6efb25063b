"""What can be uploaded: a path, bytes, an open file, or an adapter's folder, which travels as one archive."""

import io
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

from cola_common.errors import ColaError, Reason

FileSource = str | os.PathLike[str] | bytes | tuple[str, bytes] | BinaryIO

# The two layouts of an adapter, weights last: PEFT's, and ColA's own for families that PEFT does not know.
_LAYOUTS = (
    ("adapter_config.json", "adapter_model.safetensors"),
    ("cola_adapter.json", "cola_adapter.safetensors"),
)


@final
@dataclass(frozen=True)
class Upload:
    """An open file, the name that it goes by, and where its content starts: there, too, when an upload is repeated."""

    name: str
    file: BinaryIO
    start: int = 0


@contextmanager
def opened(source: FileSource) -> Iterator[Upload]:
    """A source, open for reading. A folder is taken as an adapter's.

    Raises: `OSError`; `ColaError(INVALID_ADAPTER)` for a folder that holds no adapter.
    """
    if isinstance(source, tuple | bytes):
        name, content = source if isinstance(source, tuple) else ("upload", source)
        yield Upload(name, io.BytesIO(content))
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            with tempfile.TemporaryFile() as archive:
                pack(path, archive)
                archive.seek(0)
                yield Upload(f"{path.resolve().name}.zip", archive)
        else:
            with path.open("rb") as file:
                yield Upload(path.name, file)
    else:
        yield Upload(Path(str(source.name)).name, source, source.tell())


def pack(folder: Path, archive: BinaryIO) -> None:
    """Writes the adapter in `folder` to `archive`: a ZIP without compression, of its layout's two files and no others.

    Raises: `OSError`; `ColaError(INVALID_ADAPTER)`.
    """
    layout = next((names for names in _LAYOUTS if all((folder / name).is_file() for name in names)), None)
    if layout is None:
        wanted = " nor ".join(" with ".join(names) for names in _LAYOUTS)
        raise ColaError(Reason.INVALID_ADAPTER, source=folder, problem=f"the folder holds neither {wanted}")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED, strict_timestamps=False) as packed:
        for name in layout:
            # One date for all: the same adapter gives the same bytes.
            member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            with (folder / name).open("rb") as file, packed.open(member, "w", force_zip64=True) as entry:
                while chunk := file.read(1 << 20):
                    entry.write(chunk)
