"""What this machine can carry, as a worker tells it. Linux."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cola_common.adapters import build
from cola_common.families import Lora
from cola_common.messages import Capacity

MEASURE_SECONDS = 0.1  # as long as the period in which a container's share of its cores is dealt out
MEASURES = 3  # the best counts: a machine is at its busiest when it starts its workers
# A gradient as a job has it most often: thin products of a batch's rows, which come from memory and not from a cache.
FAMILY = Lora(r=8, scale=1.0)
ROWS = 256
WIDTH = 1024

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
    return max(_measured() for _ in range(MEASURES))


def _measured() -> float:
    adapter = build(FAMILY, WIDTH, WIDTH)
    parameters = {name: torch.ones(shape) for name, shape in adapter.shapes().items()}
    x_ND, g_NO = torch.ones(ROWS, WIDTH), torch.ones(ROWS, WIDTH)
    adapter.vjp(parameters, x_ND, g_NO)  # the first one pays for threads and code
    gradients, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < MEASURE_SECONDS:
        adapter.vjp(parameters, x_ND, g_NO)
        gradients += 1
    return gradients * adapter.cost(ROWS).vjp_flops / seconds / 1e9
