"""A trainer that hangs is noticed by what heartbeats say; one that is slow and goes on never is."""

import itertools
from collections.abc import Iterable, Iterator

import pytest

from cola_common.messages import Heartbeat
from cola_server.fleet import FleetLimits
from cola_server.fleet.progress import LONGEST_SECONDS, PATIENCE, SHORTEST_SECONDS, Progress

EVERY = FleetLimits().heartbeat_seconds


def beats(messages: Iterable[float], every: float = EVERY) -> Iterator[tuple[float, Heartbeat]]:
    """(time, heartbeat) of a worker whose messages take so long each, one right after the other."""
    now, began, done = 0.0, 0.0, 0
    for seconds in messages:
        while now < began + seconds:
            yield now, Heartbeat(done, now - began)
            now += every
        began, done = began + seconds, done + 1


def verdict(progress: Progress, messages: Iterable[float], every: float = EVERY) -> float | None:
    """When a worker is found to hang, if it is."""
    return next((now for now, beat in beats(messages, every) if progress.beat(beat) is not None), None)


@pytest.mark.parametrize("every", [0.5, EVERY])
@pytest.mark.parametrize("before", [0, 1, 100])
def test_a_hang_is_noticed_within_twenty_seconds(before: int, every: float) -> None:
    """Where messages have taken no longer than a second so far."""
    usual = [0.9] * before
    noticed = verdict(Progress(1), [*usual, 1000], every)
    assert noticed is not None
    assert SHORTEST_SECONDS < noticed - sum(usual) <= 20


@pytest.mark.parametrize("seconds", [0.001, 1.9, 5, 9.9])
def test_a_slow_worker_that_goes_on_is_never_lost(seconds: float) -> None:
    assert verdict(Progress(1), [seconds] * int(2000 / seconds)) is None


def test_the_deadline_follows_what_messages_take() -> None:
    progress = Progress(1)
    assert verdict(progress, [25.0]) is not None
    progress = Progress(1)
    assert verdict(progress, [5.0] * 10) is None
    progress.begin()
    assert verdict(progress, [25.0] * 10) is None
    progress.begin()
    assert (verdict(progress, [1000.0]) or 0) > PATIENCE * 3


def test_no_message_is_waited_for_without_end() -> None:
    progress = Progress(1)
    for seconds in (9, 40, 59, 59):
        progress.begin()
        assert verdict(progress, [seconds, *[0.1] * 30]) is None
    progress.begin()
    assert LONGEST_SECONDS < (verdict(progress, itertools.repeat(1000.0)) or 0) <= LONGEST_SECONDS + EVERY


def test_who_comes_back_after_a_verdict_was_slow_and_gets_the_time() -> None:
    progress = Progress(1)
    assert verdict(progress, [30]) is not None
    progress.begin()
    assert verdict(progress, [30, 0.1] * 5) is None


def test_a_new_stream_begins_with_an_idle_trainer() -> None:
    progress = Progress(1)
    assert progress.beat(Heartbeat(5, 9.0)) is None
    progress.begin()
    for _ in range(100):
        assert progress.beat(Heartbeat(0, 0.0)) is None


def test_the_verdict_says_how_long() -> None:
    assert Progress(1).beat(Heartbeat(3, 11.6)) == "its trainer has been at one message for 12 s"
