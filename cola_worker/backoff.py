"""How long a worker waits before it attends again. Without torch: benchmarks wait by the same rule."""

import random

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 4.0  # a server that is back is served within 5 s, and a thousand workers do not come at once


def wait_seconds(failures: int) -> float:
    """A wait after so many attempts in a row that failed; 0 where the server let the worker in.

    Full jitter: workers that lost a server together must not come back together.
    """
    return random.uniform(0, min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**failures))  # noqa: S311
