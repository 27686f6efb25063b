"""From the taps to the workers: one job's captures of one batch are checked, encoded, and packed into frames.

Runs while the backward pass goes on: what is packed leaves at once.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from cola_common.errors import ColaError, Reason
from cola_common.messages import Capture, EncodedTensor, Part
from cola_common.rpc.limits import CHUNK_BYTES
from cola_common.tensor import encode, is_finite
from cola_server.model import Site
from cola_server.reduce import keep

FRAME_BYTES = CHUNK_BYTES
"""Parts are packed until another would make the frame longer than one chunk of the stream. A message costs both ends
about as much as half a MiB of copies, and a small model's sites are a few KiB each."""

CAST_BEFORE_ROWS = {"bf16": torch.bfloat16}
"""Codecs that are a plain cast. It comes first, so that everything after it moves half of the bytes. (fp16 divides by a
power of two, which all of the kept rows have a say in.)"""


@dataclass
class _Frame:
    """What is on its way to one worker."""

    parts: list[Part] = field(default_factory=list)
    tensors: list[EncodedTensor] = field(default_factory=list)
    nbytes: int = 0


@dataclass
class _Waiting:
    """A part whose values are on their way from the device; `copied` is None where there is nothing to wait for."""

    worker: str
    part: Part
    site: Site
    values: torch.Tensor
    copied: torch.cuda.Event | None


class CapturePacker:
    """A sink for `cola_server.model.train`.

    x goes once to each worker that owns shards of its group. Frames go to `emit(worker, frame)`, on the thread on which
    captures come; an x never leaves after the first g that needs it.
    `sent` is the encoded bytes so far by worker, `seconds` the time spent here.
    Values that are not finite are not sent, nor is anything after them; the pass goes on for the other jobs in it, and
    `finish` tells: `ColaError(NON_FINITE_CAPTURE)` with the job in its details.
    """

    def __init__(
        self,
        *,
        job: str,
        epoch: int,
        batch: int,
        step: int,
        values: str,
        owners: Mapping[int, str],
        emit: Callable[[str, Capture], None],
    ) -> None:
        """`values` is the codec, `owners` the worker of each shard."""
        self._job = job
        self._epoch = epoch
        self._batch = batch
        self._step = step
        self._values = values
        self._owners = owners
        self._emit = emit
        self._frames = {worker: _Frame() for worker in sorted(set(owners.values()))}
        self._inputs: set[tuple[str, int, int]] = set()
        self._waiting: deque[_Waiting] = deque()
        self._error: ColaError | None = None
        self.sent = dict.fromkeys(self._frames, 0)
        self.seconds = 0.0

    def capture(self, site: Site, call: int, x: torch.Tensor, g: torch.Tensor, rows: torch.Tensor | None) -> None:
        """See `cola_server.model.Sink`."""
        if self._error is not None:
            return
        started = time.perf_counter()
        worker = self._owners[site.index]
        shared = (worker, site.group, call)
        if shared not in self._inputs:
            self._inputs.add(shared)
            self._take(worker, Part("x", site.group, call), site, x, rows)
        self._take(worker, Part("g", site.index, call), site, g, rows)
        try:
            while self._waiting and _has_come(self._waiting[0]):
                self._pack(self._waiting.popleft())
        except ColaError as error:
            self._error = error
        self.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Sends what is left. Raises: `ColaError(NON_FINITE_CAPTURE)`."""
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        while self._waiting:
            waiting = self._waiting.popleft()
            if waiting.copied is not None:
                waiting.copied.synchronize()
            self._pack(waiting)
        for worker in self._frames:
            self._flush(worker)
        self.seconds += time.perf_counter() - started

    def _take(self, worker: str, part: Part, site: Site, values: torch.Tensor, rows: torch.Tensor | None) -> None:
        narrow = CAST_BEFORE_ROWS.get(self._values)
        kept = keep(values.detach() if narrow is None else values.detach().to(narrow), rows)
        copied = None
        if kept.is_cuda:
            # Pinned memory takes the copy while the backward pass goes on; the event tells when it is there.
            host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
            host.copy_(kept, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(kept.device))
            kept = host
        self._waiting.append(_Waiting(worker, part, site, kept, copied))

    def _pack(self, waiting: _Waiting) -> None:
        part = waiting.part
        if not is_finite(waiting.values):
            raise ColaError(
                Reason.NON_FINITE_CAPTURE, tensor=part.kind, site=waiting.site.name, step=self._step, job=self._job
            )
        encoded = encode(waiting.values, self._values)
        if self._frames[waiting.worker].nbytes + encoded.nbytes > FRAME_BYTES:
            self._flush(waiting.worker)
        frame = self._frames[waiting.worker]
        frame.parts.append(part)
        frame.tensors.append(encoded)
        frame.nbytes += encoded.nbytes

    def _flush(self, worker: str) -> None:
        frame = self._frames[worker]
        if not frame.parts:
            return
        self._frames[worker] = _Frame()
        self.sent[worker] += frame.nbytes
        self._emit(
            worker,
            Capture(
                job=self._job,
                epoch=self._epoch,
                batch=self._batch,
                parts=tuple(frame.parts),
                tensors=tuple(frame.tensors),
            ),
        )


def _has_come(waiting: _Waiting) -> bool:
    return waiting.copied is None or bool(waiting.copied.query())  # type: ignore[no-untyped-call]
