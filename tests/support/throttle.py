"""A process that is as slow as if its machine were: stopped for most of each slice of time, and going on for the rest.

What `cpulimit` does, and unlike a sleep in its code it slows down everything: numerics, event loop, and heartbeats.
"""

import subprocess
import threading
from signal import SIGCONT, SIGSTOP
from types import TracebackType
from typing import Self

SLICE_SECONDS = 0.1  # far below any lease, and above what a scheduler makes of a sleep


class Throttle:
    """A context manager: `process` runs 1/`times` of the time."""

    def __init__(self, process: "subprocess.Popen[bytes]", times: float) -> None:
        self._process = process
        self._on = SLICE_SECONDS / times
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            self._process.send_signal(SIGSTOP)
            self._over.wait(SLICE_SECONDS - self._on)
            self._process.send_signal(SIGCONT)
            self._over.wait(self._on)
