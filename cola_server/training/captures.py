"""From the taps to the workers: one job's captures of one batch are reduced, checked, encoded, and packed into frames.

Runs while the backward pass goes on: what is packed leaves at once.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cola_common.errors import ColaError, Reason
from cola_common.jobs import WirePlan
from cola_common.messages import Calls, Capture, EncodedTensor, Part
from cola_common.rpc.limits import CHUNK_BYTES
from cola_common.tensor import encode, encode_parameter, is_finite
from cola_server.model import Captured, Site
from cola_server.reduce import keep, sketch
from cola_server.training.traffic import rows_of

FRAME_BYTES = CHUNK_BYTES
"""Parts are packed until another would make the frame longer than one chunk of the stream. A message costs both ends
about as much as half a MiB of copies, and a small model's sites are a few KiB each."""

REDUCED_FRAME_BYTES = 1 << 18
"""Of frames of gradients: a batch's may not fill a chunk, and are to leave while the backward pass goes on."""

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
    captures come; an x never leaves after the first g that needs it. What a sketch is to be made of waits until all
    sites of its group are there.
    `sent` is the encoded bytes so far by worker, `sent_rows` the rows in them; `reduce_seconds` and `encode_seconds`
    are the time spent here.
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
        seed: int,
        sites: Sequence[Site],
        wires: Mapping[str, WirePlan],
        owners: Mapping[int, str],
        emit: Callable[[str, Capture], None],
    ) -> None:
        """`wires` is what each worker gets, `owners` the worker of each shard; sketches follow from `seed`."""
        self._job = job
        self._epoch = epoch
        self._batch = batch
        self._step = step
        self._seed = seed
        self._members = Counter(site.group for site in sites)
        self._wires = wires
        self._owners = owners
        self._emit = emit
        self._frames = {worker: _Frame() for worker in sorted(set(owners.values()))}
        self._inputs: set[tuple[str, int, int]] = set()
        self._waiting: deque[_Waiting] = deque()
        self._gathered: dict[tuple[int, int], list[Captured]] = {}
        """By group and call: what waits for the rest of its group."""
        self._rows: Counter[int] = Counter()
        """Of x and g that were sent, by shard."""
        self._error: ColaError | None = None
        self.sent = dict.fromkeys(self._frames, 0)
        self.sent_rows = 0
        self.reduce_seconds = 0.0
        self.encode_seconds = 0.0

    def capture(self, captured: Captured) -> None:
        """See `cola_server.model.Sink`."""
        if self._error is not None:
            return
        match rows_of(captured.site, self._wires[self._owners[captured.site.index]].rows):
            case "all":
                self._send_rows(captured)
            case "exact":
                self._send_gradient(captured)
            case "sketch":
                key = captured.site.group, captured.call
                gathered = self._gathered.setdefault(key, [])
                gathered.append(captured)
                if len(gathered) == self._members[captured.site.group]:
                    self._send_sketch(self._gathered.pop(key))
        started = time.perf_counter()
        try:
            while self._waiting and _has_come(self._waiting[0]):
                self._pack(self._waiting.popleft())
        except ColaError as error:
            self._error = error
        self.encode_seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Sends what is left. Raises: `ColaError(NON_FINITE_CAPTURE)`."""
        if self._error is not None:
            raise self._error
        for gathered in self._gathered.values():  # of groups of which not all sites were called
            self._send_sketch(gathered)
        self._gathered.clear()
        started = time.perf_counter()
        while self._waiting:
            waiting = self._waiting.popleft()
            if waiting.copied is not None:
                waiting.copied.synchronize()
            self._pack(waiting)
        for worker in self._frames:
            self._flush(worker)
        self.encode_seconds += time.perf_counter() - started

    def sent_calls(self, calls: Sequence[Calls]) -> tuple[Calls, ...]:
        """The calls of the batch, with the rows that were sent of them."""
        return tuple(Calls(call.index, call.calls, self._rows[call.index]) for call in calls)

    def _send_rows(self, captured: Captured) -> None:
        """x, unless it is on its way for another site of the group, and g."""
        started = time.perf_counter()
        site, worker = captured.site, self._owners[captured.site.index]
        shared = (worker, site.group, captured.call)
        if shared not in self._inputs:
            self._inputs.add(shared)
            x_ND = self._kept(worker, captured.x, captured.rows)
            self._take(worker, Part("x", site.group, captured.call), site, x_ND)
        g_NO = self._kept(worker, captured.g, captured.rows)
        self._take(worker, Part("g", site.index, captured.call), site, g_NO)
        self._rows[site.index] += len(g_NO)
        self.sent_rows += len(g_NO)
        self.encode_seconds += time.perf_counter() - started

    def _kept(self, worker: str, values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        narrow = CAST_BEFORE_ROWS.get(self._wires[worker].values)
        return keep(values.detach() if narrow is None else values.detach().to(narrow), rows)

    def _send_gradient(self, captured: Captured) -> None:
        """What the worker would make of the rows."""
        gradient, seconds = captured.gradient()
        self.reduce_seconds += seconds
        site, worker = captured.site, self._owners[captured.site.index]
        for name, values in gradient.items():
            self._take(worker, Part("w", site.index, captured.call, name), site, values)
        self.sent_rows += min(min(values.shape) for values in gradient.values())

    def _send_sketch(self, gathered: Sequence[Captured]) -> None:
        """Pseudo-rows in the place of a group's rows at one call; all rows where those would be too far off."""
        started = time.perf_counter()
        first = gathered[0]
        worker = self._owners[first.site.index]
        wire = self._wires[worker]
        x_ND = keep(first.x.detach(), first.rows)
        gs = [keep(each.g.detach(), each.rows) for each in gathered]
        x_kD, gs_kO = sketch.pseudo_rows(
            x_ND,
            gs,
            k=wire.sketch_rows,
            seed=self._sketch_seed(first.site.group, first.call),
            max_error=wire.max_error or None,
        )
        self._take(worker, Part("x", first.site.group, first.call), first.site, x_kD)
        for each, g_kO in zip(gathered, gs_kO, strict=True):
            self._take(worker, Part("g", each.site.index, each.call), each.site, g_kO)
            self._rows[each.site.index] += len(g_kO)
            self.sent_rows += len(g_kO)
        self.reduce_seconds += time.perf_counter() - started

    def _sketch_seed(self, group: int, call: int) -> int:
        """0 ≤ seed < 2⁶³: the same for a batch that is computed again."""
        text = f"sketch, seed {self._seed}, batch {self._batch}, group {group}, call {call}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def _take(self, worker: str, part: Part, site: Site, kept: torch.Tensor) -> None:
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
            tensor = "the gradient" if part.kind == "w" else part.kind
            raise ColaError(
                Reason.NON_FINITE_CAPTURE, tensor=tensor, site=waiting.site.name, step=self._step, job=self._job
            )
        codec = self._wires[waiting.worker].values
        encoded = (encode_parameter if part.kind == "w" else encode)(waiting.values, codec)
        limit = REDUCED_FRAME_BYTES if part.kind == "w" else FRAME_BYTES
        if self._frames[waiting.worker].nbytes + encoded.nbytes > limit:
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
