"""Turns: a job gives its own up and takes it again as its user says, and no word of a user's is lost on the way."""

import asyncio
from collections.abc import Callable

import pytest

from cola_server.tenants import Quota, Quotas
from cola_server.training.admission import Admission
from cola_server.training.line import Line
from cola_server.training.turn import Stopped, Turn


class Jobs:
    """Jobs in a line that lets one run at a time, until they are asked to stop, to give up their turn, or to end."""

    def __init__(self) -> None:
        self.line = Line(Quotas(Quota(max_running=1)), Admission(0), rest=lambda tenant: None)
        self.running: list[str] = []
        self.log: list[str] = []
        self.turns: dict[str, Turn] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def submit(self, job: str) -> asyncio.Task[None]:
        self.turns[job] = Turn(self.line, job, "default")
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


async def test_a_paused_job_lets_the_next_one_in_and_goes_to_the_end_of_the_line_when_it_is_resumed() -> None:
    jobs = Jobs()
    for job in "abc":
        jobs.submit(job)
    await settle()
    jobs.turns["a"].pause()
    assert jobs.turns["a"].interrupted
    await settle()
    assert jobs.running == ["b"] and not jobs.turns["a"].held
    jobs.turns["a"].resume()
    for running in "bca":
        await settle()
        assert jobs.running == [running] and not jobs.turns[running].interrupted
        jobs.end(running)
    await settle()
    assert jobs.running == []


async def test_a_job_that_is_paused_in_the_line_is_passed_over() -> None:
    jobs = Jobs()
    for job in "abc":
        jobs.submit(job)
    await settle()
    jobs.turns["b"].pause()
    jobs.end("a")
    await settle()
    assert jobs.running == ["c"]
    jobs.turns["b"].resume()
    await settle()
    assert jobs.running == ["c"]
    jobs.end("c")
    await settle()
    assert jobs.running == ["b"]


async def test_a_job_that_is_paused_and_resumed_within_one_step_gives_up_its_turn_all_the_same() -> None:
    """In the store it is queued: it must come back to its turn to be running."""
    jobs = Jobs()
    for job in "ab":
        jobs.submit(job)
    await settle()
    jobs.turns["a"].pause()
    jobs.turns["a"].resume()
    assert jobs.turns["a"].interrupted
    await settle()
    assert jobs.running == ["b"]
    jobs.end("b")
    await settle()
    assert jobs.running == ["a"] and not jobs.turns["a"].interrupted


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
    jobs = Jobs()
    if place == "in line":
        jobs.submit("first")
    jobs.submit("a")
    await settle()
    for word in said:
        word(jobs.turns["a"])
        for _ in range(between):
            await asyncio.sleep(0)
    if place == "in line":
        jobs.end("first")
    await settle()
    assert jobs.running == (["a"] if runs else [])
    jobs.turns["a"].resume()
    await settle()
    assert jobs.running == ["a"]


@pytest.mark.parametrize("place", ["running", "in line", "paused", "paused in line"])
@pytest.mark.parametrize("then", [None, Turn.pause, Turn.resume])
async def test_a_server_that_stops_stops_every_job_for_good(place: str, then: Word | None) -> None:
    jobs = Jobs()
    tasks = [jobs.submit("first")] if "line" in place else []
    tasks.append(jobs.submit("a"))
    await settle()
    if "paused" in place:
        jobs.turns["a"].pause()
        await settle()
    for turn in jobs.turns.values():
        turn.stop()
        if then is not None:
            then(turn)
    await asyncio.wait_for(asyncio.gather(*tasks), 1)
    assert jobs.running == []
    for job, turn in jobs.turns.items():
        assert [said for said in jobs.log if said.startswith(job)][-1] == f"{job} stopped"
        assert not turn.held


async def test_a_job_that_is_cancelled_leaves_its_place_to_others() -> None:
    jobs = Jobs()
    tasks = {job: jobs.submit(job) for job in "abc"}
    await settle()
    tasks["b"].cancel()
    tasks["a"].cancel()
    await settle()
    assert jobs.running == ["c"]


@pytest.mark.parametrize("word", [Turn.pause, Turn.stop])
async def test_who_waits_for_an_interruption_learns_of_it(word: Word) -> None:
    async with Turn(Jobs().line, "a", "default") as turn:
        waiting = asyncio.create_task(turn.interruption())
        await settle()
        assert not waiting.done()
        word(turn)
        await asyncio.wait_for(waiting, 1)
