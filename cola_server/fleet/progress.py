"""Whether a worker's trainer goes on, from what its heartbeats say: they come while it hangs, too."""

from cola_common.messages import Heartbeat

SHORTEST_SECONDS = 10.0
"""No message is waited for less: with two heartbeats on top, a hang is noticed within 20 s."""
LONGEST_SECONDS = 60.0
"""No message is waited for longer, however slow the worker is."""
PATIENCE = 8
"""How much longer than the longest message so far one may take: another job's may be that much larger."""


class Progress:
    """One worker process, over all its streams. It counts only what the worker told: while a heartbeat waits behind a
    long delta, the trainer may well be at the next message.
    """

    def __init__(self, boot: int) -> None:
        self.boot = boot
        self._longest = 0.0
        """The longest that a message took and was done."""
        self._done = 0
        self._busy = 0.0

    def begin(self) -> None:
        """A new stream begins, with a trainer that counts from 0."""
        self._done, self._busy = 0, 0.0

    def beat(self, heartbeat: Heartbeat) -> str | None:
        """Takes a heartbeat. Returns: what is wrong, where the trainer has been at one message for too long."""
        if heartbeat.progress != self._done:  # the message that the last heartbeat told of is done
            self._longest = max(self._longest, self._busy)
        self._done, self._busy = heartbeat.progress, heartbeat.busy_seconds
        if self._busy <= self._deadline():
            return None
        # A process comes back only when its trainer got through: then it was slow, and must not be sent away for that
        # again and again.
        self._longest = max(self._longest, self._busy)
        return f"its trainer has been at one message for {self._busy:.0f} s"

    def _deadline(self) -> float:
        return min(max(PATIENCE * self._longest, SHORTEST_SECONDS), LONGEST_SECONDS)
