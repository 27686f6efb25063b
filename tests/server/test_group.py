"""A group among its members: who waits for whom, and what one's leaving means for the others. Without a model."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from cola_common.errors import ColaError, Reason
from cola_server.tenants import Quota, Quotas
from cola_server.training.group import Group, Parted, Session
from cola_server.training.line import Line, Place
from cola_server.training.turn import Stopped, Turn


class Room:
    """As much as anybody asks for; it knows who has taken some."""

    memory_bytes = 40

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}

    def fits(self, bytes: int) -> bool:
        return True

    def take(self, job: str, bytes: int) -> None:
        self.taken[job] = bytes

    def release(self, job: str) -> None:
        del self.taken[job]


class Stage:
    """A line with `running` places, and a group of members a, b, c … in it."""

    def __init__(self, size: int = 3, running: int = 1) -> None:
        self.room = Room()
        self.line = Line(Quotas(Quota(max_running=running)), self.room, lambda tenant: None)
        self.told: list[tuple[str, str]] = []
        self.group = Group("first", "g", size, self.line, self.tell)
        self.turns: dict[str, Turn] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.has_turn: set[str] = set()

    async def tell(self, job: str, text: str) -> None:
        self.told.append((job, text))

    def member(self, job: str) -> Turn:
        """Starts a member, which gives up its turn whenever it is asked to."""
        turn = self.turns[job] = Turn(self.group, job, "default")
        turn.bytes = 10
        self.tasks[job] = asyncio.create_task(self._live(job, turn))
        self.group.join(job, turn, self.tasks[job])
        return turn

    async def _live(self, job: str, turn: Turn) -> None:
        try:
            async with turn:
                while True:
                    self.has_turn.add(job)
                    await turn.interruption()
                    self.has_turn.discard(job)
                    await turn.again()
        except Stopped:
            pass
        finally:
            self.has_turn.discard(job)

    def stranger(self, job: str) -> Place:
        place = Place(job, "default", 1)
        self.tasks[job] = asyncio.create_task(self.line.stand(place))  # type: ignore[arg-type]
        return place


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_nobody_starts_before_all_are_there_and_all_take_one_place() -> None:
    stage = Stage()
    stage.member("a")
    await settled()
    first = stage.stranger("alone")
    stage.member("b")
    await settled()
    assert stage.told == [("a", "Waiting for the group 'g': 1 of 3."), ("b", "Waiting for the group 'g': 2 of 3.")]
    assert first.answer.done(), "an incomplete group holds nobody up"
    stage.member("c")
    await settled()
    assert not stage.has_turn
    assert {stage.turns[job].number for job in "abc"} == {1}
    stage.line.leave(first)
    await settled()
    assert stage.has_turn == {"a", "b", "c"}
    assert stage.room.taken == {"first": 30}
    assert {stage.turns[job].number for job in "abc"} == {None}


@pytest.mark.parametrize("paused", "abc")
async def test_one_that_pauses_holds_all_and_the_place_is_free_meanwhile(paused: str) -> None:
    stage = Stage()
    for job in "abc":
        stage.member(job)
    await settled()
    stage.turns[paused].pause()
    await settled()
    assert not stage.has_turn
    assert stage.room.taken == {}
    assert stage.told[-1] == (max(set("abc") - {paused}), "Waiting for the group 'g': 2 of 3.")
    stage.turns[paused].resume()
    await settled()
    assert stage.has_turn == {"a", "b", "c"}


async def test_one_that_pauses_while_the_group_stands_in_line_takes_it_out_of_the_line() -> None:
    stage = Stage()
    first = stage.stranger("alone")
    for job in "abc":
        stage.member(job)
    await settled()
    stage.turns["b"].pause()
    await settled()
    stage.line.leave(first)
    await settled()
    assert not stage.has_turn
    assert stage.room.taken == {}
    stage.turns["b"].resume()
    await settled()
    assert stage.has_turn == {"a", "b", "c"}


async def test_one_that_pauses_in_the_moment_in_which_the_place_comes_holds_all() -> None:
    """Whatever it sees first: the line's answer, the group's or its own."""
    for rounds in range(6):
        stage = Stage()
        first = stage.stranger("alone")
        for job in "abc":
            stage.member(job)
        await settled()
        stage.line.leave(first)
        for _ in range(rounds):
            await asyncio.sleep(0)
        stage.turns["b"].pause()
        await settled()
        assert not stage.has_turn, rounds
        assert stage.room.taken == {}, rounds
        stage.turns["b"].resume()
        await settled()
        assert stage.has_turn == {"a", "b", "c"}, rounds


async def test_a_stop_ends_all() -> None:
    stage = Stage()
    for job in "abc":
        stage.member(job)
    await settled()
    for turn in stage.turns.values():
        turn.stop()
    await settled()
    assert all(task.done() for task in stage.tasks.values())
    assert stage.room.taken == {}


async def test_one_that_is_cancelled_takes_all_tasks_with_it_and_the_place() -> None:
    stage = Stage()
    for job in "abc":
        stage.member(job)
    await settled()
    stage.tasks["a"].cancel()
    stage.group.dissolve("a")
    await settled()
    assert all(task.cancelled() for task in stage.tasks.values())
    assert stage.room.taken == {}


async def test_the_others_go_on_without_one_that_has_ended_and_keep_the_place() -> None:
    stage = Stage()
    for job in "abc":
        stage.member(job)
    await settled()
    stage.group.end({"b": None})  # type: ignore[dict-item]
    stage.turns["b"].stop()
    await settled()
    assert stage.has_turn == {"a", "c"}
    assert not stage.group.leave_off("b")
    assert stage.room.taken == {"first": 30}
    stage.turns["a"].pause()
    await settled()
    assert stage.told[-1] == ("c", "Waiting for the group 'g': 2 of 3.")
    assert stage.room.taken == {}
    stage.turns["a"].resume()
    await settled()
    assert stage.has_turn == {"a", "c"}


async def test_a_group_that_can_never_have_room_is_told_so() -> None:
    stage = Stage()
    stage.room.memory_bytes = 29
    for job in "abc":
        stage.member(job)
    await settled()
    for task in stage.tasks.values():
        error = task.exception()
        assert isinstance(error, ColaError)
        assert (error.reason, error.details["bytes"]) == (Reason.JOB_TOO_LARGE, "30")


# --- sessions -------------------------------------------------------------------------------------------------------


async def test_a_session_begins_when_all_have_come_in() -> None:
    group = Stage().group
    a, b = group.enter("a"), group.enter("b")
    group.turn_away("b")
    c = group.enter("c")
    assert not any(entering.done() for entering in (a, b, c))
    b = group.enter("b")
    assert a.result() is b.result() is c.result()


async def test_a_session_begins_without_those_that_have_ended() -> None:
    group = Stage().group
    a, c = group.enter("a"), group.enter("c")
    group.end({"b": None})  # type: ignore[dict-item]
    assert a.result() is c.result()


async def gathered(*meetings: Awaitable[Any]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*meetings, return_exceptions=True), 5)


async def test_all_learn_what_all_have_put_round_after_round() -> None:
    session = Session("abc")

    async def rounds(job: str) -> list[Any]:
        return [dict(await session.meet(job, (job, number))) for number in range(3)]

    seen = await gathered(*(rounds(job) for job in "abc"))
    assert seen == [[{job: (job, number) for job in "abc"} for number in range(3)]] * 3


async def test_one_alone_waits_for_nobody() -> None:
    meeting = Session("a").meet("a", 1)
    with pytest.raises(StopIteration) as met:
        meeting.send(None)
    assert met.value.value == {"a": 1}


async def test_who_leaves_ends_it_for_those_who_wait_and_those_who_come() -> None:
    session = Session("abc")
    waiting = asyncio.create_task(session.meet("a", 1))
    await settled()
    session.part("c")
    session.part("b")
    for parted in await gathered(waiting, session.meet("a", 2), session.meet("b", 2)):
        assert isinstance(parted, Parted)
        assert parted.job == "c"


async def test_what_was_agreed_stays_so_for_all_though_one_leaves_at_once() -> None:
    session = Session("ab")
    first = asyncio.create_task(session.meet("a", 1))
    await settled()
    assert await session.meet("b", 2) == {"a": 1, "b": 2}
    session.part("b")
    assert await first == {"a": 1, "b": 2}


async def test_those_who_have_ended_are_not_waited_for() -> None:
    session = Session("abc")
    waiting = [asyncio.create_task(session.meet(job, job)) for job in "ac"]
    await settled()
    session.ended(["b"])
    assert await gathered(*waiting) == [{"a": "a", "c": "c"}] * 2


async def test_a_cancelled_wait_disturbs_nobody_else() -> None:
    session = Session("abc")
    cancelled = asyncio.create_task(session.meet("a", 1))
    other = asyncio.create_task(session.meet("b", 2))
    await settled()
    cancelled.cancel()
    await settled()
    session.part("a")
    (parted,) = await gathered(other)
    assert isinstance(parted, Parted)
