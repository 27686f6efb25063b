"""The model thread's times: each second is of one kind, and of the right one."""

import asyncio
import threading
import time
from contextlib import ExitStack

import pytest

from cola_server.training.idle import Idle, Times
from cola_server.training.numerics import Numerics


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def idle(clock):
    return Idle(clock)


def test_without_a_job_it_is_jobless_and_with_one_it_waits_or_is_busy(idle, clock):
    clock.now += 1
    with idle.job():
        clock.now += 2
        with idle.working():
            clock.now += 4
        clock.now += 8
    clock.now += 16
    assert idle.times() == Times(busy=4, waiting=10, jobless=17)


def test_what_is_computed_for_no_running_job_is_busy_too(idle, clock):
    with idle.working():
        clock.now += 3
    assert idle.times() == Times(busy=3, waiting=0, jobless=0)


def test_times_are_told_up_to_now_and_asking_changes_nothing(idle, clock):
    with idle.job():
        for second in range(1, 4):
            clock.now += 1
            assert idle.times() == idle.times() == Times(busy=0, waiting=second, jobless=0)


def test_one_of_several_jobs_is_enough_to_wait_for(idle, clock):
    with ExitStack() as first, idle.job():
        first.enter_context(idle.job())
        clock.now += 1
        first.close()
        clock.now += 2
    clock.now += 4
    assert idle.times() == Times(busy=0, waiting=3, jobless=4)


def test_what_fails_has_ended(idle, clock):
    with pytest.raises(ZeroDivisionError), idle.job(), idle.working():
        clock.now += 1
        raise ZeroDivisionError
    clock.now += 2
    assert idle.times() == Times(busy=1, waiting=0, jobless=2)


def test_jobs_that_come_and_go_on_many_threads_lose_no_time(idle, clock):
    def come_and_go():
        for _ in range(500):
            with idle.job(), idle.working():
                idle.times()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        clock.now += 1
    for thread in threads:
        thread.join()
    passed = clock.now - 100.0
    clock.now += 5
    times = idle.times()
    assert times.busy + times.waiting + times.jobless == passed + 5
    clock.now += 7
    assert idle.times() == Times(times.busy, times.waiting, times.jobless + 7)  # nobody is left


async def test_the_numerics_thread_is_busy_as_long_as_it_computes():
    numerics, began = Numerics(), time.perf_counter()
    with numerics.idle.job():
        await numerics.run(time.sleep, 0.05)
        await asyncio.sleep(0.05)
        numerics.call(time.sleep, 0.05)
    times, passed = numerics.idle.times(), time.perf_counter() - began
    numerics.close()
    assert 0.1 <= times.busy <= passed - 0.05
    assert 0.05 <= times.waiting <= passed - 0.1
