"""Named points at which a process can be made to fail, so that a test can repeat what otherwise chance brings about.

    COLA_FAILPOINT=name:action[@n][,name:action[@n]…]

`kill` and `freeze` are SIGKILL and SIGSTOP to this process, `hang` never returns, `delay=SECONDS` sleeps, `full` is a
disk without room: `OSError(ENOSPC)`. Each strikes at the n-th hit and at no other; without `@n` a delay strikes at
every hit and all others at the first. What struck is told on stderr. Not set, a point costs a look into an empty
mapping.
"""

import errno
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

from cola_common.errors import ColaError, Reason

VARIABLE = "COLA_FAILPOINT"

FAILPOINTS: Mapping[str, str] = {
    # the server's
    "epoch.before_commit": "a job's new epoch is about to be committed",
    "epoch.after_commit": "a job's new epoch is in the database, and nothing is assigned under it yet",
    "assign.sent": "a job's shards are queued for its workers",
    "batch.sent": "a batch's captures and its StepEnd are queued",
    "step.before_fold": "all deltas of a step are here, and none is folded",
    "step.after_fold": "a step is folded in memory, and no worker knows",
    "step.acknowledged": "the acknowledgements of a step are queued, and its metrics are not in the database",
    "step.after_commit": "a step's metrics are in the database",
    "snapshot.requested": "a snapshot's requests are queued",
    "snapshot.before_write": "a snapshot is complete in memory, and nothing of it is on the disk",
    "snapshot.before_rename": "a snapshot is on the disk under its temporary name",
    "snapshot.after_rename": "a snapshot has its name, and older generations are still there",
    "checkpoint.before_record": "a checkpoint's files are in their place, and the database does not know them",
    "checkpoint.after_record": "a checkpoint is in the database",
    "finish.before_commit": "a job has done all its steps, and its end is not in the database",
    "finish.after_commit": "a job's end is in the database, and its workers do not know",
    # the worker's
    "worker.assigned": "a worker has taken over shards",
    "worker.captured": "a worker has added a capture to its gradients",
    "worker.before_step": "a worker knows a step's gradient and norm, and has not stepped",
    "worker.after_step": "a worker has stepped, and its delta is not sent",
    "worker.before_keep": "a worker is about to write a shard's state to its disk",
    "worker.after_keep": "a shard's state is on the worker's disk",
}
"""Every point there is -> where it lies."""


def hit(name: str) -> None:
    """Passes, unless this point was asked to fail. Raises: `OSError` where it was asked for a full disk."""
    if name in _armed:
        _armed[name]()


def parse(text: str) -> dict[str, Callable[[], None]]:
    """What `COLA_FAILPOINT` asks for: point -> what to call at each hit. Raises: `ColaError(INVALID_CONFIG)`."""
    armed: dict[str, Callable[[], None]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, asked = part.partition(":")
        action, at, number = asked.partition("@")
        kind, equals, seconds = action.partition("=")
        if name not in FAILPOINTS:
            raise _wrong(part, f"no fail point {name!r}; there is {', '.join(FAILPOINTS)}")
        if name in armed:
            raise _wrong(part, f"{name} is there twice")
        if at and not (number.isdecimal() and int(number) > 0):
            raise _wrong(part, f"@{number} is no number from 1 on")
        if kind == "delay":
            armed[name] = _point(name, action, _delay(part, seconds), int(number) if at else None)
        elif kind in _ACTIONS and not equals:
            armed[name] = _point(name, action, _ACTIONS[kind], int(number) if at else 1)
        else:
            raise _wrong(part, f"no action {action!r}; there is {', '.join(_ACTIONS)}, delay=SECONDS")
    return armed


def _point(name: str, action: str, act: Callable[[], None], only: int | None) -> Callable[[], None]:
    hits = itertools.count(1)  # its `next` is atomic: points lie on several threads

    def strike() -> None:
        if only in (None, next(hits)):
            sys.stderr.write(f"fail point {name}: {action}\n")
            sys.stderr.flush()
            act()

    return strike


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang() -> None:
    while True:
        time.sleep(3600)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _delay(part: str, text: str) -> Callable[[], None]:
    try:
        seconds = float(text)
        if not 0 <= seconds < 3600:
            raise ValueError
    except ValueError:
        raise _wrong(part, f"{text!r} is no number of seconds below 3600") from None
    return lambda: time.sleep(seconds)


def _wrong(part: str, problem: str) -> ColaError:
    return ColaError(Reason.INVALID_CONFIG, setting=VARIABLE, problem=f"{part!r}: {problem}")


_ACTIONS: Mapping[str, Callable[[], None]] = {"kill": _kill, "freeze": _freeze, "hang": _hang, "full": _full}

_armed: Mapping[str, Callable[[], None]] = parse(os.environ.get(VARIABLE, ""))
