"""What a step's batches add up to: sums, and what would have travelled without codecs and reductions."""

from collections.abc import Sequence

import pytest
import torch

from cola_common.families import Linear, Lora
from cola_common.jobs import Codec, Rows, StepMetrics
from cola_common.messages import Calls, Delta
from cola_common.tensor import encode_parameter
from cola_server.model import BatchResult, Site
from cola_server.training.captures import CapturePacker
from cola_server.training.cohorts import Pass
from cola_server.training.tally import Tally
from tests.server.capturing import captured, packer, parameters, site, values
from tests.support.wires import wire

SITES = [site(0, 0, Lora(2, 1.0)), site(1, 1, Lora(2, 1.0), d_out=9, calls=2), site(2, 2, Linear(1.0), d_in=5)]
ROWS = 16
CALLS = (Calls(0, 1, ROWS), Calls(1, 2, 2 * ROWS), Calls(2, 1, ROWS))
KEPT = {"all": (16, 32, 16), "exact": (0, 0, 16), "sketch": (3, 6, 3)}


def sent(rows: Rows, codec: Codec) -> CapturePacker:
    """A batch of all sites, for one worker."""
    sink, _ = packer(SITES, wire(rows, codec, sketch_rows=3))
    for each in reversed(SITES):
        for call in range(each.calls):
            sink.capture(captured(each, call, values(call, each.d_in), values(each.index, each.d_out)))
    sink.finish()
    return sink


def delta(sites: Sequence[Site], codec: str, seconds: float) -> Delta:
    named = {(each.index, name): p for each in sites for name, p in parameters(each).items()}
    tensors = tuple(encode_parameter(torch.ones_like(p), codec) for p in named.values())
    return Delta("job", 1, 4, tuple(named), (), "digest", seconds, tensors, seconds / 4)


def step(rows: Rows, codec: Codec, batches: int = 2) -> tuple[StepMetrics, list[CapturePacker], Sequence[Delta]]:
    """Of batches of losses 1, 2 …, 40 tokens and 30 targets, and of two workers."""
    tally, sinks = Tally(SITES), [sent(rows, codec) for _ in range(batches)]
    for number, sink in enumerate(sinks):
        result = BatchResult(1.0 + number, 40, 30, CALLS)
        calls = tally.add(Pass(result, sink.reduce_seconds + sink.encode_seconds + 1.0), sink)
        assert [c.rows for c in calls] == list(KEPT[rows])
    assert tally.batches == batches
    assert [c.rows for c in tally.sent_calls] == list(KEPT[rows]) * batches
    deltas = [delta(SITES[:2], codec, 2.0), delta(SITES[2:], codec, 3.0)]
    found = tally.metrics(deltas, step=4, epoch=2, learning_rate=0.5, grad_norm=7.0, waited=3.5, fold_seconds=0.25)
    return found, sinks, deltas


@pytest.mark.parametrize("rows", ["all", "exact", "sketch"])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_step_is_the_sum_of_its_batches_and_the_slowest_of_its_workers(rows: Rows, codec: Codec) -> None:
    found, sinks, deltas = step(rows, codec)
    assert (found.step, found.epoch, found.learning_rate, found.grad_norm) == (5, 2, 0.5, 7.0)
    assert (found.train_loss, found.tokens, found.target_tokens) == (1.5, 80, 60)
    assert (found.worker_seconds, found.decode_seconds, found.wire_seconds) == (3.0, 0.75, 0.5)
    assert found.model_seconds == pytest.approx(2.0), "neither reducing nor encoding"
    assert found.reduce_seconds == pytest.approx(sum(sink.reduce_seconds for sink in sinks))
    assert found.encode_seconds == pytest.approx(sum(sink.encode_seconds for sink in sinks))
    assert found.sent_bytes == sum(sink.sent["w"] for sink in sinks)
    assert found.sent_rows == sum(sink.sent_rows for sink in sinks)
    assert found.received_bytes == sum(len(t.data) for d in deltas for t in d.tensors)


def test_raw_is_what_all_rows_in_fp32_weigh() -> None:
    plain, _, _ = step("all", "fp32")
    assert (plain.raw_bytes, plain.raw_delta_bytes) == (plain.sent_bytes, plain.received_bytes)
    assert plain.rows == plain.sent_rows == 2 * 4 * ROWS
    for rows, codec in (("exact", "fp32"), ("sketch", "int8"), ("all", "bf16")):
        reduced, _, _ = step(rows, codec)  # type: ignore[arg-type]
        assert (reduced.raw_bytes, reduced.raw_delta_bytes) == (plain.raw_bytes, plain.raw_delta_bytes)
        assert reduced.rows == plain.rows
        assert reduced.sent_bytes < reduced.raw_bytes


def test_a_step_that_left_a_site_out_has_no_delta_of_it() -> None:
    tally = Tally(SITES)
    deltas = [delta(SITES[2:], "bf16", 1.0)]
    tally.add(Pass(BatchResult(1.0, 40, 30, CALLS[2:]), 1.0), sent("all", "fp32"))
    found = tally.metrics(deltas, step=0, epoch=1, learning_rate=0.5, grad_norm=7.0, waited=0.5, fold_seconds=0.0)
    assert found.wire_seconds == 0.0, "the worker was slower than the job waited"
    assert (found.rows, found.raw_bytes) == (ROWS, 4 * ROWS * (5 + 4))
    assert (found.raw_delta_bytes, found.received_bytes) == (4 * 5 * 4, 2 * 5 * 4)
