"""Fail points: the mapping, the calls and the list for contributors agree; each action does what it says."""

import ast
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_common import failpoints
from cola_common.errors import ColaError, Reason

ROOT = Path(__file__).parents[2]


def calls() -> Iterator[tuple[Path, ast.Call]]:
    """Every `failpoints.hit(…)` of the daemons."""
    for package in ("cola_server", "cola_worker"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoints.hit":
                    yield path, node


def test_every_point_is_hit_somewhere_and_every_hit_is_a_point() -> None:
    for path, call in calls():
        assert len(call.args) == 1 and isinstance(call.args[0], ast.Constant), f"{path}:{call.lineno} names no point"
    named = {path.parts[len(ROOT.parts)]: set[str]() for path, _ in calls()}
    for path, call in calls():
        named[path.parts[len(ROOT.parts)]].add(ast.literal_eval(call.args[0]))
    assert named["cola_worker"] == {name for name in failpoints.FAILPOINTS if name.startswith("worker.")}
    assert named["cola_server"] == failpoints.FAILPOINTS.keys() - named["cola_worker"]


def test_contributors_are_told_of_every_point() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Fail points")[2].partition("\n## ")[0]
    assert dict(re.findall(r"^- `(.+?)`: (.+)$", section, re.MULTILINE)) == dict(failpoints.FAILPOINTS)


def process(asked: str, *, hits: int = 1) -> "subprocess.Popen[str]":
    """A process that says "before", hits a point so many times, and says "after"."""
    program = (
        "import sys; from cola_common import failpoints; print('before', flush=True)\n"
        f"for _ in range({hits}): failpoints.hit('step.after_fold'); failpoints.hit('step.before_fold')\n"
        "print('after', flush=True)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, failpoints.VARIABLE: asked},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(asked: str, *, hits: int = 1) -> tuple[int, str, str]:
    started = process(asked, hits=hits)
    out, err = started.communicate(timeout=20)
    return started.returncode, out, err


@pytest.mark.parametrize("asked", ["", "step.after_commit:kill", "step.after_fold:kill@4", " "])
def test_what_is_not_asked_for_passes(asked: str) -> None:
    assert outcome(asked, hits=3) == (0, "before\nafter\n", "")


@pytest.mark.parametrize(
    "asked", ["step.after_fold:kill", "step.after_fold:kill@3", "step.before_fold:delay=0,step.after_fold:kill@2"]
)
def test_kill_is_sigkill_at_the_hit_that_was_asked_for(asked: str) -> None:
    status, out, err = outcome(asked, hits=3)
    assert (status, out) == (-signal.SIGKILL, "before\n")
    assert "fail point step.after_fold: kill\n" in err


def test_freeze_stops_the_process_until_it_is_continued() -> None:
    started = process("step.after_fold:freeze")
    try:
        deadline = time.monotonic() + 20
        while Path(f"/proc/{started.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.02)
        started.send_signal(signal.SIGCONT)
        assert started.communicate(timeout=20)[0] == "before\nafter\n"
    finally:
        started.kill()
        started.wait()


def test_hang_leaves_the_process_alive_and_never_returns() -> None:
    started = process("step.after_fold:hang")
    assert started.stderr is not None and started.stdout is not None
    assert started.stderr.readline() == "fail point step.after_fold: hang\n"
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(0.5)
    started.kill()
    assert started.communicate()[0] == "before\n"


@pytest.mark.parametrize(("asked", "times"), [("step.after_fold:delay=0.2", 3), ("step.after_fold:delay=0.2@2", 1)])
def test_a_delay_strikes_every_time_unless_it_is_told_when(asked: str, times: int) -> None:
    began = time.monotonic()
    status, out, err = outcome(asked, hits=3)
    assert (status, out) == (0, "before\nafter\n")
    assert err.count("delay") == times
    assert time.monotonic() - began > 0.2 * times


def test_full_raises_what_a_full_disk_does() -> None:
    armed = failpoints.parse("step.after_fold:full@2")["step.after_fold"]
    armed()
    with pytest.raises(OSError) as full:
        armed()
    assert full.value.errno == errno.ENOSPC
    armed()


@pytest.mark.parametrize(
    "asked",
    [
        "step.after_fold",
        "step.after:kill",
        "step.after_fold:explode",
        "step.after_fold:kill@0",
        "step.after_fold:kill@",
        "step.after_fold:kill@x",
        "step.after_fold:kill=3",
        "step.after_fold:delay",
        "step.after_fold:delay=nan",
        "step.after_fold:delay=-1",
        "step.after_fold:kill,step.after_fold:hang",
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(asked: str) -> None:
    with pytest.raises(ColaError) as refused:
        failpoints.parse(asked)
    assert refused.value.reason == Reason.INVALID_CONFIG
    assert failpoints.VARIABLE in refused.value.message


@pytest.mark.parametrize(
    "daemon", [["cola_server", "--model=m=nowhere", "--listen=127.0.0.1:0"], ["cola_worker", "--server=127.0.0.1:1"]]
)
def test_a_daemon_refuses_to_start_with_a_point_that_is_not_there(daemon: list[str], tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", *daemon, f"--data-dir={tmp_path}"],
        env={**os.environ, failpoints.VARIABLE: "fold.after_commit:kill"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert answer.returncode != 0
    assert "COLA_FAILPOINT: 'fold.after_commit:kill': no fail point" in answer.stderr
    assert "Traceback" not in answer.stderr
