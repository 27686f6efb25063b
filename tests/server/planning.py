"""Jobs for the planner, and all that it could choose for them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cola_common.families import Family, Head, Linear, Lora, Mlp
from cola_common.jobs import Codec, Rows, Wire, WirePlan
from cola_common.tensor import CODECS
from cola_server.fleet import Load
from cola_server.model import Site
from cola_server.training import planner
from cola_server.training.loads import Loads
from cola_server.training.planner import Conditions, choose
from cola_server.training.traffic import rows_of
from tests.server.capturing import site
from tests.server.prepared import prepared

FAMILIES: list[Family] = [Lora(1, 1.0), Lora(8, 1.0), Lora(64, 2.0), Linear(1.0), Mlp((16,), 1.0)]
REDUCTIONS: tuple[Rows, ...] = ("all", "exact", "sketch")
ANY = Conditions(interval=1, pass_seconds=None, rate=1e8, speed=1e9, sketching=0.0)
HEAD = site(2, 2, Head(bias=True), 64, 3, kind="head", layout="examples")


@dataclass(frozen=True)
class Case:
    """A job, and what it meets."""

    wire: Wire
    sites: Sequence[Site]
    length: int
    conditions: Conditions

    def load(self, plan: WirePlan) -> Load:
        job = prepared(self.sites, length=self.length, interval=self.conditions.interval)
        return Loads(job, plan).whole

    def choose(self) -> WirePlan:
        return choose(self.wire, self.sites, self.load, self.conditions)

    def wire_seconds(self, plan: WirePlan) -> float:
        return self.conditions.interval * self.load(plan).nbytes / self.conditions.rate

    def passing(self) -> float:
        assert self.conditions.pass_seconds is not None
        return self.conditions.interval * self.conditions.pass_seconds

    def sketch_seconds(self, plan: WirePlan) -> float:
        return self.passing() * self.conditions.sketching * plan.sketch_rows

    def keeps_up(self, plan: WirePlan) -> bool:
        return self.wire_seconds(plan) + self.sketch_seconds(plan) <= self.passing()

    def step_seconds(self, plan: WirePlan) -> float:
        """The pass with its sketches, and what of wire and work is left when two thirds of the pass are over."""
        work = self.conditions.interval * self.load(plan).work / self.conditions.speed
        left = max(0.0, self.wire_seconds(plan) + work - 2 / 3 * self.passing())
        return self.passing() + self.sketch_seconds(plan) + left

    def others(self) -> Iterator[WirePlan]:
        """What the job names, with all that it leaves open and its `max_error` allows. Where a gradient will do, rows
        are not asked for: they are more bytes, or lose more.
        """
        valid = [rows for rows in REDUCTIONS if rows_of(self.sites[0], rows) == rows]
        rows_and_k = [(rows, k) for rows in valid for k in (planner.SKETCH_ERROR if rows == "sketch" else (1,))]
        if "exact" in valid:
            rows_and_k = [("exact", 1)]
        if self.wire.rows != "auto":
            rows_and_k = [(self.wire.rows, self.wire.sketch_rows)]
        values = CODECS if self.wire.values == "auto" else [self.wire.values]
        deltas = CODECS if self.wire.deltas == "auto" else [self.wire.deltas]
        for (rows, k), v, d in itertools.product(rows_and_k, values, deltas):
            plan = named(self.sites, rows, v, d, k, self.wire.max_error)
            if own_error(self.wire, plan) <= self.wire.max_error:
                yield plan


def named(
    sites: Sequence[Site], rows: Rows, values: Codec, deltas: Codec, k: int = 64, max_error: float = 0.0
) -> WirePlan:
    """The plan of a job that leaves nothing open."""
    wire = Wire(rows=rows, values=values, deltas=deltas, sketch_rows=k, max_error=max_error)
    return choose(wire, sites, lambda _: Load(), ANY)


def own_error(wire: Wire, plan: WirePlan) -> float:
    """What of a plan's loss the planner chose itself."""
    of_rows = planner.SKETCH_ERROR[plan.sketch_rows] if plan.rows == "sketch" and wire.rows == "auto" else 0.0
    of_values = planner.VALUES_ERROR[plan.rows][plan.values] if wire.values == "auto" else 0.0
    of_deltas = planner.DELTAS_ERROR[plan.deltas] if wire.deltas == "auto" else 0.0
    return math.hypot(of_rows, of_values, of_deltas)


def pair(family: Family) -> list[Site]:
    """Two sites that share x."""
    return [site(0, 0, family, 64, 96), site(1, 0, family, 64, 32)]
