"""Random faults at jobs under way, run after run: is a step lost, is one taken twice, does an adapter differ?

One server on a small disk, three workers, each behind a proxy of its own. A run is a small job that one to three
faults strike between its first and its last fold; drawn from a seed, as are the moments. Each job's checkpoints are
compared bit for bit with an undisturbed run's, and its steps must be 1..N, under epochs that never decrease: none left
out, and none twice but after a rewind.

    python -m benchmarks.soak [--runs 100] [--seed 0]
"""

import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from cola_common.client import Client
from cola_common.errors import ColaError
from cola_common.jobs import Job, JobEvent, JobStatus
from tests.support.disk import SmallDisk
from tests.support.models import save_tiny
from tests.support.outcome import Outcome, begin, folds, log_of, outcome
from tests.support.troupe import Troupe

STEPS = 120
END_SECONDS = 150.0  # for a job: the worst faults, three times over, take half of it
WORKERS = ("a", "b", "c")
DISK_MEBIBYTES = 48


@dataclass
class Strike:
    """A fault, and how long the job took to get over it; None where it struck after the last fold."""

    kind: str
    at: float
    recovered: float | None = None


@dataclass
class Tally:
    """What all runs came to."""

    faults: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    rewinds: int = 0
    lost: int = 0
    repeated: int = 0
    differing: int = 0
    unfinished: int = 0


class Faults:
    """What can be done to a job's server, workers, links and disk. Each returns when it is done, not when it is healed;
    `heal` puts right what does not heal by itself.
    """

    def __init__(self, troupe: Troupe, disk: SmallDisk, client: Client, random_: random.Random) -> None:
        self._troupe = troupe
        self._disk = disk
        self._client = client
        self._random = random_
        self._frozen: list[tuple[str, float]] = []
        self._cut: list[tuple[str, float]] = []
        self._full = False
        self.kinds: dict[str, Callable[[str], None]] = {
            "kill": self._kill,
            "freeze": self._freeze,
            "hang": lambda owner: troupe.cluster.misbehave(owner, "hang"),
            "cut": self._sever,
            "slow worker": lambda owner: troupe.cluster.misbehave(owner, "slow=0.3"),
            "slow link": self._throttle,
            "duplicate": lambda owner: troupe.cluster.misbehave(owner, "twice late deaf"),
            "delay": self._delay,
            "server kill": self._kill_server,
            "disk full": self._fill,
        }

    def owner(self) -> str | None:
        """The name of a worker that has shards now."""
        ids = {worker.id for worker in self._client.workers.list() if worker.shards}
        return next((name for name in WORKERS if self._troupe.cluster.worker_id(name) in ids), None)

    def tick(self, job: Job) -> None:
        """Ends what has lasted long enough, starts workers that ended, and resumes a job that the disk has paused."""
        now = time.monotonic()
        for name, end in [each for each in self._frozen if each[1] < now]:
            self._frozen.remove((name, end))
            self._troupe.daemons[name].thaw()
        for name, end in [each for each in self._cut if each[1] < now]:
            self._cut.remove((name, end))
            self._troupe.proxies[name].restore()
        for name in WORKERS:
            if self._troupe.daemons[name].process.poll() is not None:
                self._troupe.cluster.misbehave(name, "")
                self._troupe.start(name)
        if self._full and (job.status == JobStatus.PAUSED or self._full_until < now):
            self._full = False
            self._disk.free()
        if job.status == JobStatus.PAUSED and not self._full:
            self._client.fine_tuning.jobs.resume(job.id)

    def heal(self) -> None:
        """All is well again. What hangs is killed: it would end by itself within a minute."""
        for name, _ in self._frozen:
            self._troupe.daemons[name].thaw()
        self._frozen.clear()
        self._cut.clear()
        if self._full:
            self._full = False
            self._disk.free()
        for name in WORKERS:
            if "hang" in (self._troupe.cluster.root / name / "faults").read_text():
                self._troupe.kill(name)
        self._troupe.mend()

    def _kill(self, owner: str) -> None:
        self._troupe.kill(owner)

    def _freeze(self, owner: str) -> None:
        self._troupe.daemons[owner].freeze()
        self._frozen.append((owner, time.monotonic() + self._random.uniform(1, 16)))

    def _sever(self, owner: str) -> None:
        if self._random.random() < 0.5:
            self._troupe.proxies[owner].sever()
        else:
            self._troupe.proxies[owner].cut()
            self._cut.append((owner, time.monotonic() + self._random.uniform(0.5, 16)))

    def _throttle(self, owner: str) -> None:
        self._troupe.proxies[owner].rate = 200_000.0

    def _delay(self, owner: str) -> None:
        self._troupe.proxies[owner].latency = self._random.uniform(0.005, 0.05)

    def _kill_server(self, _owner: str) -> None:
        self._troupe.cluster.server.kill()
        self._troupe.cluster.start_server()

    def _fill(self, _owner: str) -> None:
        self._disk.fill()
        self._full = True
        self._full_until = time.monotonic() + 3


def one_run(
    number: int, troupe: Troupe, faults: Faults, client: Client, random_: random.Random, wanted: Outcome, tally: Tally
) -> str:
    """Returns: what to print of it."""
    planned = sorted(random_.randint(2, STEPS - 10) for _ in range(random_.randint(1, 3)))
    kinds = [random_.choice(list(faults.kinds)) for _ in planned]
    job = begin(client, STEPS)
    strikes: list[Strike] = []
    end = time.monotonic() + END_SECONDS
    while not job.status.terminal and time.monotonic() < end:
        if planned and job.step >= planned[0] and job.step < STEPS and (owner := faults.owner()) is not None:
            planned.pop(0)
            strikes.append(Strike(kinds.pop(0), time.time()))
            faults.kinds[strikes[-1].kind](owner)
        faults.tick(job)
        time.sleep(0.01)
        job = client.fine_tuning.jobs.retrieve(job.id)
    log = log_of(client, job)
    for strike, next_at in zip(strikes, [*(each.at for each in strikes[1:]), math.inf], strict=True):
        strike.recovered = recovery(log, strike.at, next_at)
        if strike.recovered is not None:
            tally.faults[strike.kind] += 1
            tally.recoveries.setdefault(strike.kind, []).append(strike.recovered)
    tally.rewinds += max(0, job.epoch - 1)
    verdict = "the same adapter"
    if job.status != JobStatus.SUCCEEDED:
        tally.unfinished += 1
        verdict = f"{job.status} at step {job.step}: {job.error or log[-1].message}"
        if not job.status.terminal:
            client.fine_tuning.jobs.cancel(job.id)
    else:
        lost, repeated = count_steps(log)
        tally.lost += lost
        tally.repeated += repeated
        if outcome(client, job, troupe.cluster.root / "adapters") != wanted:
            tally.differing += 1
            verdict = "ANOTHER ADAPTER"
    faults.heal()
    told = ", ".join(f"{s.kind} ({'too late' if s.recovered is None else f'{s.recovered:.1f} s'})" for s in strikes)
    return f"{number:4}  {told or 'nothing struck'}: epoch {job.epoch}, {verdict}"


def recovery(log: list[JobEvent], at: float, until: float) -> float | None:
    """Seconds from a fault, which was the only one until `until`, to the fold that shows that it is over; None for one
    that struck after the last fold.
    """
    begins = [e.created_at for e in log if e.type != "metrics" and "step" in e.data and at < e.created_at < until]
    after = [event.created_at for event in folds(log) if event.created_at > (begins[0] if begins else at)]
    if not begins:
        after = after[1:]  # the next one was under way
    return after[0] - at if after else None


def count_steps(log: list[JobEvent]) -> tuple[int, int]:
    """Steps that a job's log passes over, and steps that it has twice though no rewind lies between."""
    at = lost = repeated = 0
    for event in log:
        if event.type == "metrics":
            step = int(event.data["step"])
            lost += max(0, step - at - 1)
            repeated += step <= at
            at = step
        elif "step" in event.data:  # where an attempt begins
            at = int(event.data["step"])
    return lost + STEPS - at, repeated


def show(console: Console, tally: Tally) -> None:
    """The tally for people."""
    table = Table("fault", "struck", "median s to the next fold", "worst")
    for kind, count in sorted(tally.faults.items()):
        seconds = tally.recoveries.get(kind, [])
        table.add_row(kind, str(count), f"{statistics.median(seconds):.2f}" if seconds else "", f"{max(seconds):.2f}")
    every = [value for values in tally.recoveries.values() for value in values]
    table.add_row("all", str(tally.faults.total()), f"{statistics.median(every):.2f}", f"{max(every):.2f}")
    console.print(table)
    console.print(
        f"{tally.rewinds} rewinds; {tally.lost} lost, {tally.repeated} repeated, {tally.differing} differing adapters, "
        f"{tally.unfinished} unfinished"
    )


def main(
    runs: Annotated[int, typer.Option(min=1, help="Jobs.")] = 100,
    seed: Annotated[int, typer.Option(help="Of faults and moments.")] = 0,
) -> None:
    """Soak, print, and write the record. Exit status 1 where a step or an adapter is not as it should be."""
    console, random_, tally = Console(), random.Random(seed), Tally()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = save_tiny("llama", root / "llama")
        with (
            SmallDisk(root / "disk", mebibytes=DISK_MEBIBYTES) as disk,
            Troupe(root / "troupe", model, WORKERS, disk=disk) as troupe,
            troupe.cluster.client() as client,
        ):
            wanted = troupe.undisturbed(client, STEPS)
            faults = Faults(troupe, disk, client, random_)
            for number in range(1, runs + 1):
                try:
                    console.print(
                        one_run(number, troupe, faults, client, random_, wanted, tally), highlight=False, soft_wrap=True
                    )
                except ColaError as error:
                    tally.unfinished += 1
                    console.print(f"{number:4}  {error}")
                    faults.heal()
    if tally.faults:
        show(console, tally)
    write_record(
        "soak",
        {
            "what": (__doc__ or "").splitlines()[0],
            "runs": runs,
            "seed": seed,
            "steps": STEPS,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "faults": tally.faults,
            "seconds_to_the_next_fold": {
                kind: {"median": statistics.median(values), "worst": max(values), "count": len(values)}
                for kind, values in sorted(tally.recoveries.items())
            },
            "rewinds": tally.rewinds,
            "lost": tally.lost,
            "repeated": tally.repeated,
            "differing": tally.differing,
            "unfinished": tally.unfinished,
        },
    )
    sys.exit(1 if tally.lost or tally.repeated or tally.differing or tally.unfinished else 0)


if __name__ == "__main__":
    typer.run(main)
