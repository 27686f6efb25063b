"""`python -m tests.support.noting_server --data-dir=DIR …`: `cola-server` that notes who is in each pass.

The file `DIR.passes` has a line for each pass through a model, with the ids of its jobs. `DIR.asks` has one for each
time that a job asks for a pass, with its id and how many lines the other file had.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cola_common.errors import ColaError
from cola_server.cli import main
from cola_server.model import BaseModel, BatchResult, JobBatch, train
from cola_server.training import cohorts
from cola_server.training.numerics import Numerics
from cola_server.training.shares import Shares


def noting(passes: Path, asks: Path) -> None:
    """From now on, `train` and the list of who waits for it write into these files."""
    begun = [0]

    def noted(base: BaseModel, cohort: Sequence[JobBatch]) -> list[BatchResult | ColaError]:
        begun[0] += 1
        with passes.open("a") as out:
            print(*(batch.job for batch in cohort), file=out)
        return train(base, cohort)

    class Waiting(list[cohorts.Request]):
        def append(self, request: cohorts.Request) -> None:
            with asks.open("a") as out:
                print(request.job, begun[0], file=out)
            super().append(request)

    class Cohorts(cohorts.Cohorts):
        def __init__(self, numerics: Numerics, shares: Shares, budget: int) -> None:
            super().__init__(numerics, shares, budget)
            self._waiting = Waiting()

    cohorts.train = noted  # type: ignore[attr-defined]
    cohorts.Cohorts = Cohorts  # type: ignore[misc]


if __name__ == "__main__":
    (folder,) = (word.partition("=")[2] for word in sys.argv if word.startswith("--data-dir="))
    noting(Path(f"{folder}.passes"), Path(f"{folder}.asks"))
    main()
