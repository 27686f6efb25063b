"""Turns: so many jobs at once, in the order in which they came, and no word of a user's is lost on the way."""

import asyncio
from collections.abc import Callable

import pytest

from cola_server.training.turn import Stopped, Turn


class Line:
    """Jobs that run until they are asked to stop, to give up their turn, or to end."""

    def __init__(self, count: int) -> None:
        self.semaphore = asyncio.Semaphore(count)
        self.running: list[str] = []
        self.log: list[str] = []
        self.turns: dict[str, Turn] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def submit(self, job: str) -> asyncio.Task[None]:
        self.turns[job] = Turn(self.semaphore)
        self._ends[job] = asyncio.Event()
        self._tasks.append(asyncio.create_task(self._run(job)))
        return self._tasks[-1]

    def end(self, job: str) -> None:
        self._ends[job].set()

    async def _run(self, job: str) -> None:
        turn, end = self.turns[job], self._ends[job]
        try:
            async with turn:
                while not end.is_set():
                    self.running.append(job)
                    self.log.append(job)
                    try:
                        waits = [asyncio.create_task(w) for w in (turn.interruption(), end.wait())]
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                        for wait in waits:
                            wait.cancel()
                    finally:
                        self.running.remove(job)
                    if not end.is_set():
                        await turn.again()
        except Stopped:
            self.log.append(f"{job} stopped")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_so_many_jobs_run_at_once_and_in_the_order_in_which_they_came(count: int) -> None:
    line = Line(count)
    jobs = ["a", "b", "c", "d", "e"]
    for job in jobs:
        line.submit(job)
    for done in range(len(jobs)):
        await settle()
        assert line.running == jobs[done : done + count]
        assert [line.turns[job].held for job in jobs[done:]] == [i < count for i in range(len(jobs) - done)]
        line.end(jobs[done])
    await settle()
    assert line.running == [] and line.log == jobs


async def test_a_paused_job_lets_the_next_one_in_and_goes_to_the_end_of_the_line_when_it_is_resumed() -> None:
    line = Line(1)
    for job in "abc":
        line.submit(job)
    await settle()
    line.turns["a"].pause()
    assert line.turns["a"].interrupted
    await settle()
    assert line.running == ["b"] and not line.turns["a"].held
    line.turns["a"].resume()
    for running in "bca":
        await settle()
        assert line.running == [running] and not line.turns[running].interrupted
        line.end(running)
    await settle()
    assert line.running == []


async def test_a_job_that_is_paused_in_the_line_is_passed_over() -> None:
    line = Line(1)
    for job in "abc":
        line.submit(job)
    await settle()
    line.turns["b"].pause()
    line.end("a")
    await settle()
    assert line.running == ["c"]
    line.turns["b"].resume()
    await settle()
    assert line.running == ["c"]
    line.end("c")
    await settle()
    assert line.running == ["b"]


async def test_a_job_that_is_paused_and_resumed_within_one_step_gives_up_its_turn_all_the_same() -> None:
    """In the store it is queued: it must come back to its turn to be running."""
    line = Line(1)
    for job in "ab":
        line.submit(job)
    await settle()
    line.turns["a"].pause()
    line.turns["a"].resume()
    assert line.turns["a"].interrupted
    await settle()
    assert line.running == ["b"]
    line.end("b")
    await settle()
    assert line.running == ["a"] and not line.turns["a"].interrupted


Word = Callable[[Turn], object]
WORDS: dict[str, tuple[list[Word], bool]] = {
    "pause": ([Turn.pause], False),
    "pause, resume": ([Turn.pause, Turn.resume], True),
    "pause, resume, pause": ([Turn.pause, Turn.resume, Turn.pause], False),
    "pause, resume, pause, resume": ([Turn.pause, Turn.resume] * 2, True),
    "resume": ([Turn.resume], True),
    "resume, pause": ([Turn.resume, Turn.pause], False),
}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("between", [0, 1, 2, 3, 20])
@pytest.mark.parametrize("place", ["running", "in line"])
async def test_the_last_word_counts_however_fast_they_come(words: str, between: int, place: str) -> None:
    said, runs = WORDS[words]
    line = Line(1)
    if place == "in line":
        line.submit("first")
    line.submit("a")
    await settle()
    for word in said:
        word(line.turns["a"])
        for _ in range(between):
            await asyncio.sleep(0)
    if place == "in line":
        line.end("first")
    await settle()
    assert line.running == (["a"] if runs else [])
    line.turns["a"].resume()
    await settle()
    assert line.running == ["a"]


@pytest.mark.parametrize("place", ["running", "in line", "paused", "paused in line"])
@pytest.mark.parametrize("then", [None, Turn.pause, Turn.resume])
async def test_a_server_that_stops_stops_every_job_for_good(place: str, then: Word | None) -> None:
    line = Line(1)
    if "line" in place:
        line.submit("first")
    task = line.submit("a")
    await settle()
    if "paused" in place:
        line.turns["a"].pause()
        await settle()
    for turn in line.turns.values():
        turn.stop()
        if then is not None:
            then(turn)
    await asyncio.wait_for(task, 1)
    assert line.log[-1] == "a stopped" and line.running == []
    assert not line.turns["a"].held


async def test_a_job_that_is_cancelled_leaves_its_place_to_others() -> None:
    line = Line(1)
    tasks = {job: line.submit(job) for job in "abc"}
    await settle()
    tasks["b"].cancel()
    tasks["a"].cancel()
    await settle()
    assert line.running == ["c"]


@pytest.mark.parametrize("word", [Turn.pause, Turn.stop])
async def test_who_waits_for_an_interruption_learns_of_it(word: Word) -> None:
    async with Turn(asyncio.Semaphore(1)) as turn:
        waiting = asyncio.create_task(turn.interruption())
        await settle()
        assert not waiting.done()
        word(turn)
        await asyncio.wait_for(waiting, 1)
