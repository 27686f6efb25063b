"""Fresh databases for tests, fast: migrations run once a process, and what they made is copied."""

import functools
import tempfile
from pathlib import Path

from cola_server.jobs import JobStore


def url_of(folder: Path) -> str:
    """The URL of a folder's database."""
    return f"sqlite:///{folder / 'cola.db'}"


@functools.cache
def _template() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        JobStore(url_of(folder), create=True).close()
        return (folder / "cola.db").read_bytes()


def new_store(folder: Path) -> JobStore:
    """A store whose database is `cola.db` in a folder."""
    (folder / "cola.db").write_bytes(_template())
    return JobStore(url_of(folder), create=False)
