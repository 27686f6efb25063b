"""A server and its workers as processes of this machine, for the demo."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, final

from cola_common.errors import ColaError, Reason

START_SECONDS = 180.0  # torch and a model of a few GB, read from a cold disk
STOP_SECONDS = 15.0  # what a daemon that drains may take before it is killed
LOG_TAIL_LINES = 15

# The daemons share the cores: a thread that waits must sleep, or it takes the time of the one it waits for.
SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}


@final
class Daemons:
    """Processes with a data folder and a log each; all of them end with the `with` block."""

    def __init__(self, data: Path, logs: Path) -> None:
        self._data = data
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._closing = threading.Event()
        self.failure: ColaError | None = None
        """Set once a daemon has ended by itself."""

    def start_server(self, model: str, path: str, *, split_jobs: int) -> str:
        """Starts `cola-server` on a free port of loopback and waits until it serves; returns its address.

        Raises: `ColaError(INTERNAL)` with the end of its log.
        """
        folder = self._data / "server"
        folder.mkdir(parents=True)
        flags = ["--model", f"{model}={path}", "--listen", "127.0.0.1:0", "--split-jobs", str(split_jobs)]
        process = self._start("server", "cola_server", [*flags, "--data-dir", str(folder)])
        bound = folder / "address"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if bound.exists() and (address := bound.read_text(encoding="utf-8").strip()):
                return address
            try:
                process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            break
        raise self._ended("server")

    def start_worker(self, name: str, server: str) -> None:
        """Starts `cola-worker` with one thread: the demo's server and workers share one machine's cores."""
        folder = self._data / name
        folder.mkdir(parents=True)
        self._start(name, "cola_worker", ["--server", server, "--data-dir", str(folder), "--threads", "1"])

    def watch(self, on_failure: Callable[[], None]) -> dict[str, threading.Thread]:
        """Calls `on_failure` once, from another thread, when a daemon ends before the block does.

        Returns: a thread for each daemon, which ends with it.
        """
        once = threading.Lock()

        def wait(name: str, process: subprocess.Popen[bytes]) -> None:
            process.wait()
            with once:
                if self.failure is None and not self._closing.is_set():
                    self.failure = self._ended(name)
                    on_failure()

        threads = {
            name: threading.Thread(target=wait, args=(name, process), name=f"watch-{name}", daemon=True)
            for name, process in self._running.items()
        }
        for thread in threads.values():
            thread.start()
        return threads

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        processes = list(reversed(self._running.values()))  # workers before the server: they say goodbye
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, name: str, module: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        self._logs.mkdir(parents=True, exist_ok=True)
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**SHARED_CORES, **os.environ},
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends its daemons in order
            )
        self._running[name] = process
        return process

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _ended(self, name: str) -> ColaError:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        code = self._running[name].poll()
        state = f"did not serve within {START_SECONDS:g} s" if code is None else f"ended with status {code}"
        problem = "\n".join([f"{name} {state}; the end of {self._log(name)}:", *lines])
        return ColaError(Reason.INTERNAL, problem=problem)
