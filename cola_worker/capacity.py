"""What this machine can carry, as a worker tells it. Linux."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cola_common.messages import Capacity

MEASURE_SECONDS = 0.2  # placement compares workers by it: a few per cent of noise do no harm
SIZE = 512  # of the matrices: three of them fit into a core's cache, as the products of a shard do

# Where a container's memory limit is read: cgroup 2, cgroup 1.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def measure(threads: int) -> Capacity:
    """Takes `MEASURE_SECONDS`; to be called when torch has its `threads`."""
    return Capacity(cores=threads, memory_bytes=memory_bytes(), device="cpu", gflops=_gflops())


def memory_bytes(meminfo: Path = Path("/proc/meminfo"), limits: tuple[Path, ...] = _LIMITS) -> int:
    """What is free now, or the container's limit where that is less."""
    free = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    assert free is not None, "every kernel since 3.14 tells"
    return min(int(free[1]) * 1024, *_read(limits), 2**63)


def _read(limits: tuple[Path, ...]) -> Iterator[int]:
    for path in limits:
        text = path.read_text().strip() if path.exists() else "max"
        if text != "max":
            yield int(text)


def _gflops() -> float:
    a, b = torch.ones(SIZE, SIZE), torch.ones(SIZE, SIZE)
    torch.mm(a, b)  # the first product pays for threads and code
    products, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < MEASURE_SECONDS:
        torch.mm(a, b)
        products += 1
    return products * 2 * SIZE**3 / seconds / 1e9
