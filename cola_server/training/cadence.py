"""When a job's next snapshot is due."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SnapshotLimits:
    """A snapshot is due when the first of the three is reached."""

    steps: int = 50
    """0: no snapshots but those of planned moves."""
    seconds: float = 60.0
    """Work that may be lost."""
    ratio: float = 0.1
    """Of a job's bytes, those of its snapshots: as long as they stay below it, another one may be taken."""


class Cadence:
    """Counts a job's steps since its last snapshot, which weighs about `state_bytes`."""

    def __init__(self, limits: SnapshotLimits, state_bytes: int) -> None:
        self._limits = limits
        self._state_bytes = state_bytes
        self._reported = False
        self.taken()

    def taken(self) -> None:
        """The job is at a snapshot now."""
        self._steps, self._seconds, self._bytes = 0, 0.0, 0

    def stepped(self, seconds: float, nbytes: int) -> None:
        """A step was so much work, other jobs' time not counted, and moved so many bytes to and from the workers."""
        self._steps += 1
        self._seconds += seconds
        self._bytes += nbytes

    @property
    def due(self) -> bool:
        """Whether the next snapshot should be taken."""
        if not self._limits.steps or not self._steps:
            return False
        in_ratio = self._state_bytes <= self._limits.ratio * self._bytes
        return in_ratio or self._steps >= self._limits.steps or self._seconds >= self._limits.seconds

    def excess(self) -> str | None:
        """That a snapshot which is due is more than its share of the job's bytes; told once."""
        if self._reported or self._state_bytes <= self._limits.ratio * self._bytes:
            return None
        self._reported = True
        share = self._state_bytes / max(1, self._bytes)
        return (
            f"Snapshots are {share:.0%} of this job's bytes, more than the {self._limits.ratio:.0%} asked for: "
            f"one is due after {self._limits.steps} steps or {self._limits.seconds:g} s."
        )
