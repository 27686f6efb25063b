"""What an assignment says that the worker will be sent: the bound of every buffer, known before memory is taken."""

from cola_common import ids
from cola_common.adapters import build
from cola_common.errors import ColaError, Reason
from cola_common.messages import Assign, Capture, EncodedTensor, Part, ToWorker
from cola_common.tensor import CODECS, encoded_shape, nbytes

REDUCTIONS = ("all", "exact", "sketch")
"""What this worker takes of a capture's rows, as in `ShardPlan.rows`."""

MAX_CALLS = 4096  # of one site in one batch; deeper recurrence than any model has, and a bound on what x are kept


class Expected:
    """The captures of one assignment, from its `Assign`.

    Raises: `ColaError` (UNSUPPORTED_CODEC, PROTOCOL_VIOLATION) when the assignment contradicts itself.
    """

    def __init__(self, assign: Assign) -> None:
        if not ids.valid("ftjob", assign.job):
            raise violation(f"{assign.job!r} is no job id")
        for codec in (assign.values, assign.deltas):
            if codec not in CODECS:
                raise ColaError(Reason.UNSUPPORTED_CODEC, codec=codec, known=", ".join(CODECS))
        self.epoch = assign.epoch
        self._codec = assign.values
        self._max_rows = assign.max_rows
        self._widths: dict[tuple[str, int], int] = {}
        """Of x by group and g by shard."""
        self._gradients: dict[tuple[int, str], tuple[int, ...]] = {}
        """Shapes as they are written, by shard and parameter."""
        for shard in assign.shards:
            if shard.rows not in REDUCTIONS:
                raise violation(f"shard {shard.index} is to be sent {shard.rows!r} rows")
            if shard.rows == "exact":
                for name, shape in build(shard.family, shard.d_in, shard.d_out).shapes().items():
                    self._gradients[shard.index, name] = encoded_shape(shape, self._codec)
                continue
            self._widths["g", shard.index] = shard.d_out
            if self._widths.setdefault(("x", shard.group), shard.d_in) != shard.d_in:
                raise violation(f"group {shard.group} has inputs of two widths")
        largest = [(self._max_rows, width) for width in self._widths.values()]
        self.largest_bytes = max((nbytes(self._codec, s) for s in [*largest, *self._gradients.values()]), default=0)
        """Of one tensor of a capture."""
        self.state_bytes = sum(t.nbytes for t in assign.tensors)
        self._check_parameters(assign)

    def check(self, capture: Capture) -> None:
        """Raises `ColaError(PROTOCOL_VIOLATION)` unless every tensor is one that the assignment allows."""
        if len(capture.parts) != len(capture.tensors) or len(set(capture.parts)) != len(capture.parts):
            raise violation("a capture's parts do not match its tensors")
        for part, tensor in zip(capture.parts, capture.tensors, strict=True):
            if not 0 <= part.call < MAX_CALLS:
                raise violation(f"{_named(part)} is not assigned here")
            if part.kind == "w":
                self._check_gradient(part, tensor)
            else:
                self._check_rows(part, tensor)
            _check_size(_named(part), tensor)

    def _check_gradient(self, part: Part, tensor: EncodedTensor) -> None:
        shape = self._gradients.get((part.index, part.name))
        if shape is None:
            raise violation(f"{_named(part)} is not assigned here")
        if tensor.codec != self._codec or tensor.shape != shape:
            raise violation(f"{_named(part)} is {tensor.codec} {tensor.shape}, not {self._codec} {shape}")

    def _check_rows(self, part: Part, tensor: EncodedTensor) -> None:
        width = self._widths.get((part.kind, part.index))
        if width is None:
            raise violation(f"{_named(part)} is not assigned here")
        rows = tensor.shape[0] if tensor.shape else 0
        if tensor.codec != self._codec or tensor.shape != (rows, width) or not 0 <= rows <= self._max_rows:
            problem = f"{_named(part)} is {tensor.codec} {tensor.shape}"
            raise violation(f"{problem}, not {self._codec} (up to {self._max_rows}, {width})")

    @staticmethod
    def _check_parameters(assign: Assign) -> None:
        shapes = {s.index: build(s.family, s.d_in, s.d_out).shapes() for s in assign.shards}
        expected = [(index, name, shape) for index, of_shard in shapes.items() for name, shape in of_shard.items()]
        sent = [(*name, tensor.shape) for name, tensor in zip(assign.names, assign.tensors, strict=False)]
        count = len(expected)
        if len(shapes) != len(assign.shards) or len(assign.names) != len(assign.tensors) or sent[:count] != expected:
            raise violation("an assignment's tensors are not its shards' parameters")
        if len(set(assign.names)) != len(sent):
            raise violation("an assignment's tensors have one name twice")
        for index, entry, shape in sent[count:]:
            parameter, _, of_optimizer = entry.rpartition(".")
            whole = shapes.get(index, {}).get(parameter)
            if not of_optimizer or whole is None or shape not in ((), whole):
                raise violation(f"{entry} of shard {index} is no optimizer state")
        for (index, name), tensor in zip(assign.names, assign.tensors, strict=True):
            if tensor.codec != "fp32":
                raise violation(f"{name} of shard {index} is {tensor.codec}, not fp32")
            _check_size(f"{name} of shard {index}", tensor)


class Admission:
    """Judges each message of one stream by its header, before the message's bytes are given room.

    It belongs to whoever reads the stream: an `Assign` bounds the captures behind it as soon as it is read, however
    long the trainer takes to get to it.
    """

    def __init__(self, *, memory_bytes: int, window_bytes: int) -> None:
        self._memory = memory_bytes
        self._window = window_bytes
        self._jobs: dict[str, Expected] = {}

    def admit(self, message: ToWorker) -> None:
        """Raises: `ColaError` (STALE_EPOCH, PROTOCOL_VIOLATION, UNSUPPORTED_CODEC) for what must not be read."""
        if isinstance(message, Assign):
            expected = Expected(message)
            if expected.state_bytes > self._memory:
                raise violation(f"{expected.state_bytes} bytes of state for {self._memory} bytes of memory")
            self._jobs[message.job] = expected
        elif isinstance(message, Capture):
            current = self._jobs.get(message.job)
            if current is None or current.epoch != message.epoch:
                at = "none" if current is None else current.epoch
                raise ColaError(Reason.STALE_EPOCH, epoch=message.epoch, job=message.job, current=at)
            current.check(message)
            # A server sends what the window allows, and a single tensor where that alone is larger.
            limit = self._window + current.largest_bytes
            if sum(t.nbytes for t in message.tensors) > limit:
                raise violation(f"a capture of more than {limit} bytes")

    def forget(self, job: str, epoch: int) -> None:
        """The job is revoked up to `epoch`: nothing of that is expected any more."""
        current = self._jobs.get(job)
        if current is not None and current.epoch <= epoch:
            del self._jobs[job]


def _check_size(what: str, tensor: EncodedTensor) -> None:
    if tensor.nbytes != nbytes(tensor.codec, tensor.shape):
        raise violation(f"{what} is {tensor.nbytes} bytes long, which its shape is not")


def _named(part: Part) -> str:
    of = f"{'group' if part.kind == 'x' else 'shard'} {part.index}, call {part.call}"
    return f"gradient {part.name!r} of {of}" if part.kind == "w" else f"{part.kind} of {of}"


def violation(problem: str) -> ColaError:
    """What the peer did wrong, as an error."""
    return ColaError(Reason.PROTOCOL_VIOLATION, problem=problem)
