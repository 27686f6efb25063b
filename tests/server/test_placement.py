"""Placement: every shard is owned, groups stay together, nobody is over its memory, the answer is cheap and stable."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_server.fleet import Candidate, Load, ShardLoad, carried, place
from cola_server.fleet.placement import FEW, MOVED_COPIES, PART_SECONDS, STATE_COPIES, STAY

AMPLE = 10**12


def shard(index: int, group: int, size: int, work: float = 1.0, nbytes: float = 1.0, x: float = 1.0) -> ShardLoad:
    return ShardLoad(index, group, Load(size, work, nbytes), x)


def shards_of(groups: st.SearchStrategy[int], least: int, most: int) -> st.SearchStrategy[list[ShardLoad]]:
    amount = st.floats(0.01, 10)
    items = st.lists(st.tuples(groups, st.integers(1, 1000), amount, amount, amount), min_size=least, max_size=most)
    return items.map(lambda items: [shard(i, *item) for i, item in enumerate(items)])


def workers_of(
    least: int, most: int, memory: st.SearchStrategy[int], *, owning: bool = False
) -> st.SearchStrategy[list[Candidate]]:
    speed = st.floats(0.1, 10)
    owned = st.frozensets(st.integers(0, 12), max_size=6) if owning else st.just(frozenset[int]())
    busy = st.builds(Load, st.integers(0, 100), st.floats(0, 10), st.floats(0, 10)) | st.just(Load())
    items = st.lists(st.tuples(memory, speed, speed, st.integers(0, 100), busy, owned), min_size=least, max_size=most)
    return items.map(lambda items: [Candidate(f"w{i}", *item) for i, item in enumerate(items)])


TIGHT = st.integers(0, 20_000)
SHARDS = shards_of(st.integers(0, 5), 1, 12)
WORKERS = workers_of(0, 5, TIGHT | st.just(AMPLE), owning=True)
PARTS = st.none() | st.integers(1, 3)
LEFT = st.sampled_from([0, 1, 10, 10_000])


def memory(worker: Candidate, load: Load) -> float:
    state = (worker.load.parameter_bytes + load.parameter_bytes) * STATE_COPIES
    return state + min(worker.window_bytes, worker.load.nbytes + load.nbytes)


def seconds(shards: Sequence[ShardLoad], workers: Sequence[Candidate], owners: Mapping[int, str]) -> float:
    """The price of a placement, in plain sums; infinite for what has no room."""
    slowest, used = 0.0, 0
    for worker in workers:
        mine = [s for s in shards if owners[s.index] == worker.worker]
        if not mine:
            continue
        used += 1
        xs = {s.group: max(t.x_bytes for t in mine if t.group == s.group) for s in mine}
        work = worker.load.work + sum(s.load.work for s in mine)
        nbytes = worker.load.nbytes + sum(s.load.nbytes for s in mine) + sum(xs.values())
        size = sum(s.load.parameter_bytes for s in mine)
        if memory(worker, Load(size, work, nbytes - worker.load.nbytes)) > worker.memory_bytes:
            return math.inf
        slowest = max(slowest, work / worker.speed + nbytes / worker.rate)
    return slowest + PART_SECONDS * (used - 1)


def best_of_all(shards: Sequence[ShardLoad], workers: Sequence[Candidate], parts: int | None = None) -> float:
    """The least price of any placement that keeps groups together, of those with the fewest owners above `parts`."""
    groups = sorted({s.group for s in shards})
    prices: dict[int, float] = {}
    for chosen in itertools.product(workers, repeat=len(groups)):
        count = len({c.worker for c in chosen})
        price = seconds(shards, workers, {s.index: chosen[groups.index(s.group)].worker for s in shards})
        if count >= min(parts or 1, len(groups)) and price < math.inf:
            above = max(0, count - (parts or count))
            prices[above] = min(price, prices.get(above, math.inf))
    return prices[min(prices)] if prices else math.inf


# --- what always holds ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SHARDS, WORKERS, PARTS, LEFT)
def test_an_answer_covers_all_shards_within_memory_and_keeps_groups(
    shards: list[ShardLoad], workers: list[Candidate], parts: int | None, left: int
) -> None:
    owners = place(shards, workers, parts, batches=left)
    if owners is None:
        return
    assert set(owners) == {s.index for s in shards}
    loads = carried(shards, owners)
    for worker in workers:
        assert worker.worker not in loads or memory(worker, loads[worker.worker]) <= worker.memory_bytes
    for a, b in itertools.combinations(shards, 2):
        assert a.group != b.group or owners[a.index] == owners[b.index]
    assert len(set(owners.values())) >= min(parts or 1, len({s.group for s in shards}))


@settings(deadline=None)
@given(SHARDS, WORKERS, PARTS, LEFT)
def test_the_order_of_the_candidates_does_not_matter(
    shards: list[ShardLoad], workers: list[Candidate], parts: int | None, left: int
) -> None:
    assert place(shards, workers, parts, batches=left) == place(shards, workers[::-1], parts, batches=left)


@settings(deadline=None)
@given(SHARDS, WORKERS, PARTS, LEFT)
def test_a_job_that_is_where_it_was_placed_stays_there(
    shards: list[ShardLoad], workers: list[Candidate], parts: int | None, left: int
) -> None:
    owners = place(shards, workers, parts, batches=left)
    if owners is not None:
        there = [dataclasses.replace(w, owned=owned(owners, w.worker)) for w in workers]
        assert place(shards, there, parts, batches=left) == owners


def owned(owners: Mapping[int, str], worker: str) -> frozenset[int]:
    return frozenset(index for index, owner in owners.items() if owner == worker)


# --- how good it is -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(shards_of(st.integers(0, 5), 1, 8), workers_of(1, 3, TIGHT | st.just(AMPLE)), PARTS)
def test_of_few_placements_the_best_is_found_however_tight_memory_is(
    shards: list[ShardLoad], workers: list[Candidate], parts: int | None
) -> None:
    best = best_of_all(shards, workers, parts) if len(workers) >= (parts or 1) else math.inf
    owners = place(shards, workers, parts)
    assert (owners is None) == (best == math.inf)
    assert owners is None or seconds(shards, workers, owners) <= best * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([(10, 2), (7, 3), (6, 4)]).flatmap(
        lambda size: st.tuples(
            shards_of(st.integers(0, 99), size[0], size[0]).map(alone), workers_of(size[1], size[1], st.just(AMPLE))
        )
    )
)
def test_of_many_placements_one_is_found_that_costs_at_most_a_quarter_more_than_the_best(
    case: tuple[list[ShardLoad], list[Candidate]],
) -> None:
    shards, workers = case
    assert len(workers) ** len(shards) > FEW
    owners = place(shards, workers)
    assert owners is not None
    assert seconds(shards, workers, owners) <= 1.25 * best_of_all(shards, workers)


def alone(shards: list[ShardLoad]) -> list[ShardLoad]:
    """Each shard a group of its own."""
    return [dataclasses.replace(s, group=s.index) for s in shards]


@settings(deadline=None)
@given(shards_of(st.integers(0, 30), 1, 40), workers_of(1, 8, TIGHT | st.just(AMPLE)))
def test_no_single_worker_with_the_memory_would_be_better(shards: list[ShardLoad], workers: list[Candidate]) -> None:
    single = min(seconds(shards, workers, dict.fromkeys(range(len(shards)), w.worker)) for w in workers)
    owners = place(shards, workers)
    if single < math.inf:
        assert owners is not None and seconds(shards, workers, owners) <= single * (1 + 1e-9)


def test_layers_are_shared_out_by_speed_and_by_the_way() -> None:
    layers = [shard(i, i, 1, work=1.0, nbytes=0.0, x=0.0) for i in range(50)]
    fast, slow = Candidate("fast", AMPLE, 4.0, 1e9), Candidate("slow", AMPLE, 1.0, 1e9)
    shares = list((place(layers, [fast, slow]) or {}).values())
    assert (shares.count("fast"), shares.count("slow")) == (40, 10)
    layers = [shard(i, i, 1, work=1.0, nbytes=1.0, x=0.0) for i in range(50)]
    near, far = Candidate("near", AMPLE, 1.0, 1e9), Candidate("far", AMPLE, 1.0, 1 / 3)
    shares = list((place(layers, [near, far]) or {}).values())
    assert (shares.count("near"), shares.count("far")) == (40, 10)


def test_a_large_fleet_and_a_deep_model_take_no_time_to_speak_of() -> None:
    layers = [shard(i, i, 1000 * (1 + i % 4), 1e7 * (1 + i % 4), 1e5) for i in range(120)]
    fleet = [Candidate(f"w{i:04}", 4 * 5000, 1e9 * (1 + i % 3), 1e9) for i in range(1000)]
    owners = place(layers, fleet)
    assert owners is not None  # each of these workers has room for a few layers; the test's time limit is the point
    assert max(load.parameter_bytes for load in carried(layers, owners).values()) <= 5000


# --- whole or split -------------------------------------------------------------------------------------------------


def test_a_job_stays_whole_where_it_fits_and_is_split_where_it_does_not() -> None:
    shards = [shard(0, 0, 100, work=1e-3, nbytes=0.0), shard(1, 1, 100, work=1e-3, nbytes=0.0)]
    small = [Candidate("a", 100 * STATE_COPIES, 1.0, 1e9), Candidate("b", 100 * STATE_COPIES, 1.0, 1e9)]
    large = Candidate("c", 200 * STATE_COPIES, 0.5, 1e9)
    assert place(shards, [large]) == {0: "c", 1: "c"}
    assert set((place(shards, small) or {}).values()) == {"a", "b"}
    assert place(shards, small[:1]) is None


@pytest.mark.parametrize("times", [0.5, 1.5])
def test_a_job_is_split_where_that_saves_more_than_another_owner_costs(times: float) -> None:
    shards = [shard(i, i, 1, work=times * PART_SECONDS, nbytes=0.0) for i in range(2)]
    workers = [Candidate("a", AMPLE, 1.0, 1e9), Candidate("b", AMPLE, 1.0, 1e9)]
    owners = place(shards, workers)
    assert owners is not None and len(set(owners.values())) == (2 if times > 1 else 1)


def test_what_the_window_may_hold_counts_as_memory() -> None:
    shards = [shard(0, 0, 1, nbytes=500.0, x=0.0)]
    assert place(shards, [Candidate("a", STATE_COPIES + 500, 1.0, 1.0, window_bytes=1000)]) == {0: "a"}
    assert place(shards, [Candidate("a", STATE_COPIES + 499, 1.0, 1.0, window_bytes=1000)]) is None
    assert place(shards, [Candidate("a", STATE_COPIES + 100, 1.0, 1.0, window_bytes=100)]) == {0: "a"}


@pytest.mark.parametrize("parts", [2, 3])
def test_a_job_that_is_to_be_split_waits_for_that_many_workers(parts: int) -> None:
    shards = [shard(i, i, 1) for i in range(30)]
    workers = [Candidate(f"w{i}", 1000, 10.0**-i, 1.0) for i in range(parts)]
    owners = place(shards, workers, parts)
    assert owners is not None and set(owners.values()) == {w.worker for w in workers}
    assert place(shards, workers[:-1], parts) is None


def test_of_two_idle_workers_the_faster_is_taken_until_its_load_outweighs_that() -> None:
    shards = [shard(0, 0, 100, work=1.0, nbytes=0.0)]
    slow, fast = Candidate("a", 10_000, 1.0, 1e9), Candidate("b", 10_000, 3.0, 1e9)
    assert place(shards, [slow, fast]) == {0: "b"}
    assert place(shards, [slow, dataclasses.replace(fast, load=Load(work=3.0))]) == {0: "a"}


# --- staying --------------------------------------------------------------------------------------------------------


JOB = [shard(0, 0, 1000, work=1.0, nbytes=0.0, x=0.0)]
OWNER = Candidate("owner", AMPLE, 1.0, 1000.0, owned=frozenset({0}))
FAST = Candidate("fast", AMPLE, 10.0, 1000.0)
GAIN = 1.0 - 0.1
WAY = MOVED_COPIES * 1000 / 1000.0  # seconds for the state


@pytest.mark.parametrize("restart", [0.0, 7.0])
def test_a_job_moves_when_the_batches_that_are_left_gain_more_than_the_move_costs(restart: float) -> None:
    enough = math.floor((WAY + restart) / GAIN) + 1
    assert place(JOB, [OWNER, FAST], batches=enough, restart=restart) == {0: "fast"}
    assert place(JOB, [OWNER, FAST], batches=enough - 1, restart=restart) == {0: "owner"}


def test_a_job_gains_no_more_than_it_waits_for_its_workers() -> None:
    assert place(JOB, [OWNER, FAST], batches=100, most=1.01 * WAY / 100) == {0: "fast"}
    assert place(JOB, [OWNER, FAST], batches=100, most=0.99 * WAY / 100) == {0: "owner"}


def test_a_job_does_not_move_for_a_little_however_long_it_takes() -> None:
    for speed, owner in ((STAY * 0.99, "owner"), (STAY * 1.01, "fast")):
        workers = [OWNER, dataclasses.replace(FAST, speed=speed)]
        assert place(JOB, workers, batches=10**9) == {0: owner}


def test_whoever_has_the_state_is_preferred_to_equals_and_what_nobody_has_joins_it() -> None:
    job = [shard(i, i, 10, work=1e-3, nbytes=0.0) for i in range(3)]
    workers = [Candidate(f"w{i}", AMPLE, 1.0, 1e3) for i in range(3)]
    workers[1] = dataclasses.replace(workers[1], owned=frozenset({0, 1}))
    assert place(job, workers, batches=1000) == dict.fromkeys(range(3), "w1")


def test_a_worker_whose_state_no_longer_fits_is_no_owner() -> None:
    full = dataclasses.replace(OWNER, memory_bytes=10)
    assert place(JOB, [full, FAST]) == {0: "fast"}
    assert place(JOB, [full]) is None


def test_a_split_job_that_loses_an_owner_gives_its_part_to_another_and_leaves_the_rest() -> None:
    job = [shard(i, i, 10, work=1.0, nbytes=0.0) for i in range(12)]
    workers = [Candidate(f"w{i}", AMPLE, 1.0, 1e3) for i in range(3)]
    first = place(job, workers[:2], 2)
    assert first is not None
    left = [dataclasses.replace(w, owned=owned(first, w.worker)) for w in (workers[0], workers[2])]
    second = place(job, left, 2, batches=10)
    assert second == {i: "w0" if worker == "w0" else "w2" for i, worker in first.items()}
