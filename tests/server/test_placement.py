"""Placement: every shard is owned, groups stay together, nobody is over its memory, the answer is stable."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_server.fleet import Candidate, ShardLoad, effort, place
from cola_server.fleet.placement import STATE_COPIES

shards = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 1000)), min_size=1, max_size=20).map(
    lambda items: [ShardLoad(i, group, size) for i, (group, size) in enumerate(items)]
)
workers = st.lists(st.tuples(st.integers(0, 100_000), st.floats(0.1, 100)), max_size=5).map(
    lambda items: [Candidate(f"w{i}", memory, gflops) for i, (memory, gflops) in enumerate(items)]
)


@given(shards, workers, st.integers(1, 3))
def test_an_answer_covers_all_shards_within_memory_and_keeps_groups(
    shards: list[ShardLoad], workers: list[Candidate], parts: int
) -> None:
    owners = place(shards, workers, parts)
    if owners is None:
        return
    assert set(owners) == {s.index for s in shards}
    for worker in workers:
        owned = sum(s.parameter_bytes for s in shards if owners[s.index] == worker.worker)
        assert owned * STATE_COPIES <= worker.memory_bytes
    for a, b in itertools.combinations(shards, 2):
        if a.group == b.group:
            assert owners[a.index] == owners[b.index]


@given(shards, workers, st.integers(1, 3))
def test_the_order_of_the_candidates_does_not_matter(
    shards: list[ShardLoad], workers: list[Candidate], parts: int
) -> None:
    assert place(shards, workers, parts) == place(shards, workers[::-1], parts)


def test_a_job_stays_whole_where_it_fits_and_is_split_where_it_does_not() -> None:
    shards = [ShardLoad(0, 0, 100), ShardLoad(1, 1, 100)]
    small = [Candidate("a", 100 * STATE_COPIES, 1.0), Candidate("b", 100 * STATE_COPIES, 1.0)]
    large = Candidate("c", 200 * STATE_COPIES, 0.5)
    assert place(shards, [large]) == {0: "c", 1: "c"}
    assert place(shards, small) == {0: "a", 1: "b"}
    assert place(shards, small[:1]) is None


@pytest.mark.parametrize("parts", [2, 3])
def test_a_job_that_is_to_be_split_waits_for_that_many_workers(parts: int) -> None:
    shards = [ShardLoad(i, i, 1) for i in range(6)]
    workers = [Candidate(f"w{i}", 1000, 1.0) for i in range(parts)]
    owners = place(shards, workers, parts)
    assert owners is not None and set(owners.values()) == {w.worker for w in workers}
    assert place(shards, workers[:-1], parts) is None


def test_of_two_idle_workers_the_faster_is_taken_until_its_load_outweighs_that() -> None:
    shards = [ShardLoad(0, 0, 100)]
    slow, fast = Candidate("a", 10_000, 1.0), Candidate("b", 10_000, 3.0)
    assert place(shards, [slow, fast]) == {0: "b"}
    assert place(shards, [slow, Candidate("b", 10_000, 3.0, load=300)]) == {0: "a"}


def test_who_owns_the_job_already_is_preferred_to_who_is_faster() -> None:
    shards = [ShardLoad(0, 0, 1)]
    fast, owner = Candidate("fast", 1000, 9.0), Candidate("owner", 1000, 1.0, owned=frozenset({0}))
    assert place(shards, [fast, owner]) == {0: "owner"}


def test_effort_is_that_of_the_busiest_worker_with_its_other_jobs() -> None:
    shards = [ShardLoad(0, 0, 100), ShardLoad(1, 1, 50)]
    slow, fast = Candidate("slow", 1000, 1.0), Candidate("fast", 1000, 10.0, load=400)
    both = [slow, fast]
    assert effort(shards, both, {0: "slow", 1: "slow"}) == 150
    assert effort(shards, both, {0: "fast", 1: "fast"}) == 55
    assert effort(shards, both, {0: "fast", 1: "slow"}) == 50
    assert effort(shards, both, {0: "slow", 1: "fast"}) == 100
    assert effort(shards, [*both, Candidate("idle", 1000, 0.1, load=900)], {0: "slow", 1: "fast"}) == 100


@given(shards, workers)
def test_one_worker_for_all_is_the_one_with_the_least_effort(shards: list[ShardLoad], workers: list[Candidate]) -> None:
    owners = place(shards, workers)
    if owners is not None and len(set(owners.values())) == 1:
        least = min(effort(shards, workers, dict.fromkeys(owners, w.worker)) for w in workers)
        assert effort(shards, workers, owners) == least or any(
            sum(s.parameter_bytes for s in shards) * STATE_COPIES > w.memory_bytes for w in workers
        )
