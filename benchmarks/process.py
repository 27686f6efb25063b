"""Processes beside a benchmark: on which core they run, what they have used, and children that answer in lines."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

TICKS = os.sysconf("SC_CLK_TCK")


def on_core(core: int) -> list[str]:
    """What a command is put behind to run on that core alone."""
    return ["taskset", "-c", str(core)]


def pin(pid: int, core: int) -> None:
    """Keeps a process, with its threads and those to come, on one core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, with its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Child:
    """A context manager: a module in a process of its own, with one thread for numerics. `before` is the command that
    starts it, if another one is to.
    """

    def __init__(self, module: str, flags: Sequence[str], log: Path, before: Sequence[str] = ()) -> None:
        self._log = log
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", module, *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()

    def says(self) -> str:
        """The next line. Raises: `AssertionError` with what it logged, where there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()
        return line.strip()

    def ask(self, line: str = "") -> str:
        """Its answer to a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.says()
