"""Passes: who shares one, whose turn it is, and that nobody's trouble is another's."""

import asyncio
import random
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cola_common.errors import ColaError, Reason
from cola_server.model import BatchResult, train
from cola_server.training import cohorts
from cola_server.training.cohorts import Cohorts, Request
from cola_server.training.numerics import Numerics
from cola_server.training.shares import Shares
from tests.server.test_step import job as real_job
from tests.support.models import base_of, tiny

BUDGET = 64


class Base:
    """A model that computes nothing."""

    def __init__(self):
        self.name = "base"
        self.merged = []
        self.seat = SimpleNamespace(take=self.merged.append)


class Passes:
    """Jobs that ask for passes of `Base`; who was in which is noted. A pass takes one second of a clock of its own."""

    def __init__(self, monkeypatch, weights):
        self.numerics = Numerics()
        self.cohorts = Cohorts(self.numerics, Shares(weights), BUDGET)
        self.base = Base()
        self.done = []
        self.during = lambda: None
        """Called in each pass."""
        self.asked = {}
        monkeypatch.setattr(cohorts, "train", self.train)
        monkeypatch.setattr(cohorts, "time", SimpleNamespace(perf_counter=lambda: float(len(self.done))))

    def train(self, base, batches):
        self.done.append([request.job for request in batches])
        self.during()
        return [BatchResult(0.0, request.tokens, request.tokens, ()) for request in batches]

    def ask(self, job, tenant="default", *, tokens=16, length=16, kind="lora", merging=None, base=None):
        request = Request(job, tenant, base or self.base, length, tokens, kind, merging, batch=lambda: request)
        self.asked[job] = request
        return asyncio.create_task(self.cohorts.train(request), name=job)

    @asynccontextmanager
    async def held(self):
        """Whoever asks meanwhile waits: the thread has something else to do."""
        gate = threading.Event()
        self.numerics.post(gate.wait)
        try:
            yield
            await asyncio.sleep(0)  # the tasks have asked
        finally:
            gate.set()


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def passes(monkeypatch):
    made = Passes(monkeypatch, {"one": 1.0, "two": 2.0, "four": 4.0})
    yield made
    made.numerics.close()


# --- who sits beside whom -------------------------------------------------------------------------------------------


async def test_who_waits_shares_a_pass_up_to_the_budget_and_who_is_small_takes_what_is_left(passes):
    async with passes.held():
        tasks = [passes.ask(job, tokens=tokens) for job, tokens in zip("abcde", (32, 16, 32, 16, 16), strict=True)]
    await asyncio.gather(*tasks)
    assert passes.done == [["a", "b", "d"], ["c", "e"]]


async def test_few_jobs_are_two_cohorts_of_one_size(passes):
    """The first to come back goes alone; from then on nobody is left behind."""
    rounds = iter([["b", "c", "d"], ["a"], ["b", "c"], ["d", "a"]])  # who asks during each pass
    loop, tasks = asyncio.get_running_loop(), []

    def ask():
        for job in next(rounds, []):
            loop.call_soon_threadsafe(lambda job=job: tasks.append(passes.ask(job)))
        asyncio.run_coroutine_threadsafe(settle(), loop).result()

    passes.during = ask
    await passes.ask("a")
    while len(passes.done) < 5:
        await settle()
    await asyncio.gather(*tasks)
    assert [sorted(cohort) for cohort in passes.done] == [["a"], ["b", "c"], ["a", "d"], ["b", "c"], ["a", "d"]]


async def test_a_batch_over_the_budget_runs_alone(passes):
    async with passes.held():
        tasks = [passes.ask("small"), passes.ask("large", tokens=BUDGET + 16), passes.ask("another")]
    await asyncio.gather(*tasks)
    assert passes.done == [["small", "another"], ["large"]]


async def test_only_what_has_one_base_and_one_padded_length_is_together(passes):
    other = Base()
    async with passes.held():
        tasks = [
            passes.ask("a"),
            passes.ask("longer", length=32, tokens=32),
            passes.ask("other base", base=other),
            passes.ask("b"),
            passes.ask("other base, too", base=other),
        ]
    await asyncio.gather(*tasks)
    assert passes.done == [["a", "b"], ["longer"], ["other base", "other base, too"]]


async def test_a_merged_job_is_alone_with_its_weights_in_the_base_and_the_others_have_them_out(passes):
    async with passes.held():
        tasks = [passes.ask("a"), passes.ask("m", merging="m's"), passes.ask("b"), passes.ask("n", merging="n's")]
    await asyncio.gather(*tasks)
    assert passes.done == [["a", "b"], ["m"], ["n"]]
    assert passes.base.merged == [None, "m's", "n's"]


async def test_jobs_of_a_kind_are_neighbours(passes):
    async with passes.held():
        tasks = [passes.ask(job, kind=kind, tokens=8) for job, kind in zip("abcde", "xyxyx", strict=True)]
    await asyncio.gather(*tasks)
    assert passes.done == [["a", "c", "e", "b", "d"]]


async def test_a_passs_seconds_are_divided_by_tokens(passes):
    async with passes.held():
        tasks = [passes.ask("a", tokens=48), passes.ask("b", tokens=16)]
    a, b = await asyncio.gather(*tasks)
    assert (a.seconds, b.seconds) == (0.75, 0.25)
    assert (a.result.tokens, b.result.tokens) == (48, 16)


# --- whose turn it is -----------------------------------------------------------------------------------------------


async def ask_on(passes, job, tenant, count, **fields):
    for number in range(count):
        await passes.ask(f"{job} {number}", tenant, **fields)


@pytest.mark.parametrize("tokens", [BUDGET, BUDGET // 4], ids=["a pass each", "cohorts of four"])
async def test_tenants_have_the_models_time_by_weight(passes, tokens):
    """Each has as many jobs as two passes have seats. They ask again as soon as they have been served: a pass lasts
    until all who were in the last one have.
    """
    tenants = {"one": 1, "two": 2, "four": 4}
    loop = asyncio.get_running_loop()
    passes.during = lambda: asyncio.run_coroutine_threadsafe(settle(), loop).result(10)
    async with passes.held():
        tasks = [
            asyncio.create_task(ask_on(passes, f"{tenant} {job}", tenant, 30, tokens=tokens))
            for tenant in tenants
            for job in range(8)
        ]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    seats = [job.split()[0] for jobs in passes.done for job in jobs]
    last = max(number for number, tenant in enumerate(seats) if tenant == "four")
    had = Counter(seats[: last + 1])  # while all had work
    assert had["four"] == 240
    per_weight = [had[tenant] / weight for tenant, weight in tenants.items()]
    assert max(per_weight) <= 1.1 * min(per_weight)


async def test_a_flood_lets_a_newcomer_go_next(passes):
    """Who comes while a pass runs is in the one after it."""
    loop, comes, came = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def third_pass():
        if len(passes.done) == 3:
            loop.call_soon_threadsafe(comes.set)
            assert came.wait(10)

    passes.during = third_pass
    async with passes.held():
        flood = [passes.ask(f"flood {number}", "flood", tokens=BUDGET) for number in range(50)]
    await comes.wait()
    newcomer = passes.ask("newcomer", "other")
    await asyncio.sleep(0)
    came.set()
    await asyncio.gather(newcomer, *flood)
    assert passes.done[3] == ["newcomer"]


async def test_a_small_job_of_a_newcomers_sits_in_the_floods_next_cohort(passes):
    async with passes.held():
        flood = [passes.ask(f"flood {number}", "flood") for number in range(50)]
        newcomer = passes.ask("newcomer", "other")
    await asyncio.gather(newcomer, *flood)
    assert "newcomer" in passes.done[0]
    assert len(passes.done[0]) == 4


async def test_a_tenant_that_rests_saves_nothing_up(passes):
    for number in range(2):
        await passes.ask(f"a {number}", "a", tokens=BUDGET)
    passes.cohorts.rest("b")
    for number in range(40):
        await passes.ask(f"busy {number}", "busy", tokens=BUDGET)
    passes.cohorts.rest("a")
    passes.done.clear()
    async with passes.held():
        tasks = [passes.ask(f"{t} {n}", t, tokens=BUDGET) for t in ("a", "busy") for n in range(10)]
    await asyncio.gather(*tasks)
    assert Counter(jobs[0][0] for jobs in passes.done[:10]) == {"a": 5, "b": 5}


# --- the thread -----------------------------------------------------------------------------------------------------


async def test_passes_follow_one_another_while_the_event_loop_is_busy(passes):
    third = threading.Event()
    passes.during = lambda: third.set() if len(passes.done) == 3 else None
    async with passes.held():
        tasks = [passes.ask(job, tokens=BUDGET) for job in "abc"]
    assert third.wait(10)  # on the event loop's own thread, which does nothing else meanwhile
    await asyncio.gather(*tasks)


async def test_what_the_thread_is_asked_during_a_pass_comes_before_the_next_one(passes):
    in_pass, asked = threading.Event(), threading.Event()

    def during():
        in_pass.set()
        assert asked.wait(10)

    passes.during = during
    async with passes.held():
        tasks = [passes.ask(job, tokens=BUDGET) for job in "ab"]
    assert await asyncio.to_thread(in_pass.wait, 10)
    passes.numerics.post(lambda: passes.done.append(["fold"]))
    asked.set()
    await asyncio.gather(*tasks)
    assert passes.done == [["a"], ["fold"], ["b"]]


@pytest.mark.alone
@pytest.mark.parametrize(("count", "least", "most"), [(1, 0.3, 1.0), (3, 0.0, 0.05), (5, 0.0, 0.05)])
async def test_with_three_cohorts_the_model_waits_for_nobody_whose_answer_is_a_pass_late(
    monkeypatch, count, least, most
):
    """Two jobs make a cohort, and its pass takes 50 ms."""
    seconds, steps = 0.05, 12
    passes = Passes(monkeypatch, {})
    passes.during = lambda: time.sleep(seconds * len(passes.done[-1]) / 2)

    async def work(job):
        with passes.numerics.idle.job():
            for _ in range(steps):
                await passes.ask(job, tokens=BUDGET // 2)
                await asyncio.sleep(seconds)

    async def look():
        """The times from when all have begun until the first one ends."""
        before = passes.numerics.idle.times()
        jobs = [asyncio.create_task(work(f"{number}")) for number in range(2 * count)]
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        after = passes.numerics.idle.times()
        await asyncio.gather(*jobs)
        return after.busy - before.busy, after.waiting - before.waiting

    busy, waiting = await look()
    passes.numerics.close()
    assert least <= waiting / (busy + waiting) <= most


# --- trouble --------------------------------------------------------------------------------------------------------


async def test_a_job_whose_batch_cannot_be_made_has_its_error_and_the_others_what_they_have_alone():
    """On a real model."""
    base = base_of(tiny("llama"))
    numerics = Numerics()
    passes = Cohorts(numerics, Shares({}), 1000)
    batches = [real_job(base, target, name=target) for target in ("q_proj", "v_proj", "down_proj")]
    alone = [train(base, [replace(batch, sink=real_job(base, "q_proj").sink)])[0] for batch in batches]

    def broken():
        raise ColaError(Reason.STORAGE_FULL, file="rows")

    made = [broken if number == 1 else lambda batch=batch: batch for number, batch in enumerate(batches)]
    gate = threading.Event()
    numerics.post(gate.wait)
    tasks = [
        asyncio.create_task(passes.train(Request(batch.job, "default", base, 16, 48, "lora", None, make)))
        for batch, make in zip(batches, made, strict=True)
    ]
    await asyncio.sleep(0)
    gate.set()
    first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
    numerics.close()
    assert isinstance(second, ColaError) and second.reason == Reason.STORAGE_FULL
    assert batches[1].sink.seen == []
    for got, batch, wanted in ((first, batches[0], alone[0]), (third, batches[2], alone[2])):
        assert got.result.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert got.result.calls == wanted.calls
        assert batch.sink.seen


async def test_a_cohort_in_which_no_batch_can_be_made_has_no_pass(passes):
    async with passes.held():
        tasks = [passes.ask(job) for job in "ab"]
        await asyncio.sleep(0)
        for request in passes.asked.values():
            request.batch = lambda: 1 // 0
    got = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in got] == [ZeroDivisionError] * 2
    assert passes.done == []


async def test_what_a_pass_says_of_one_job_is_told_to_that_job(passes, monkeypatch):
    error = ColaError(Reason.NON_FINITE_LOSS, step=1, job="b")
    result = BatchResult(1.0, 16, 16, ())
    monkeypatch.setattr(cohorts, "train", lambda base, batches: [result, error, result])
    async with passes.held():
        tasks = [passes.ask(job) for job in "abc"]
    a, b, c = await asyncio.gather(*tasks, return_exceptions=True)
    assert (a.result, b, c.result) == (result, error, result)


async def test_a_pass_that_breaks_is_told_to_all_in_it_and_the_next_one_runs(passes):
    def first_breaks():
        if len(passes.done) == 1:
            raise RuntimeError("out of memory")

    passes.during = first_breaks
    async with passes.held():
        tasks = [passes.ask("a"), passes.ask("b"), passes.ask("longer", length=32)]
    a, b, longer = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(a, RuntimeError) and isinstance(b, RuntimeError)
    assert longer.result.tokens == 16


async def test_who_is_cancelled_while_it_waits_is_in_no_pass(passes):
    async with passes.held():
        tasks = [passes.ask(job, tokens=BUDGET) for job in "abc"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
    await asyncio.gather(tasks[0], tasks[2])
    assert passes.done == [["a"], ["c"]]


async def test_who_is_cancelled_during_its_pass_leaves_the_others_theirs(passes):
    in_pass, cancelled, problems = threading.Event(), threading.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))

    def during():
        in_pass.set()
        assert cancelled.wait(10)

    passes.during = during
    async with passes.held():
        tasks = [passes.ask("a"), passes.ask("b")]
    assert await asyncio.to_thread(in_pass.wait, 10)
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    cancelled.set()
    assert (await tasks[1]).result.tokens == 16
    assert tasks[0].cancelled()
    assert problems == []


async def test_after_all_who_waited_were_cancelled_the_next_one_has_its_pass(passes):
    async with passes.held():
        task = passes.ask("a")
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await passes.numerics.run(lambda: None)
    await asyncio.wait_for(passes.ask("b"), 10)
    assert passes.done == [["b"]]


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_is_asked_and_cancelled_all_others_are_served_once_and_rules_hold(passes, seed):
    rng = random.Random(seed)
    bases, tasks, cancelled = [passes.base, Base()], {}, set()
    for number in range(300):
        job, length = f"{number}", rng.choice([16, 32])
        tasks[job] = passes.ask(
            job,
            rng.choice(["one", "two", "four", "other"]),
            length=length,
            tokens=length * rng.randint(1, 5),
            kind=rng.choice("xy"),
            merging=rng.choice([None, None, None, "merged"]),
            base=rng.choice(bases),
        )
        if rng.random() < 0.3:
            await asyncio.sleep(rng.choice([0, 0.001]))
        other = rng.choice(list(tasks))
        if rng.random() < 0.2 and not tasks[other].done():
            cancelled.add(other)
            tasks[other].cancel()
    await asyncio.wait_for(asyncio.wait(tasks.values()), 20)
    served = Counter(job for jobs in passes.done for job in jobs)
    assert set(served.values()) == {1}
    assert {job for job, task in tasks.items() if not task.cancelled()} <= set(served)
    assert {job for job, task in tasks.items() if task.cancelled()} <= cancelled
    for jobs in passes.done:
        requests = [passes.asked[job] for job in jobs]
        assert len({(id(r.base), r.length) for r in requests}) == 1
        assert len(jobs) == 1 or sum(r.tokens for r in requests) <= BUDGET
        assert len(jobs) == 1 or not any(r.merging for r in requests)
        assert [r.kind for r in requests] == sorted(r.kind for r in requests)
