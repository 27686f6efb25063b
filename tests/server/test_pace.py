"""What is observed of workers: averages that an outlier does not move, and the rate of the way to them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_server.fleet.pace import ENOUGH, FASTEST, FORGET_SECONDS, LEAST_BYTES, MESSAGE_SECONDS, Average, Way

FRAME = 1 << 20


def averaged(values: list[float], apart: float = 1.0) -> float | None:
    average = Average()
    for number, value in enumerate(values):
        average.add(value, number * apart)
    return average.value(len(values) * apart)


def test_a_few_observations_are_not_enough() -> None:
    assert averaged([5.0] * (ENOUGH - 1)) is None
    assert averaged([5.0] * ENOUGH) == pytest.approx(5.0)


@given(st.integers(0, 19), st.floats(1e-9, 1e9))
def test_one_outlier_changes_nothing(at: int, outlier: float) -> None:
    values = [5.0] * 20
    values[at] = outlier
    assert averaged(values) == pytest.approx(5.0)


@given(st.floats(1e-3, 1e3))
def test_a_lasting_change_is_followed(now: float) -> None:
    assert averaged([5.0] * 20 + [now] * 20) == pytest.approx(now, rel=0.02)


@pytest.mark.parametrize("nothing", [0.0, -1.0, math.nan, math.inf])
def test_what_no_speed_can_be_is_no_observation(nothing: float) -> None:
    assert averaged([5.0, nothing, 5.0, nothing, 5.0]) == pytest.approx(5.0)


def test_what_was_observed_is_forgotten_and_learnt_anew() -> None:
    average = Average()
    for second in range(ENOUGH):
        average.add(1.0, second)
    assert average.value(ENOUGH - 1 + FORGET_SECONDS) == pytest.approx(1.0)
    later = ENOUGH + FORGET_SECONDS
    assert average.value(later) is None
    average.add(9.0, later)
    assert average.value(later) is None
    average.add(9.0, later)
    average.add(9.0, later)
    assert average.value(later) == pytest.approx(9.0)


def observed(frames: list[tuple[float, float, float]]) -> float | None:
    """The rate after frames of `FRAME` bytes, each (sent, arrived, seconds at the worker); credits travel in no time.
    The worker takes its captures one after the other.
    """
    way = Way()
    leaving = [(sent, 0, 0.0) for sent, *_ in frames]
    done = [(arrived + there, 1, there) for _, arrived, there in frames]
    for at, kind, there in sorted(leaving + done):
        if kind == 0:
            way.sent(FRAME, at)
        else:
            way.credited(FRAME, there, at)
    return way.rate()


@given(st.floats(0.01, 1.0), st.lists(st.floats(0.0, 0.5), min_size=5, max_size=20), st.floats(0.0, 0.005))
def test_the_rate_of_a_way_that_is_full_is_told_whatever_the_worker_does_meanwhile(
    seconds: float, there: list[float], pace: float
) -> None:
    """Frames leave every `pace` seconds, faster than the way carries one; the worker has each for some time."""
    frames, done = [], 0.0
    for number, busy in enumerate(there):
        arrived = (number + 1) * seconds
        done = max(done, arrived) + busy
        frames.append((number * pace, arrived, done - arrived))
    assert observed(frames) == pytest.approx(FRAME / seconds, rel=0.25)


def test_a_way_that_is_as_fast_as_its_messages_is_as_fast_as_any() -> None:
    assert observed([(second, second + MESSAGE_SECONDS, 0.3) for second in range(9)]) == FASTEST


def test_what_travels_alone_is_slow_by_what_it_takes_beyond_a_message() -> None:
    taken = 0.1 + MESSAGE_SECONDS
    assert observed([(second, second + taken, 0.3) for second in range(9)]) == pytest.approx(FRAME / 0.1)


def test_too_little_to_tell_waits_for_more() -> None:
    way = Way()
    way.sent(LEAST_BYTES - 1, 0.0)
    way.credited(LEAST_BYTES - 1, 0.0, 1.0)
    assert way.rate() is None
    way.sent(1, 1.0)
    way.credited(1, 0.0, 1.0)
    assert way.rate() == pytest.approx(LEAST_BYTES, rel=0.01)
    assert way.rate() is None


@pytest.mark.parametrize("there", [1e9, -1e9, math.nan, math.inf, -math.inf])
def test_a_worker_that_tells_nonsense_makes_no_nonsense_of_the_rate(there: float) -> None:
    way = Way()
    for second in range(9):
        way.sent(FRAME, second)
        way.credited(FRAME, there, second + 0.5)
    rate = way.rate()
    assert rate is not None and FRAME <= rate <= FASTEST


def test_credit_for_nothing_and_of_another_size_does_not_count() -> None:
    way = Way()
    way.credited(1 << 40, 0.0, 0.0)
    way.sent(FRAME, 0.0)
    way.credited(1 << 40, 0.0, 1.0)
    assert way.rate() is None
