"""What becomes of a plan: for memory, for a worker that does not know all of it, and for a job that runs."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_common.families import Family, Linear, Lora, Mlp
from cola_common.jobs import Codec, Rows, Wire, WirePlan
from cola_common.tensor import CODECS
from cola_server.training.planner import DELTAS_ERROR, GAIN, Conditions, agreed, largest, much_better
from cola_server.training.traffic import capture_bytes
from tests.server.planning import ANY, FAMILIES, HEAD, REDUCTIONS, Case, named, pair

LORA = pair(Lora(8, 1.0))

plans = st.builds(
    lambda rows, values, deltas: named(LORA, rows, values, deltas),
    st.sampled_from(REDUCTIONS),
    st.sampled_from(CODECS),
    st.sampled_from(CODECS),
)


# --- memory ---------------------------------------------------------------------------------------------------------

TOKENS, EXAMPLES = 400, 4  # of the largest batch


def weight(case: Case, plan: WirePlan) -> int:
    return capture_bytes(case.sites, plan, tokens=TOKENS, examples=EXAMPLES, bound=True)


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    values=st.sampled_from(["auto", *CODECS]),
    deltas=st.sampled_from(["auto", *CODECS]),
    max_error=st.sampled_from([0.0, 0.05, 0.12, 1.0]),
    pass_seconds=st.sampled_from([None, 1e-3, 0.1]),
    rate=st.floats(3, 11).map(lambda power: 10**power),
    length=st.sampled_from([2, 20, 100]),
    with_head=st.booleans(),
)
def test_no_batch_weighs_more_than_memory_is_counted_for(
    family: Family,
    values: str,
    deltas: str,
    max_error: float,
    pass_seconds: float | None,
    rate: float,
    length: int,
    with_head: bool,
) -> None:
    """The choice is made for the mean batch, which may be far smaller."""
    wire = Wire.model_validate({"values": values, "deltas": deltas, "max_error": max_error})
    sites = pair(family) + ([HEAD] if with_head else [])
    case = Case(wire, sites, length, replace(ANY, pass_seconds=pass_seconds, rate=rate))
    most = largest(wire, sites, lambda plan: weight(case, plan))
    assert weight(case, case.choose()) <= weight(case, most)


@pytest.mark.parametrize("values", CODECS)
def test_a_lora_whose_codec_is_named_sends_its_gradient_in_it(values: Codec) -> None:
    for pass_seconds in (None, 1e-6, 1.0):
        plan = Case(Wire(values=values), LORA, 100, replace(ANY, pass_seconds=pass_seconds)).choose()
        assert (plan.rows, plan.values, plan.deltas) == ("exact", values, "fp32")


@pytest.mark.parametrize("max_error", [0.0, 0.5])
@pytest.mark.parametrize("rows", REDUCTIONS)
@pytest.mark.parametrize("values", CODECS)
def test_memory_is_counted_for_what_is_named(rows: Rows, values: Codec, max_error: float) -> None:
    wire = Wire(rows=rows, values=values, deltas="bf16", sketch_rows=7, max_error=max_error)
    case = Case(wire, LORA, 100, ANY)
    assert largest(wire, LORA, lambda plan: weight(case, plan)) == case.choose().model_copy(update={"reason": ""})


@pytest.mark.parametrize("max_error", [0.0, 1.0])
@pytest.mark.parametrize("family", [Linear(1.0), Mlp((16,), 1.0)], ids=str)
def test_what_may_send_all_rows_is_counted_so(family: Family, max_error: float) -> None:
    case = Case(Wire(max_error=max_error), pair(family), 100, ANY)
    most = largest(case.wire, case.sites, lambda plan: weight(case, plan))
    assert weight(case, most) == weight(case, named(case.sites, "all", "fp32", "fp32"))


# --- what a worker takes --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    plan=plans,
    codecs=st.sets(st.sampled_from(CODECS)).map(lambda known: known | {"fp32"}),
    reductions=st.sets(st.sampled_from(REDUCTIONS)).map(lambda known: known | {"all"}),
)
def test_a_worker_gets_only_what_it_knows_and_never_what_loses_more(
    plan: WirePlan, codecs: set[str], reductions: set[str]
) -> None:
    theirs = agreed(plan, codecs, reductions)
    assert theirs.rows in reductions and {theirs.values, theirs.deltas} <= codecs
    for mine, before in ((theirs.values, plan.values), (theirs.deltas, plan.deltas)):
        assert DELTAS_ERROR[mine] <= DELTAS_ERROR[before]
    assert theirs.rows == plan.rows or plan.rows not in reductions
    for mine, before in ((theirs.values, plan.values), (theirs.deltas, plan.deltas)):
        assert mine == before or before not in codecs
    assert agreed(theirs, codecs, reductions) == theirs
    assert agreed(plan, CODECS, REDUCTIONS) == plan


# --- a job that runs ------------------------------------------------------------------------------------------------

known = st.builds(
    lambda rate, speed, passing: replace(ANY, rate=10**rate, speed=10**speed, pass_seconds=passing),
    st.floats(3, 11),
    st.floats(8, 12),
    st.floats(1e-3, 10),
)


@settings(max_examples=200, deadline=None)
@given(one=plans, other=plans, conditions=known, steps=st.integers(0, 1000), cost=st.floats(0, 100))
def test_a_change_pays_one_way_alone_and_all_the_more_the_longer_the_job(
    one: WirePlan, other: WirePlan, conditions: Conditions, steps: int, cost: float
) -> None:
    case = Case(Wire(), LORA, 100, conditions)

    def pays(new: WirePlan, old: WirePlan, steps: int, cost: float) -> bool:
        return much_better(new, old, case.load, conditions, steps, cost)

    there, back = pays(one, other, steps, cost), pays(other, one, steps, cost)
    assert not (there and back)
    assert not pays(one, one.model_copy(update={"reason": "another"}), steps, 0.0)
    if there:
        assert steps > 0
        assert pays(one, other, steps + 1, cost) and pays(one, other, steps, cost / 2)
        assert case.step_seconds(other) > GAIN * case.step_seconds(one)
        assert steps * (case.step_seconds(other) - case.step_seconds(one)) > cost


def test_a_change_must_gain_more_than_it_costs_over_the_steps_that_are_left() -> None:
    rows, gradient = named(LORA, "all", "fp32", "fp32"), named(LORA, "exact", "fp32", "fp32")
    case = Case(Wire(), LORA, 100, replace(ANY, rate=1e5, speed=math.inf, pass_seconds=0.5))
    gain = case.step_seconds(rows) - case.step_seconds(gradient)
    assert gain > 2.0
    for steps, cost, pays in ((10, 10.01 * gain, False), (11, 10.01 * gain, True), (10, 9.99 * gain, True)):
        assert much_better(gradient, rows, case.load, case.conditions, steps, cost) is pays


def test_what_travels_while_the_backward_pass_goes_on_costs_a_step_nothing() -> None:
    rows, gradient = named(LORA, "all", "fp32", "fp32"), named(LORA, "exact", "fp32", "fp32")
    for part, pays in ((0.6, False), (0.9, False), (0.95, True)):  # of the pass: two thirds of it are free
        case = Case(Wire(), LORA, 100, replace(ANY, speed=math.inf, pass_seconds=1.0))
        case = replace(case, conditions=replace(case.conditions, rate=case.load(rows).nbytes / part))
        assert much_better(gradient, rows, case.load, case.conditions, 10**9, 0.0) is pays


def test_a_little_faster_is_no_reason_to_change_however_long_the_job() -> None:
    fp32, int8 = named(LORA, "exact", "fp32", "fp32"), named(LORA, "exact", "int8", "fp32")
    for rate, pays in ((1e3, True), (1e9, False)):
        case = Case(Wire(), LORA, 100, replace(ANY, rate=rate, speed=math.inf, pass_seconds=0.01))
        assert much_better(int8, fp32, case.load, case.conditions, 10**9, 5.0) is pays


def test_nothing_is_changed_while_the_model_s_speed_is_not_known() -> None:
    rows, gradient = named(LORA, "all", "fp32", "fp32"), named(LORA, "exact", "fp32", "fp32")
    case = Case(Wire(), LORA, 100, replace(ANY, rate=1.0))
    assert not much_better(gradient, rows, case.load, case.conditions, 10**6, 0.0)
