"""When a snapshot is due: the first of three bounds, each of which can be the one that counts."""

import pytest

from cola_server.training.cadence import Cadence, SnapshotLimits

NEVER = 1e18


def due_after(cadence: Cadence, *, seconds: float = 1.0, nbytes: int = 100, at_most: int = 1000) -> int:
    """Steps until a snapshot is due."""
    for step in range(at_most):
        if cadence.due:
            return step
        cadence.stepped(seconds, nbytes)
    raise AssertionError("none is due")


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        (SnapshotLimits(steps=7, seconds=NEVER, ratio=0.0), 7),
        (SnapshotLimits(steps=1000, seconds=30.0, ratio=0.0), 15),
        (SnapshotLimits(steps=1000, seconds=NEVER, ratio=0.1), 50),
        (SnapshotLimits(steps=7, seconds=30.0, ratio=0.1), 7),
        (SnapshotLimits(steps=60, seconds=30.0, ratio=0.1), 15),
        (SnapshotLimits(steps=60, seconds=300.0, ratio=0.1), 50),
    ],
    ids=["steps", "seconds", "bytes", "steps first", "seconds first", "bytes first"],
)
def test_the_first_of_the_three_bounds_makes_a_snapshot_due(limits: SnapshotLimits, steps: int) -> None:
    cadence = Cadence(limits, state_bytes=500)  # a tenth of 5,000 bytes, which are 50 steps
    assert due_after(cadence, seconds=2.0) == steps
    cadence.taken()
    assert due_after(cadence, seconds=2.0) == steps


def test_none_is_due_where_no_step_was_taken() -> None:
    cadence = Cadence(SnapshotLimits(steps=1, seconds=0.0, ratio=1.0), state_bytes=0)
    assert not cadence.due
    cadence.stepped(0.0, 0)
    assert cadence.due
    cadence.taken()
    assert not cadence.due


def test_zero_steps_turn_snapshots_off() -> None:
    cadence = Cadence(SnapshotLimits(steps=0, seconds=1.0, ratio=1.0), state_bytes=1)
    for _ in range(1000):
        cadence.stepped(100.0, 1 << 30)
        assert not cadence.due


def test_a_snapshot_over_its_share_of_the_bytes_is_told_once() -> None:
    cadence = Cadence(SnapshotLimits(steps=10, seconds=60.0, ratio=0.1), state_bytes=500)
    due_after(cadence)
    told = cadence.excess()
    assert told is not None
    assert "50%" in told and "10%" in told and "10 steps" in told and "60 s" in told
    assert cadence.excess() is None
    cadence.taken()
    due_after(cadence)
    assert cadence.excess() is None


def test_a_snapshot_within_its_share_of_the_bytes_is_not_told() -> None:
    cadence = Cadence(SnapshotLimits(steps=1000, seconds=NEVER, ratio=0.1), state_bytes=500)
    due_after(cadence)
    assert cadence.excess() is None
    cadence.taken()
    cadence.stepped(1.0, 100)
    assert cadence.excess() is not None
