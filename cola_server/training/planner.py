"""The wire planner: in which rows and values a job's captures travel, and its deltas. A pure function.

Among what a job leaves open, and what it allows to be lost, it takes the least loss with which the wire is not the
longest part of a step; and of equal loss the fewest bytes. Where no choice keeps up, it takes the shortest step.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from cola_common.errors import ColaError, Reason
from cola_common.jobs import Codec, Rows, Wire, WirePlan
from cola_server.fleet import Load
from cola_server.model import Site
from cola_server.training.traffic import refusal, rows_of

# The error of a step's gradient, relative to its norm, rounded up from the worst of what benchmarks/wire_errors.py
# measured on SmolLM2-135M with 1,024 rows of real text; docs/wire.md has the table.
VALUES_ERROR: dict[Rows, dict[Codec, float]] = {
    "all": {"fp32": 0.0, "fp16": 0.0015, "bf16": 0.004, "int8": 0.035, "int4": 0.13},
    "sketch": {"fp32": 0.0, "fp16": 0.0003, "bf16": 0.0025, "int8": 0.05, "int4": 0.14},
    "exact": {"fp32": 0.0, "fp16": 0.0003, "bf16": 0.002, "int8": 0.03, "int4": 0.1},
}
DELTAS_ERROR: dict[Codec, float] = {"fp32": 0.0, "fp16": 0.0003, "bf16": 0.002, "int8": 0.007, "int4": 0.09}
"""Of a step's delta; later ones make up for it."""

SKETCH_ERROR = {64: 0.55, 128: 0.35, 256: 0.15, 512: 0.02}
"""By rows kept, at the sites that a sketch suits least; of the whole gradient it is less than half. Other data
can be worse: where a group of sites is further off than a job allows, all rows are sent (`WirePlan.max_error`)."""

OVERLAP = 2 / 3
"""Of a pass: captures leave while the backward pass goes on, and that takes twice as long as the forward pass."""

GAIN = 1.25
"""Times that a step must become shorter before a job that runs is planned anew: what is known of links is noisy."""


@dataclass(frozen=True)
class Conditions:
    """What a job meets."""

    interval: int
    pass_seconds: float | None
    """Of a batch in the model; None where nothing like it has passed yet."""
    rate: float
    """Bytes/s to the job's workers."""
    speed: float
    """FLOP/s of them."""
    sketching: float
    """What a sketch costs the server for each row that it keeps, as a part of a pass."""


Loads = Callable[[WirePlan], Load]
"""What a batch asks of the workers under a plan."""


def sketching(sites: Sequence[Site], parameters: int) -> float:
    """Of a model with so many parameters, see `Conditions`: 8·k·(d_in + d_out) operations a row of x and g
    (`cola_server.reduce.sketch`), where the model's own pass has 4 for each parameter. With 64 rows, on SmolLM2-135M,
    that is 4 % of a pass for q and v, and 24 % for seven linears; 5 and 29 were measured (benchmarks/reduce_cost.py).
    """
    adapted = [site for site in sites if site.kind != "head"]
    inputs = {site.group: site.calls * site.d_in for site in adapted}
    return 2 * (sum(inputs.values()) + sum(site.calls * site.d_out for site in adapted)) / parameters


def choose(wire: Wire, sites: Sequence[Site], loads: Loads, conditions: Conditions) -> WirePlan:
    """See the module. Raises: `ColaError(INVALID_JOB)` where what the job names is not valid for its adapter."""
    check(wire, sites)
    best = min(_options(wire, sites), key=lambda option: _rank(option, loads, conditions))
    return best.model_copy(update={"reason": _reason(wire, best, loads, conditions)})


def much_better(new: WirePlan, old: WirePlan, loads: Loads, conditions: Conditions, steps: int, cost: float) -> bool:
    """Whether a job with so many steps left gains from another plan, where the change takes `cost` seconds."""
    if conditions.pass_seconds is None or _same(new, old):
        return False
    then, now = _step_seconds(new, loads, conditions), _step_seconds(old, loads, conditions)
    return now > GAIN * then and steps * (now - then) > cost


def largest(wire: Wire, sites: Sequence[Site], nbytes: Callable[[WirePlan], int]) -> WirePlan:
    """Of all that the planner may choose, what weighs most: memory is counted by it."""
    return max(_options(wire, sites), key=nbytes)


def check(wire: Wire, sites: Sequence[Site]) -> None:
    """Raises: `ColaError(INVALID_JOB)` where the reduction that a job names is not valid for its adapter."""
    if wire.rows == "auto":
        return
    problem = next((refusal(site, wire.rows) for site in sites if site.kind != "head"), None)
    if problem is not None:
        others = [rows for rows in ("all", "sketch") if refusal(sites[0], rows) is None and rows != wire.rows]
        text = f"{wire.rows!r} is not valid here: {problem}; use {' or '.join(map(repr, others))}"
        raise ColaError(Reason.INVALID_JOB, param="wire.rows", problem=text)


def agreed(plan: WirePlan, codecs: Collection[str], reductions: Collection[str]) -> WirePlan:
    """The plan as a worker can follow it: what it does not know is replaced by the next that loses less."""
    known = {
        "rows": plan.rows if plan.rows in reductions else "all",
        "values": _finer(plan.values, codecs),
        "deltas": _finer(plan.deltas, codecs),
    }
    return plan.model_copy(update=known)


ROWS: Sequence[Rows] = ("exact", "all", "sketch")
FINENESS: Sequence[Codec] = ("int4", "int8", "bf16", "fp16", "fp32")


def _finer(codec: Codec, known: Collection[str]) -> Codec:
    return next((c for c in FINENESS[FINENESS.index(codec) :] if c in known), "fp32")


def _options(wire: Wire, sites: Sequence[Site]) -> Iterator[WirePlan]:
    """What the job names, combined with all that it leaves open and its `max_error` allows."""
    adapted = next((site for site in sites if site.kind != "head"), sites[0])

    valid = [rows for rows in ROWS if rows_of(adapted, rows) == rows]
    if "exact" in valid:  # what else there is loses more, or is more bytes but where a batch has fewer rows than a rank
        valid = ["exact"]
    for rows, values, deltas in itertools.product(
        valid if wire.rows == "auto" else [wire.rows],
        FINENESS if wire.values == "auto" else [wire.values],
        FINENESS if wire.deltas == "auto" else [wire.deltas],
    ):
        kept = [wire.sketch_rows]
        if rows == "sketch" and wire.rows == "auto":
            kept = [k for k in SKETCH_ERROR if wire.max_error > 0]
        for k in kept:
            of_rows = _sketch_error(k) if rows == "sketch" else 0.0
            of_values, of_deltas = VALUES_ERROR[rows][values], DELTAS_ERROR[deltas]
            opened = [
                of_rows if wire.rows == "auto" else 0.0,
                of_values if wire.values == "auto" else 0.0,
                of_deltas if wire.deltas == "auto" else 0.0,
            ]
            if math.hypot(*opened) <= wire.max_error:
                yield WirePlan(
                    rows=rows,
                    values=values,
                    deltas=deltas,
                    sketch_rows=k if rows == "sketch" else 0,
                    max_error=wire.max_error if rows == "sketch" else 0.0,
                    error=math.hypot(of_rows, of_values, of_deltas),
                    reason="",
                )


def _sketch_error(k: int) -> float:
    """Between the measured ones in a straight line of logarithms; beyond them like the nearest two."""
    known = sorted(SKETCH_ERROR)
    upper = next((i for i, each in enumerate(known) if each >= k), len(known) - 1)
    low, high = known[max(0, upper - 1)], known[max(1, upper)]
    slope = math.log(SKETCH_ERROR[high] / SKETCH_ERROR[low]) / math.log(high / low)
    error: float = SKETCH_ERROR[low] * (k / low) ** slope
    return min(1.0, error)


def _rank(option: WirePlan, loads: Loads, conditions: Conditions) -> tuple[float, ...]:
    load = loads(option)
    if conditions.pass_seconds is None:
        return 0, option.error, load.nbytes
    if _wire_seconds(option, loads, conditions) + _sketch_seconds(option, conditions) <= _passing(conditions):
        return 0, option.error, load.nbytes
    return 1, _step_seconds(option, loads, conditions), option.error


def _passing(conditions: Conditions) -> float:
    """Seconds of a step in the model."""
    assert conditions.pass_seconds is not None
    return conditions.interval * conditions.pass_seconds


def _sketch_seconds(option: WirePlan, conditions: Conditions) -> float:
    """Of a step, on the server: what makes the wire shorter counts as a part of it."""
    return _passing(conditions) * conditions.sketching * option.sketch_rows


def _wire_seconds(option: WirePlan, loads: Loads, conditions: Conditions) -> float:
    """Of a step, both ways."""
    return conditions.interval * loads(option).nbytes / conditions.rate


def _step_seconds(option: WirePlan, loads: Loads, conditions: Conditions) -> float:
    passing = _passing(conditions)
    work = conditions.interval * loads(option).work / conditions.speed
    left = max(0.0, _wire_seconds(option, loads, conditions) + work - OVERLAP * passing)
    return passing + _sketch_seconds(option, conditions) + left


def _same(one: WirePlan, other: WirePlan) -> bool:
    return one.model_copy(update={"reason": other.reason}) == other


def _reason(wire: Wire, option: WirePlan, loads: Loads, conditions: Conditions) -> str:
    if "auto" not in (wire.rows, wire.values, wire.deltas):
        return "as the job asks"
    lost = "nothing is lost" if option.error == 0 else f"an error of up to {option.error:.2g} is expected"
    if conditions.pass_seconds is None:
        return f"{lost}; the fewest bytes of that, as the model's speed is not known yet"
    seconds, passing = _wire_seconds(option, loads, conditions), _passing(conditions)
    takes = f"{seconds:.2g} s of each step on the wire, {passing:.2g} s in the model"
    if option.sketch_rows:
        making = _sketch_seconds(option, conditions)
        seconds, takes = seconds + making, f"{takes}, {making:.2g} s for the sketch"
    if seconds <= passing:
        return f"{lost}; {takes}"
    return f"{lost}; {takes}: the link is too slow to keep up, with what the job allows (wire.max_error)"
