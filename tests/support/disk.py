"""A disk of a few MiB that a daemon can fill: a tmpfs in a mount namespace of its own, so that nothing here sees it."""

import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self


class SmallDisk:
    """A context manager: `folder` is the disk to processes that are started with `command` before their own; to all
    others it is an empty folder, and `inside` is the way to the files.
    """

    def __init__(self, folder: Path, *, mebibytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._size = mebibytes

    def __enter__(self) -> Self:
        mount = f'mount -t tmpfs -o size={self._size}m none "$1" && echo mounted && exec sleep infinity'
        self._holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(self.folder)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"mounted\n"
        pid = self._holder.pid
        self.command = ["nsenter", f"--target={pid}", "--user", "--mount", "--preserve-credentials", "--wd"]
        self.inside = Path(f"/proc/{pid}/root{self.folder}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.kill()
        self._holder.communicate()

    def fill(self) -> None:
        """Leaves no byte free."""
        with (self.inside / "ballast").open("ab", buffering=0) as file:
            room = os.statvfs(self.inside)
            file.write(bytes(room.f_bavail * room.f_frsize))

    def free(self) -> None:
        """Takes back what `fill` took."""
        (self.inside / "ballast").unlink(missing_ok=True)
