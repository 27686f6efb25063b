"""A server and its workers as processes on loopback, as their users start them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cola_common.client import Client
from tests.support.disk import SmallDisk

START_SECONDS = 50.0
STOP_SECONDS = 20.0


class Daemon:
    """One process, with its output in a file. `before` is the command that starts it, if another one is to."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", module, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
            )

    def stop(self) -> int:
        """SIGTERM, and its exit status; SIGKILL where it does not go."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not stop within {STOP_SECONDS} s:\n{self.tail()}") from None

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def resident_bytes(self) -> int:
        """The memory that it has now."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def waited_seconds(self) -> float:
        """How long its threads could have run and had no core, as others had them: none on a machine of its own."""
        stats = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(each.read_text().split()[1]) for each in stats) / 1e9

    def said(self) -> str:
        """All that it, and what ran under its name before it, printed."""
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        """The end of that."""
        return self.said()[-4000:]


class Cluster:
    """A context manager: a server with `models` (name -> folder), and workers, all with data folders under `root`.

    With a `disk` the server's data folder is that, which must be open.
    """

    server_module = "cola_server"

    def __init__(
        self,
        root: Path,
        models: Mapping[str, Path],
        *,
        workers: int = 1,
        flags: Sequence[str] = (),
        client_token: str | None = None,
        disk: SmallDisk | None = None,
    ) -> None:
        self.root = root
        self.models = dict(models)
        self.data = root / "server" if disk is None else disk.inside
        """The server's data folder, as this process sees it."""
        self.disk = disk
        self.flags = list(flags)
        """Of the server, when it starts next."""
        self._count = workers
        self._token = client_token
        self.address = ""
        self.workers: list[Daemon] = []
        root.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        try:
            self.start_server()
            for number in range(self._count):
                self.start_worker(f"worker-{number}")
            if self._count:
                self.await_workers(self._count)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_server(self, listen: str = "", *, failpoint: str = "") -> None:
        """Starts the server and waits until it serves: where it was before, if it was there before."""
        self.launch_server(listen, failpoint=failpoint)
        deadline = time.monotonic() + START_SECONDS
        while not (self.data / "address").exists():
            assert self.server.process.poll() is None, f"the server ended:\n{self.server.tail()}"
            assert time.monotonic() < deadline, f"the server does not serve:\n{self.server.tail()}"
            time.sleep(0.05)
        self.address = (self.data / "address").read_text()

    def launch_server(self, listen: str = "", *, failpoint: str = "") -> None:
        """Starts the server and waits for nothing."""
        (self.data / "address").unlink(missing_ok=True)
        models = [f"--model={name}={path}" for name, path in self.models.items()]
        listen = listen or self.address or "127.0.0.1:0"
        folder = self.root / "server" if self.disk is None else self.disk.folder
        self.server = Daemon(
            self.server_module,
            [*models, f"--listen={listen}", f"--data-dir={folder}", "--device=cpu", *self.flags],
            self.root / "server.log",
            env={"COLA_FAILPOINT": failpoint},
            before=() if self.disk is None else self.disk.command,
        )

    def start_worker(
        self,
        name: str,
        flags: Sequence[str] = (),
        *,
        via: str = "",
        failpoint: str = "",
        faulty: bool = False,
        plain: bool = False,
    ) -> Daemon:
        """Starts a worker with a data folder of that name, which reaches the server at `via` if that is given. A
        `faulty` one does what `misbehave` asks it to, a `plain` one knows no reductions and few codecs.
        """
        worker = Daemon(
            "tests.support.faulty_worker" if faulty else "tests.support.plain_worker" if plain else "cola_worker",
            [f"--server={via or self.address}", f"--data-dir={self.root / name}", *flags],
            self.root / f"{name}.log",
            env={"COLA_FAILPOINT": failpoint},
        )
        self.workers.append(worker)
        return worker

    def misbehave(self, name: str, faults: str) -> None:
        """From now on the faulty worker of that name does so; see `tests.support.faulty_worker`."""
        partial = self.root / name / "faults.partial"
        partial.parent.mkdir(exist_ok=True)
        partial.write_text(faults)
        partial.rename(partial.with_suffix(""))

    def worker_id(self, name: str) -> str:
        """The id of the worker with that data folder, once it has one."""
        return (self.root / name / "worker-id").read_text().strip()

    def await_workers(self, count: int) -> None:
        """Waits until so many workers attend."""
        deadline = time.monotonic() + START_SECONDS
        with self.client() as client:
            while sum(worker.status == "attending" for worker in client.workers.list()) != count:
                for worker in self.workers:
                    assert worker.process.poll() is None, f"a worker ended:\n{worker.tail()}"
                assert time.monotonic() < deadline, f"no {count} workers:\n{self.server.tail()}"
                time.sleep(0.05)

    def client(self) -> Client:
        """A client of this server."""
        return Client(self.address, token=self._token)

    def stop(self) -> None:
        """Ends all processes; workers first, so that they say Goodbye."""
        for daemon in (*self.workers, self.server):
            if daemon.process.poll() is None:
                daemon.thaw()
                daemon.process.send_signal(signal.SIGTERM)
        for daemon in (*self.workers, self.server):
            daemon.stop()
