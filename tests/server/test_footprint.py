"""What a pass takes for each token, against what torch's profiler says of a real job's passes."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cola_common.jobs import LoraAdapter
from cola_server.model import BaseModel, JobAdapter, JobBatch, probe, train
from cola_server.model.footprint import token_bytes
from tests.support.models import VOCABULARY, load_tiny

LABELS = 2


class Nowhere:
    def capture(self, *_: object) -> None: ...

    def finish(self) -> None: ...


def peak(base: BaseModel, adapter: JobAdapter, tokens: int) -> int:
    """The most that was allocated at once: the allocator's own events, in their order."""
    ids = torch.randint(5, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids if base.head_name is None else torch.zeros(1, dtype=torch.long)
    batch = JobBatch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, adapter=adapter, sink=Nowhere())
    train(base, [batch])  # the first pass pays for caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(base, [batch])
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert most > 0
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_it_is_what_a_job_that_adapts_every_layer_takes(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    base = load_tiny(kind, tmp_path, gradient_checkpointing=checkpointing)
    labels = None if base.head_name is None else LABELS
    adapter = JobAdapter.initial(probe(base, LoraAdapter(r=4), labels=labels, fold="unmerged"), 0, base.device)
    each = (peak(base, adapter, 64) - peak(base, adapter, 32)) / 32
    assert 0.85 * each <= token_bytes(base) <= 1.5 * each


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    base = load_tiny("llama", tmp_path)
    before = {name: p.clone() for name, p in base.module.named_parameters()}
    first = token_bytes(base)
    assert token_bytes(base) == first
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in base.module.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.module.modules())
