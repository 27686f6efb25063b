"""What the batches of one step add up to, for its metrics."""

import time
from collections.abc import Sequence

from cola_common.jobs import StepMetrics
from cola_common.messages import Calls, Delta
from cola_server.model import Site
from cola_server.training.captures import CapturePacker
from cola_server.training.cohorts import Pass
from cola_server.training.estimate import FP32
from cola_server.training.traffic import gradient_bytes


class Tally:
    """Of a job with these sites; begins when it is made."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._began = time.perf_counter()
        self._loss = 0.0
        self._tokens = self._target_tokens = 0
        self._rows = self._raw_bytes = self._sent_rows = 0
        self._seconds = self._reduce_seconds = self._encode_seconds = 0.0
        self.batches = 0
        self._sent_bytes = 0
        self.sent_calls: list[Calls] = []
        """With the rows that were sent."""

    def add(self, passed: Pass, packer: CapturePacker) -> Sequence[Calls]:
        """A batch went through the model, and its captures were sent. Returns: its calls, as the workers see them."""
        result = passed.result
        sent_calls = packer.sent_calls(result.calls)
        self.batches += 1
        self._loss += result.loss
        self._tokens += result.tokens
        self._target_tokens += result.target_tokens
        for call in result.calls:
            site = self._sites[call.index]
            self._rows += call.rows
            self._raw_bytes += FP32 * call.rows * (site.d_in + site.d_out)
        self._seconds += passed.seconds
        self._reduce_seconds += packer.reduce_seconds
        self._encode_seconds += packer.encode_seconds
        self._sent_rows += packer.sent_rows
        self._sent_bytes += sum(packer.sent.values())
        self.sent_calls += sent_calls
        return sent_calls

    def metrics(
        self,
        deltas: Sequence[Delta],
        *,
        step: int,
        epoch: int,
        learning_rate: float,
        grad_norm: float,
        waited: float,
        fold_seconds: float,
    ) -> StepMetrics:
        """Of the step, which has just been folded: from its last batch on it `waited` so long for its deltas."""
        slowest = max(delta.worker_seconds for delta in deltas)
        stepped = {index for delta in deltas for index, _ in delta.names}
        return StepMetrics(
            step=step + 1,
            epoch=epoch,
            train_loss=self._loss / self.batches,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=self._tokens,
            target_tokens=self._target_tokens,
            created_at=time.time(),
            seconds=time.perf_counter() - self._began,
            model_seconds=self._seconds - self._reduce_seconds - self._encode_seconds,
            reduce_seconds=self._reduce_seconds,
            encode_seconds=self._encode_seconds,
            wire_seconds=max(0.0, waited - slowest),
            worker_seconds=slowest,
            decode_seconds=max(delta.decode_seconds for delta in deltas),
            fold_seconds=fold_seconds,
            rows=self._rows,
            sent_rows=self._sent_rows,
            raw_bytes=self._raw_bytes,
            sent_bytes=self._sent_bytes,
            raw_delta_bytes=sum(gradient_bytes(self._sites[index], "fp32") for index in stepped),
            received_bytes=sum(tensor.nbytes for delta in deltas for tensor in delta.tensors),
        )
