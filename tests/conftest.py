"""Tests that assert a time have the machine to themselves: marked `alone`, they wait for the tests of the other
processes of this run, and those for them. Nobody's time limit runs meanwhile.
"""

import fcntl
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout's own
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with _turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(*, alone: bool) -> Iterator[None]:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        yield  # one process
        return
    path = Path(tempfile.gettempdir(), f"cola-tests-{run}")
    with path.open("a") as running, path.with_suffix(".next").open("a") as following:
        # Who wants to be alone keeps the others from starting while it waits for those that run.
        fcntl.flock(following, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(following, fcntl.LOCK_UN)
        yield


def pytest_sessionfinish() -> None:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    for suffix in ("", ".next"):
        Path(tempfile.gettempdir(), f"cola-tests-{run}{suffix}").unlink(missing_ok=True)
