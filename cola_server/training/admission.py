"""Which jobs may run at once: those whose memory fits beside that of the others. Bytes are counted, not jobs."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

SHARE = 0.8
"""Of what is free: allocators leave holes, and what they were asked for is what is counted."""
LARGEST_PASS = 0.5
"""Of the memory: the rest is for what jobs keep."""
COHORT_TOKENS = {"cpu": 512, "cuda": 2048}
"""Padded tokens of a pass, by device. A core's pass is not faster with more, and from some 2,000 on slower: activations
leave the caches. An accelerator's is.
"""

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


class Admission:
    """Who has memory now. Not thread-safe."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        """For all jobs together."""
        self._taken: dict[str, int] = {}

    def fits(self, bytes: int) -> bool:
        """Whether a job of so many bytes may run beside those that do."""
        return sum(self._taken.values()) + bytes <= self.memory_bytes

    def take(self, job: str, bytes: int) -> None:
        """The job runs."""
        self._taken[job] = bytes

    def release(self, job: str) -> None:
        """It runs no more."""
        self._taken.pop(job, None)


def share_out(memory_bytes: int, cohort_tokens: int, token_bytes: Iterable[int]) -> tuple[int, int]:
    """Divides memory between the pass that is under way and what jobs keep.

    `token_bytes` are what the models take for each token that passes. Returns: tokens of a cohort, as many of
    `cohort_tokens` as `LARGEST_PASS` allows; and bytes for jobs.
    """
    each = max(token_bytes)
    tokens = max(1, min(cohort_tokens, int(LARGEST_PASS * memory_bytes) // each))
    return tokens, max(0, memory_bytes - tokens * each)


def free_bytes(device: torch.device, meminfo: Path = _MEMINFO, group: Path = _GROUP) -> int:
    """What is free now: of the accelerator's memory, or of the machine's or the container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    assert found is not None, "every kernel since 3.14 tells"
    return min(int(found[1]) * 1024, *_in_group(group))


def _in_group(group: Path) -> list[int]:
    """What the container may still take. As kubelet counts its working set: file pages that were not used lately are
    given back for the asking.
    """
    limit = group / "memory.max"
    text = limit.read_text().strip() if limit.exists() else "max"
    if text == "max":
        return [2**63]
    used = int((group / "memory.current").read_text())
    idle = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    return [max(0, int(text) - used + (int(idle[1]) if idle else 0))]
