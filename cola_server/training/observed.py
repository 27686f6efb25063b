"""How fast this server has been lately: what a job's time is told from."""

WEIGHT = 0.05
"""Of the newest observation: a few dozen steps make the average, whatever jobs they are of."""


class Observed:
    """Averages. Written on the event loop; any thread may read."""

    def __init__(self) -> None:
        self._token_seconds: dict[str, float] = {}
        self._byte_seconds: float | None = None

    def passed(self, model: str, tokens: int, seconds: float) -> None:
        """A job's batch of so many padded tokens took its part of a pass through the model."""
        self._token_seconds[model] = _average(self._token_seconds.get(model), seconds / tokens)

    def waited(self, nbytes: int, seconds: float) -> None:
        """A step moved so many bytes, and waited so long for its deltas once its last batch had passed."""
        self._byte_seconds = _average(self._byte_seconds, seconds / nbytes)

    def seconds(self, model: str, tokens: float, nbytes: float) -> float | None:
        """How long it takes to pass so many tokens and to move so many bytes; None where the like was never seen."""
        each = self._token_seconds.get(model)
        if each is None or self._byte_seconds is None:
            return None
        return tokens * each + nbytes * self._byte_seconds


def _average(so_far: float | None, value: float) -> float:
    return value if so_far is None else so_far + WEIGHT * (value - so_far)
