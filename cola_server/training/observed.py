"""How fast this server has been lately: what a job's time is told from."""

WEIGHT = 0.05
"""Of the newest observation: a few dozen steps make the average, whatever jobs they are of."""


class Observed:
    """Averages. Written on the event loop; any thread may read."""

    def __init__(self) -> None:
        self._token_seconds: dict[str, float] = {}
        self._wait_seconds: float | None = None
        self.rate: float | None = None
        """Bytes/s to the fastest worker that a job has lately found."""

    def passed(self, model: str, tokens: int, seconds: float) -> None:
        """A job's batch of so many padded tokens took its part of a pass through the model."""
        self._token_seconds[model] = _average(self._token_seconds.get(model), seconds / tokens)

    def waited(self, seconds: float) -> None:
        """A step waited so long for its deltas once its last batch had passed."""
        self._wait_seconds = _average(self._wait_seconds, seconds)

    def link(self, rate: float) -> None:
        """A job has found its best way to a worker so fast."""
        self.rate = rate

    def pass_seconds(self, model: str, tokens: float) -> float | None:
        """How long so many padded tokens take in the model; None where none have passed yet."""
        each = self._token_seconds.get(model)
        return None if each is None else tokens * each

    def seconds(self, model: str, tokens: float, steps: int, nbytes: float) -> float | None:
        """How long so many steps take that pass so many tokens in all, and move so many bytes each; None where the like
        was never seen. A step waits for as long as others have, or for its bytes where those take longer.
        """
        passing = self.pass_seconds(model, tokens)
        if passing is None or self._wait_seconds is None:
            return None
        return passing + steps * max(self._wait_seconds, nbytes / self.rate if self.rate else 0.0)


def _average(so_far: float | None, value: float) -> float:
    return value if so_far is None else so_far + WEIGHT * (value - so_far)
