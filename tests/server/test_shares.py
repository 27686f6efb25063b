"""Tenants share the model's time by weight, whatever they ask for and whenever they come."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_server.training.shares import CREDIT_SECONDS, Shares

WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0}
SECONDS = st.floats(0.01, 3.0)


def serve(shares, waiting, passes, seconds=lambda: 1.0):
    """Gives out so many passes among tenants that always wait. Returns: model seconds by tenant."""
    used = Counter()
    for _ in range(passes):
        tenant, part = shares.order(waiting)[0], seconds()
        shares.used(tenant, part)
        used[tenant] += part
    return used


@given(st.data())
def test_who_always_waits_gets_time_by_weight_to_within_one_pass_of_each(data):
    shares, used = Shares(WEIGHTS), Counter()
    for _ in range(data.draw(st.integers(1, 60))):
        used += serve(shares, WEIGHTS, 1, lambda: data.draw(SECONDS))
        had = [used[tenant] / weight for tenant, weight in WEIGHTS.items()]
        assert max(had) - min(had) <= 3.0 * (1 / 1 + 1 / 2)


def test_a_tenant_without_a_weight_weighs_one():
    used = serve(Shares({"heavy": 3.0}), ["heavy", "plain"], 400)
    assert used["heavy"] == pytest.approx(3 * used["plain"], abs=4)


@given(st.lists(st.tuples(st.sets(st.sampled_from("abc"), min_size=1), SECONDS, st.sampled_from([None, *"abc"]))))
def test_who_comes_late_goes_before_all_who_had_a_pass(history):
    shares, served = Shares({"a": 0.1, "b": 5.0}), set()
    for waiting, seconds, ended in history:
        tenant = shares.order(waiting)[0]
        served.add(tenant)
        shares.used(tenant, seconds)
        if ended is not None:
            shares.rest(ended)
    assert shares.order({*served, "late"})[0] == "late"


@pytest.mark.parametrize("rests", [True, False], ids=["idle", "waiting for workers"])
def test_who_did_nothing_saves_nothing_up_and_who_waited_for_workers_a_little(rests):
    shares = Shares({})
    serve(shares, ["busy", "away"], 10)
    if rests:
        shares.rest("away")
    serve(shares, ["busy"], 1000)
    used = serve(shares, ["busy", "away"], 100)
    more = used["away"] - used["busy"]
    assert 0 <= more <= 2 if rests else CREDIT_SECONDS - 2 <= more <= CREDIT_SECONDS + 2


def test_who_comes_while_another_waits_for_workers_has_no_more_than_that_ones_credit():
    shares = Shares({})
    serve(shares, ["busy", "stuck"], 10)
    serve(shares, ["busy"], 1000)
    used = serve(shares, ["busy", "new"], 100)
    assert used["new"] - used["busy"] <= CREDIT_SECONDS + 2


def test_who_ends_one_job_after_another_gains_nothing_by_it():
    shares, rng, used = Shares({}), random.Random(0), Counter()
    for _ in range(500):
        used += serve(shares, ["steady", "flitting"], 1, lambda: rng.uniform(0.1, 2))
        shares.rest("flitting")
    assert used["flitting"] <= used["steady"] + 4


def test_a_tenant_who_was_served_more_by_the_seats_of_a_cohort_pays_for_them():
    shares = Shares({})
    shares.order(["a", "b"])
    assert shares.ahead("a", 3.0) == 3.0
    shares.used("a", 3.0)
    assert serve(shares, ["a", "b"], 3) == {"b": 3.0}
