"""How long a job waits follows its own steps, and is never short."""

from cola_server.training.patience import REMEMBERED, SHORTEST_SECONDS, TIMES, Patience


def test_a_first_step_may_take_as_long_as_it_likes() -> None:
    assert Patience().limit() is None


def test_quick_steps_do_not_make_a_job_hasty() -> None:
    patience = Patience()
    for _ in range(100):
        patience.waited(0.001)
    assert patience.limit() == SHORTEST_SECONDS


def test_slow_steps_are_waited_for_longer_and_the_slowest_counts() -> None:
    patience = Patience()
    for seconds in (3.0, 30.0, 3.0):
        patience.waited(seconds)
    assert patience.limit() == TIMES * 30.0


def test_what_was_slow_long_ago_is_forgotten() -> None:
    patience = Patience()
    patience.waited(30.0)
    for _ in range(REMEMBERED - 1):
        patience.waited(5.0)
    assert patience.limit() == TIMES * 30.0
    patience.waited(5.0)
    assert patience.limit() == TIMES * 5.0
