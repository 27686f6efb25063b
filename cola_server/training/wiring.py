"""What travels of one job: planned when it begins, kept over its epochs, and planned anew where that pays.

A plan is kept because a job that goes back to a snapshot is to come to the same bits again.
"""

import math
from collections.abc import Collection, Mapping, Sequence

from cola_common.jobs import WirePlan
from cola_server.fleet import FASTEST, Candidate, Load
from cola_server.training import data, planner
from cola_server.training.estimate import Bounds
from cola_server.training.loads import Loads
from cola_server.training.prepared import Prepared
from cola_server.training.services import Services

REPLAN_SECONDS = 5.0
"""What another plan must gain a job that runs: as a move, it takes a snapshot and a new epoch."""


class Wiring:
    """Belongs to the event loop."""

    def __init__(self, prepared: Prepared, services: Services) -> None:
        self._prepared = prepared
        self._observed = services.observed
        self._bounds = Bounds(services.fleet.limits.buffer_bytes, services.fleet.limits.window_bytes)
        self._loads: dict[str, Loads] = {}
        self.plan: WirePlan | None = prepared.wire_plan

    def settle(self, candidates: Sequence[Candidate]) -> WirePlan:
        """The plan; the first time it is made for the workers that there are."""
        if self.plan is None:
            self.plan = self._choose(candidates)
        return self.plan

    def better(self, owners: Collection[str], candidates: Sequence[Candidate], batches: int) -> bool:
        """Whether the job, with so many batches left, is better off with another plan; then that is `plan` now."""
        theirs = [c for c in candidates if c.worker in owners]
        if self.plan is None or not theirs:
            return False
        new, conditions = self._choose(theirs), self._conditions(theirs)
        steps = math.ceil(batches / conditions.interval)
        pays = planner.much_better(new, self.plan, self._load, conditions, steps, REPLAN_SECONDS)
        if pays:
            self.plan = new
        return pays

    def loads(self, plan: WirePlan) -> Loads:
        """What a batch asks of workers under a plan."""
        key = f"{plan.rows} {plan.values} {plan.deltas} {plan.sketch_rows}"
        if key not in self._loads:
            self._loads[key] = Loads(self._prepared, plan)
        return self._loads[key]

    def of_workers(self, workers: Collection[str], candidates: Sequence[Candidate]) -> Mapping[str, WirePlan]:
        """The plan as each of these can follow it."""
        assert self.plan is not None
        known = {c.worker: c for c in candidates}
        return {worker: self._agreed(known[worker]) if worker in known else self.plan for worker in workers}

    def carries(self, candidate: Candidate) -> bool:
        """Whether the largest batch fits through, as that worker can take it."""
        p = self._prepared
        return self.plan is None or self._bounds.problem(p.spec, p.sites, self._agreed(candidate)) is None

    def _agreed(self, candidate: Candidate) -> WirePlan:
        assert self.plan is not None
        return planner.agreed(self.plan, candidate.codecs, candidate.reductions)

    def _choose(self, candidates: Sequence[Candidate]) -> WirePlan:
        p = self._prepared
        return planner.choose(p.spec.wire, p.sites, self._load, self._conditions(candidates))

    def _conditions(self, candidates: Sequence[Candidate]) -> planner.Conditions:
        p = self._prepared
        tokens, examples = p.mean_batch
        length = math.ceil(tokens / examples / data.PAD_MULTIPLE) * data.PAD_MULTIPLE
        rate = max((c.rate for c in candidates), default=FASTEST)
        self._observed.link(rate)
        return planner.Conditions(
            interval=p.spec.hyperparameters.adaptation_interval,
            pass_seconds=self._observed.pass_seconds(p.base.name, examples * length),
            rate=rate,
            speed=max((c.speed for c in candidates), default=math.inf),
            sketching=planner.sketching(p.sites, p.base.parameters),
        )

    def _load(self, plan: WirePlan) -> Load:
        return self.loads(plan).whole
