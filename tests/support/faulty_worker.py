"""`python -m tests.support.faulty_worker --data-dir=DIR …`: `cola-worker` with a trainer that can be made to misbehave.

The file `DIR/faults` holds what it does wrong, in words; it is read anew for each message, so that a test can change
its mind:

    twice     each delta is sent twice
    late      the delta before is sent again before and after each delta: one of the step before, or of an older epoch
    deaf      the first Ack of a step is not heard, and the delta is sent again
    slow=S    each batch takes S seconds more, from the first of a step on
    far=S     each delta is S seconds more on its way, in which nobody else is kept waiting
    hang      the message never ends
    honest    a step is said to take as long as it does

All of them say that they are equally fast, and that a step takes them `slow` alone, unless honest: where a job goes is
not to depend on what else the machine does.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import cola_worker.capacity
import cola_worker.session
from cola_common.messages import Ack, Delta, StepEnd, ToServer
from cola_worker.cli import main
from cola_worker.thread import TrainerThread
from cola_worker.trainer import ToTrainer, Trainer

FILE = "faults"


class FaultyTrainer(Trainer):
    """See the module. What was sent outlives a session, as it would in a network."""

    file: Path
    slow: ClassVar[dict[str, float]] = {}
    """Of the step that a job has begun: one that is slow in part would tell the server to expect a slow one."""
    said: ClassVar[dict[str, float]] = {}
    """Seconds of a job's last step."""
    before: Delta | None = None
    last: Delta | None = None

    def handle(self, message: ToTrainer) -> list[ToServer]:
        faults = _faults()
        if "hang" in faults:
            time.sleep(1e6)
        if isinstance(message, StepEnd):
            slow = self.slow.setdefault(message.job, _seconds(faults, "slow"))
            time.sleep(slow)
            if message.batches:
                self.said[message.job] = slow * message.batches
                del self.slow[message.job]
        last = FaultyTrainer.last
        if "deaf" in faults and isinstance(message, Ack) and last is not None and not _ignored(message, last):
            return [last]
        answers = super().handle(message)
        if "honest" not in faults:
            answers = [_claiming(a, self.said) for a in answers]
        return [sent for answer in answers for sent in _sent(answer, faults)]


class FarThread(TrainerThread):
    """Its answers have a long way to go."""

    def __init__(self, trainer: Trainer, deliver: Callable[[ToServer], None], *, backlog_bytes: int) -> None:
        def travel(answer: ToServer) -> None:
            far = _seconds(_faults(), "far") if isinstance(answer, Delta) else 0.0
            if far:
                asyncio.get_running_loop().call_later(far, deliver, answer)
            else:
                deliver(answer)

        super().__init__(trainer, travel, backlog_bytes=backlog_bytes)


def _faults() -> list[str]:
    return FaultyTrainer.file.read_text().split() if FaultyTrainer.file.exists() else []


def _seconds(faults: list[str], name: str) -> float:
    return sum(float(word.removeprefix(f"{name}=")) for word in faults if word.startswith(f"{name}="))


_deaf_to: set[tuple[str, int, int]] = set()


def _ignored(ack: Ack, last: Delta) -> bool:
    """Whether this Ack is not the first of the step that `last` ended."""
    step = (ack.job, ack.epoch, ack.step)
    known = step in _deaf_to or step != (last.job, last.epoch, last.step)
    _deaf_to.add(step)
    return known


def _claiming(answer: ToServer, said: dict[str, float]) -> ToServer:
    if not isinstance(answer, Delta):
        return answer
    return replace(answer, worker_seconds=said[answer.job], decode_seconds=0.0)


def _sent(answer: ToServer, faults: list[str]) -> list[ToServer]:
    if not isinstance(answer, Delta):
        return [answer]
    before, FaultyTrainer.before = FaultyTrainer.before, answer
    FaultyTrainer.last = answer
    sent: list[ToServer] = [answer, answer] if "twice" in faults else [answer]
    return [before, *sent, before] if "late" in faults and before is not None else sent


if __name__ == "__main__":
    (folder,) = (word.partition("=")[2] for word in sys.argv if word.startswith("--data-dir="))
    FaultyTrainer.file = Path(folder) / FILE
    cola_worker.session.Trainer = FaultyTrainer  # type: ignore[misc]
    cola_worker.session.TrainerThread = FarThread  # type: ignore[misc]
    cola_worker.capacity._gflops = lambda: 1.0
    main()
