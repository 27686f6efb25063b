"""The table of a job's statuses, as users may rely on it."""

import itertools

import pytest

from cola_common.errors import ColaError, Reason
from cola_common.jobs import TRANSITIONS, JobStatus, check_transition

LEGAL = {
    "validating_files": {"queued", "paused", "failed", "cancelled"},
    "queued": {"running", "paused", "succeeded", "failed", "cancelled"},
    "running": {"queued", "paused", "succeeded", "failed", "cancelled"},
    "paused": {"queued", "succeeded", "failed", "cancelled"},
    "succeeded": set(),
    "failed": set(),
    "cancelled": set(),
}


def test_statuses_are_those_that_users_know() -> None:
    assert {status.value for status in JobStatus} == set(LEGAL)
    assert set(TRANSITIONS) == set(JobStatus)


@pytest.mark.parametrize(("status", "wanted"), list(itertools.product(JobStatus, JobStatus)))
def test_only_the_tables_transitions_are_legal(status: JobStatus, wanted: JobStatus) -> None:
    if wanted.value in LEGAL[status.value]:
        check_transition("ftjob-1", status, wanted)
    else:
        with pytest.raises(ColaError) as caught:
            check_transition("ftjob-1", status, wanted)
        assert caught.value.reason is Reason.ILLEGAL_TRANSITION


@pytest.mark.parametrize("status", list(JobStatus))
def test_terminal_is_what_nothing_follows(status: JobStatus) -> None:
    assert status.terminal == (status.value in {"succeeded", "failed", "cancelled"})


@pytest.mark.parametrize("status", [status for status in JobStatus if not status.terminal])
def test_every_job_that_has_not_ended_can_be_cancelled(status: JobStatus) -> None:
    check_transition("ftjob-1", status, JobStatus.CANCELLED)


def reachable(start: JobStatus) -> set[JobStatus]:
    seen, front = {start}, [start]
    while front:
        for following in TRANSITIONS[front.pop()] - seen:
            seen.add(following)
            front.append(following)
    return seen


def test_every_status_is_reached_from_the_first() -> None:
    assert reachable(JobStatus.VALIDATING_FILES) == set(JobStatus)
