"""What the planner chooses: within what a job allows, the least loss that keeps up, and of that the fewest bytes."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_common.errors import ColaError, Reason
from cola_common.families import Family, Linear, Lora, Mlp
from cola_common.jobs import Rows, Wire
from cola_common.tensor import CODECS
from cola_server.training import planner
from cola_server.training.planner import Conditions, check
from cola_server.training.traffic import rows_of
from tests.server.capturing import site
from tests.server.planning import ANY, FAMILIES, HEAD, REDUCTIONS, Case, named, own_error, pair


@st.composite
def cases(draw: st.DrawFn) -> Case:
    family = draw(st.sampled_from(FAMILIES))
    valid = [rows for rows in REDUCTIONS if rows_of(site(0, 0, family), rows) == rows]
    wire = Wire(
        rows=draw(st.sampled_from(["auto", *valid])),
        values=draw(st.sampled_from(["auto", *CODECS])),
        deltas=draw(st.sampled_from(["auto", *CODECS])),
        sketch_rows=draw(st.integers(1, 1000)),
        max_error=draw(st.sampled_from([0.0, 1e-4, 0.004, 0.05, 0.12, 0.3, 1.0]) | st.floats(0.0, 0.3)),
    )
    conditions = Conditions(
        interval=draw(st.integers(1, 8)),
        pass_seconds=draw(st.sampled_from([None, 1e-3, 0.1, 10.0])),
        rate=10 ** draw(st.floats(3, 11)),
        speed=10 ** draw(st.floats(8, 12)),
        sketching=draw(st.sampled_from([0.0, 1e-4, 0.004, 0.1])),
    )
    sites = pair(family) + ([HEAD] if draw(st.booleans()) else [])
    return Case(wire, sites, draw(st.sampled_from([2, 16, 300])), conditions)


# --- choose ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_what_is_named_holds_and_what_is_chosen_loses_no_more_than_it_may(case: Case) -> None:
    plan, wire = case.choose(), case.wire
    assert (plan.rows, plan.values, plan.deltas) == (
        plan.rows if wire.rows == "auto" else wire.rows,
        plan.values if wire.values == "auto" else wire.values,
        plan.deltas if wire.deltas == "auto" else wire.deltas,
    )
    assert own_error(wire, plan) <= wire.max_error
    if wire.max_error == 0:
        assert plan.rows != "sketch" or wire.rows == "sketch"
        assert plan.values == "fp32" or wire.values != "auto"
        assert plan.deltas == "fp32" or wire.deltas != "auto"
    assert plan.max_error == (wire.max_error if plan.rows == "sketch" else 0.0)
    if plan.rows == "sketch":
        assert plan.sketch_rows in (planner.SKETCH_ERROR if wire.rows == "auto" else {wire.sketch_rows})
    else:
        assert plan.sketch_rows == 0
    assert own_error(wire, plan) <= plan.error + 1e-12 <= 2.0
    assert plan.reason


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_nothing_else_that_keeps_up_loses_less_or_as_little_in_fewer_bytes(case: Case) -> None:
    plan, known = case.choose(), case.conditions.pass_seconds is not None
    others = list(case.others())
    if known and not case.keeps_up(plan):
        assert not any(map(case.keeps_up, others))
        for other in others:
            assert case.step_seconds(plan) <= case.step_seconds(other) * (1 + 1e-12)
        return
    for other in others:
        if not known or case.keeps_up(other):
            assert (plan.error, case.load(plan).nbytes) <= (other.error, case.load(other).nbytes)


@settings(max_examples=200, deadline=None)
@given(case=cases(), times=st.floats(1.0, 1e4))
def test_over_a_slower_link_never_go_more_bytes(case: Case, times: float) -> None:
    """With work that takes no time: a gradient may be more bytes than coarse rows, and all rows than a sketch, and are
    less work.
    """
    fast = replace(case, conditions=replace(case.conditions, speed=math.inf, sketching=0.0))
    slow = replace(fast, conditions=replace(fast.conditions, rate=fast.conditions.rate / times))
    assert case.load(slow.choose()).nbytes <= case.load(fast.choose()).nbytes


@pytest.mark.parametrize("pass_seconds", [None, 1e-6, 1.0])
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_by_default_nothing_is_lost_and_a_lora_sends_its_gradient(
    family: Family, with_head: bool, pass_seconds: float | None
) -> None:
    sites = pair(family) + ([HEAD] if with_head else [])
    plan = Case(Wire(), sites, 64, replace(ANY, pass_seconds=pass_seconds)).choose()
    wanted = ("exact" if isinstance(family, Lora) else "all", "fp32", "fp32", 0, 0.0, 0.0)
    assert (plan.rows, plan.values, plan.deltas, plan.sketch_rows, plan.max_error, plan.error) == wanted
    assert "nothing is lost" in plan.reason


@pytest.mark.parametrize("family", [Lora(8, 1.0), Linear(1.0), Mlp((16,), 1.0)], ids=str)
@pytest.mark.parametrize("max_error", [0.002, 0.003, 0.03, 0.05, 0.1, math.hypot(0.05, 0.03)])
def test_on_a_hopeless_link_all_of_what_may_be_lost_is_and_no_more(family: Family, max_error: float) -> None:
    """The bytes that are left are the fewest of all plans within the limit, told by themselves."""
    conditions = replace(ANY, pass_seconds=1e-3, rate=1.0, speed=math.inf)
    plan = Case(Wire(max_error=max_error), pair(family), 300, conditions).choose()
    assert 0 < plan.error <= max_error
    tighter = Case(Wire(max_error=plan.error * 0.999), pair(family), 300, conditions)
    assert tighter.choose().error < plan.error
    assert tighter.load(tighter.choose()).nbytes > tighter.load(plan).nbytes


def test_more_is_lost_only_as_the_link_gets_slower() -> None:
    """Of a linear adapter, whose delta weighs as much as its matrix."""
    sites, chosen = pair(Linear(1.0)), []
    for rate in (1e12, 1e7, 5e6, 2e6, 1e6, 5e5, 1e3):
        case = Case(Wire(max_error=1.0), sites, 300, replace(ANY, pass_seconds=0.2, rate=rate))
        chosen.append(case.choose())
    errors = [plan.error for plan in chosen]
    assert errors[0] == 0.0 and errors == sorted(errors) and len(set(errors)) > 3
    assert ["too slow" in plan.reason for plan in chosen] == [False] * 6 + [True]


def test_a_sketch_that_costs_the_server_more_than_it_saves_is_not_chosen() -> None:
    wire, conditions = Wire(max_error=0.2), replace(ANY, pass_seconds=0.2, rate=4e5)
    cheap = Case(wire, pair(Linear(1.0)), 300, conditions)
    dear = replace(cheap, conditions=replace(conditions, sketching=0.01))
    assert (cheap.choose().rows, dear.choose().rows) == ("sketch", "all")
    kept = cheap.choose()
    assert dear.step_seconds(kept) > dear.step_seconds(dear.choose())
    assert "for the sketch" in kept.reason and "for the sketch" not in dear.choose().reason


def test_a_sketch_costs_by_the_widths_of_its_sites_and_x_that_is_shared_counts_once() -> None:
    shared = planner.sketching([*pair(Linear(1.0)), HEAD], 1000)
    assert shared == 8 * (64 + 96 + 32) / (4 * 1000)
    apart = [replace(each, group=number) for number, each in enumerate(pair(Linear(1.0)))]
    assert planner.sketching(apart, 1000) == 8 * (64 + 96 + 64 + 32) / (4 * 1000)


@pytest.mark.parametrize(("interval", "slow"), [(1, True), (100, False)])
def test_of_a_long_interval_the_delta_weighs_little(interval: int, slow: bool) -> None:
    # A linear adapter's delta is 32 kB, the rows of a batch of eight are 6 kB: in a pass the link takes 8 kB.
    conditions = replace(ANY, interval=interval, pass_seconds=0.1, rate=8e4)
    plan = Case(Wire(), pair(Linear(1.0)), 2, conditions).choose()
    assert ("too slow" in plan.reason) is slow


def test_a_plan_says_why() -> None:
    every_one_named = Wire(rows="all", values="bf16", deltas="int8")
    assert Case(every_one_named, pair(Lora(8, 1.0)), 16, ANY).choose().reason == "as the job asks"
    unknown = Case(Wire(), pair(Lora(8, 1.0)), 16, ANY).choose()
    assert "not known yet" in unknown.reason
    known = Case(Wire(), pair(Lora(8, 1.0)), 16, replace(ANY, pass_seconds=2.0)).choose()
    assert "2 s in the model" in known.reason


def test_an_error_falls_with_the_rows_of_a_sketch_and_is_the_measured_one_where_it_was_measured() -> None:
    errors = [named(pair(Linear(1.0)), "sketch", "fp32", "fp32", k).error for k in range(1, 2000)]
    assert errors[0] == 1.0 and all(a >= b > 0 for a, b in itertools.pairwise(errors))
    assert {k: errors[k - 1] for k in planner.SKETCH_ERROR} == pytest.approx(planner.SKETCH_ERROR)


# --- what is not valid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rows", "why", "use"),
    [
        (Linear(1.0), "exact", "whole matrix", "'all' or 'sketch'"),
        (Mlp((4,), 1.0), "exact", "as large as its layers", "use 'all'"),
        (Mlp((4,), 1.0), "sketch", "linear in x", "use 'all'"),
    ],
    ids=str,
)
def test_a_reduction_that_is_not_valid_is_refused_with_its_reason(
    family: Family, rows: Rows, why: str, use: str
) -> None:
    for call in (lambda w: check(w, [*pair(family), HEAD]), lambda w: Case(w, pair(family), 16, ANY).choose()):
        with pytest.raises(ColaError) as refused:
            call(Wire(rows=rows))
        assert refused.value.reason == Reason.INVALID_JOB
        assert refused.value.details["param"] == "wire.rows"
        assert why in refused.value.message and use in refused.value.message


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_what_is_valid_for_an_adapter_is_not_refused_for_its_head(family: Family) -> None:
    for rows in ("auto", *REDUCTIONS):
        if rows == "auto" or rows_of(pair(family)[0], rows) == rows:
            check(Wire(rows=rows), [*pair(family), HEAD])
