"""A slow link of the kernel's own making: a network namespace behind a veth pair, with a token bucket at both ends.

Needs Linux, root, and the commands `ip` and `tc` (Debian's package iproute2). Names carry this process' id, so that
several may be used at once, and what a killed one left is told apart.
"""

import os
import shutil
import subprocess
from types import TracebackType
from typing import Self

NEEDED = ("ip", "tc")

QUEUE_SECONDS = 0.05
"""What may wait at an end of the link before packets are dropped: as in a switch, and TCP finds its rate by it."""


class Link:
    """A context manager: a namespace that is reached over a link of its own. `outside` is this side's address, `inside`
    that of the namespace; a command starts there behind `command`.
    """

    def __init__(self) -> None:
        pid = os.getpid()
        self.name = f"cola-{pid}"
        # 198.18.0.0/15 is set aside for measurements (RFC 2544): no network that is in use has it.
        net = f"198.{18 + pid // 16384 % 2}.{pid // 64 % 256}.{pid % 64 * 4}"
        first, _, last = net.rpartition(".")
        self.outside = f"{first}.{int(last) + 1}"
        self.inside = f"{first}.{int(last) + 2}"
        self.command = ["ip", "netns", "exec", self.name]
        self._ends = f"cola{pid}o", f"cola{pid}i"

    def __enter__(self) -> Self:
        missing = [each for each in NEEDED if shutil.which(each) is None]
        if missing:
            raise FileNotFoundError(f"{' and '.join(missing)}: install iproute2")
        outer, inner = self._ends
        try:
            _run("ip", "netns", "add", self.name)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
            _run("ip", "link", "set", inner, "netns", self.name)
            _run("ip", "address", "add", f"{self.outside}/30", "dev", outer)
            _run(*self.command, "ip", "address", "add", f"{self.inside}/30", "dev", inner)
            _run("ip", "link", "set", outer, "up")
            _run(*self.command, "ip", "link", "set", inner, "up")
            _run(*self.command, "ip", "link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def limit(self, rate: float) -> None:
        """From now on the link carries so many bits a second each way."""
        # The burst is what a millisecond carries, and no less than the largest packet that the kernel hands over: those
        # that are larger it cuts first, which costs time and changes nothing.
        burst = max(1 << 16, int(rate / 8 / 1000))
        bucket = f"root tbf rate {rate:.0f}bit burst {burst} latency {QUEUE_SECONDS * 1000:.0f}ms".split()
        outer, inner = self._ends
        _run("tc", "qdisc", "replace", "dev", outer, *bucket)
        _run(*self.command, "tc", "qdisc", "replace", "dev", inner, *bucket)

    def _remove(self) -> None:
        # The namespace takes its end of the pair with it, and that the other; both are told, whichever there was.
        subprocess.run(["ip", "link", "delete", self._ends[0]], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
